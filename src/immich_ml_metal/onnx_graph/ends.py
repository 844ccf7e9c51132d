"""Which values say where a text ends: the place of its highest token number.

CLIP's tokenizers give the end token the highest number, and its text towers read the vector that
stands there: `x[argmax(tokens)]`.
"""

from immich_ml_metal.onnx_graph.graph import Node, Program

# Position of the input that only tells the number of rows, of the operators that have one.
COUNTED = {"ExpandBatch": 1, "GatherRows": 2, "GatherNDRows": 2}
_KEEPING = frozenset(
    {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Concat", "Add"}
)


def end_places(program: Program) -> frozenset[str]:
    """Names of the values that hold the end token's place, beside constants.

    Adding is followed only where it adds zero: the number of a text's row in a batch of one.
    """
    ends: set[str] = set()
    fixed = set(program.constants)
    tokens = {spec.name for spec in program.inputs if spec.dtype.kind == "i"}
    for node in program.nodes:
        if node.op == "ExpandBatch" and node.inputs[0] in fixed:
            fixed.update(node.outputs)
        elif node.op == "ArgMax":
            if node.inputs[0] in tokens and _is_first_along_tokens(node):
                ends.update(node.outputs)
        elif node.op in _KEEPING and _adds_nothing(program, node):
            given = [name for name in node.inputs if name not in fixed]
            if given and ends.issuperset(given):
                ends.update(node.outputs)
    return frozenset(ends)


def _is_first_along_tokens(node: Node) -> bool:
    get = node.attributes.get
    return get("axis", 0) in (1, -1) and not get("select_last_index", 0)


def _adds_nothing(program: Program, node: Node) -> bool:
    added = [program.constants[name] for name in node.inputs if name in program.constants]
    return node.op != "Add" or not any(value.any() for value in added)
