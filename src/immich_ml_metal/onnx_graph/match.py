"""How a pass looks at a graph: patterns that fit, or say at which node they do not and why.

A pass has candidates (each Softmax may be an attention). At a candidate it asks for one thing after
the other; the first that is not there raises `NoMatch` with what was found instead. So "why was
this not fused" has an answer, which `python -m immich_ml_metal.onnx_mlx MODEL.onnx --why` prints.
"""

from collections.abc import Callable, Collection

from immich_ml_metal.onnx_graph.graph import Editor, Node, Program

Note = Callable[[Node, str], None]  # is told of each candidate that does not match, and why


class NoMatch(Exception):
    """A pattern does not fit at a candidate; says what differs."""


def ignore(node: Node, reason: str) -> None:
    """Note nothing: the service only wants the program."""


def rewrite(
    program: Program,
    candidates: Collection[str],
    rewrite_at: Callable[[Editor, Node], None],
    note: Note,
) -> Program:
    """Try a pattern at each node whose operator is one of `candidates`."""
    editor = Editor(program)
    for node in editor:
        if node.op not in candidates:
            continue
        try:
            rewrite_at(editor, node)
        except NoMatch as exc:
            note(node, str(exc))
    return editor.finish()


def require(condition: object, reason: str) -> None:
    """Go on only where `condition` holds.

    Raises:
        NoMatch: it does not.
    """
    if not condition:
        raise NoMatch(reason)


def made_by(editor: Editor, name: str, *ops: str) -> Node:
    """The node that makes `name`, which must be one of `ops`.

    Raises:
        NoMatch: says where the value comes from instead.
    """
    node = editor.producer(name, *ops)
    if node is not None:
        return node
    wanted = " or ".join(ops)
    if name in editor.constants:
        raise NoMatch(f"{name!r} is a constant, not the result of {wanted}")
    other = editor.producer(name)
    source = "is an input of the model" if other is None else f"comes from {other}"
    raise NoMatch(f"{name!r} {source}, not from {wanted}")


def made_for_this(editor: Editor, name: str, *ops: str) -> Node:
    """Like `made_by`, for a value that nothing else looks at: its node can be swallowed.

    Raises:
        NoMatch: as `made_by`, or names who else needs the value.
    """
    node = made_by(editor, name, *ops)
    require(editor.is_private(name), _needed_elsewhere(editor, name))
    return node


def used_by(editor: Editor, name: str, *ops: str) -> Node:
    """The only node that looks at `name`, which must be one of `ops`.

    Raises:
        NoMatch: names who looks at it instead.
    """
    users = editor.users(name)
    require(editor.is_private(name), _needed_elsewhere(editor, name))
    require(users[0].op in ops, f"{name!r} goes to {users[0]}, not to {' or '.join(ops)}")
    return users[0]


def _needed_elsewhere(editor: Editor, name: str) -> str:
    users = editor.users(name)
    if len(users) > 1:
        return f"{name!r} is needed by {' and '.join(str(user) for user in users)}"
    return f"{name!r} is a result of the model"


def other_input(node: Node, name: str) -> str:
    """The second operand of a node with two."""
    return node.inputs[1] if node.inputs[0] == name else node.inputs[0]
