"""Transpositions that follow each other become one, or none."""

from immich_ml_metal.onnx_mlx.graph import Editor, Node, Program

Order = tuple[int, ...]


def merge_transposes(program: Program) -> Program:
    """Transpose(Transpose(x)) → one Transpose; those that change nothing vanish."""
    editor = Editor(program)
    alias: dict[str, str] = {}
    for node in editor:
        inputs = tuple(alias.get(name, name) for name in node.inputs)
        perm = node.attributes.get("perm")
        if node.op == "Transpose" and isinstance(perm, tuple):
            inner = editor.producer(inputs[0], "Transpose")
            before = inner.attributes.get("perm") if inner else None
            if inner is not None and isinstance(before, tuple):
                perm = tuple(before[axis] for axis in perm)
                inputs = inner.inputs
            if perm == tuple(range(len(perm))) and node.outputs[0] not in program.output_names:
                alias[node.outputs[0]] = inputs[0]
                editor.replace(node)
                continue
            demanded = not node.attributes.get("layout") or inner is not None
            kept = {"perm": perm} if demanded else node.attributes
            node_now = Node("Transpose", inputs, node.outputs, kept, node.name)
        elif inputs == node.inputs:
            continue
        else:
            node_now = Node(node.op, inputs, node.outputs, node.attributes, node.name)
        editor.replace(node, node_now)
    return editor.finish()
