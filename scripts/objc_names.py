"""Follows the Objective-C types through `backends/vision/bridge.py` and reports each name it uses.

PyObjC resolves names at run time, so a misspelt selector fails on the user's Mac and nowhere else.
This reads the source instead: annotations name the Objective-C class of a value, Apple's
declarations (`Facts`) say what a call on it returns, and what cannot be followed is a finding.
"""

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PYTHON = "python"  # a value that is not Objective-C: its attributes are mypy's business
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Member:
    """A method, property, function or field: how it is called and what comes back.

    Attributes:
        arity: arguments, 0 for a property; None for a field, which is not called.
        returns: the class of the result as Apple declares it.
        out: index of the argument that is an out-parameter: pass None, get a tuple back.
        is_bool: the result is a BOOL.
        is_pointer: the result is a C array that does not know its length.
        is_static: belongs to the class, not to its instances.
    """

    arity: int | None
    returns: str = ""
    out: int | None = None
    is_bool: bool = False
    is_pointer: bool = False
    is_static: bool = False


@dataclass
class Facts:
    """What Apple declares: classes (base, members by PyObjC name), functions, constants."""

    bases: dict[str, str] = field(default_factory=dict)
    members: dict[str, dict[str, Member]] = field(default_factory=dict)
    functions: dict[str, Member] = field(default_factory=dict)
    constants: dict[str, int] = field(default_factory=dict)

    def find(self, name: str, member: str) -> tuple[str, Member] | None:
        """Look a member up in a class and its bases; return it with the class that declares it."""
        while name in self.members:
            if member in self.members[name]:
                return name, self.members[name][member]
            name = self.bases.get(name, "")
        return None


def read_facts(path: Path) -> Facts:
    """Read the committed table."""
    table = json.loads(path.read_text(encoding="utf-8"))
    return Facts(
        bases=table["bases"],
        members={
            owner: {name: Member(**facts) for name, facts in members.items()}
            for owner, members in table["members"].items()
        },
        functions={name: Member(**facts) for name, facts in table["functions"].items()},
        constants=table["constants"],
    )


@dataclass(frozen=True)
class Use:
    """One name used: a class's member, or a function, class or constant (`owner` empty)."""

    line: int
    owner: str
    name: str


class Follower:
    """Walks one source file. `uses` is what it found, `problems` what is wrong or not followed."""

    def __init__(self, facts: Facts, frameworks: set[str]) -> None:
        self.facts = facts
        self.uses: list[Use] = []
        self.problems: list[str] = []
        self._frameworks = frameworks
        self._returns: dict[str, str] = {}
        self._globals: set[str] = set()

    def follow(self, source: str) -> "Follower":
        """Walk every function of `source`."""
        tree = ast.parse(source)
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        self._returns = {node.name: self._annotated(node.returns) for node in functions}
        self._globals = set(_module_names(tree))
        for function in functions:
            self._function(function)
        return self

    def _function(self, function: ast.FunctionDef) -> None:
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        scope = {argument.arg: self._annotated(argument.annotation) for argument in arguments}
        for node in _in_order(function):
            match node:
                case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation):
                    scope[name] = self._annotated(annotation)
                case ast.Assign(targets=[target], value=value):
                    self._bind(target, self._type(value, scope), scope)
                case ast.For(target=target, iter=sequence):
                    self._bind(target, _element(self._type(sequence, scope)), scope)
                case ast.comprehension(target=target, iter=sequence):
                    self._bind(target, _element(self._type(sequence, scope)), scope)
                case ast.ExceptHandler(name=str(name)):
                    scope[name] = PYTHON
                case ast.Attribute():
                    self._type(node, scope)
                case ast.Call():
                    self._type(node, scope)

    def _bind(self, target: ast.expr, kind: str, scope: dict[str, str]) -> None:
        if isinstance(target, ast.Name):
            scope[target.id] = kind
        elif isinstance(target, ast.Tuple):
            parts = kind.split(", ") if ", " in kind else [kind] * len(target.elts)
            for element, part in zip(target.elts, parts, strict=False):
                self._bind(element, part, scope)

    def _annotated(self, annotation: ast.expr | None) -> str:
        """`VNX | None` and `VNX` → VNX; `list[VNX]` → [VNX]; anything Python → PYTHON."""
        text = ast.unparse(annotation).strip("'\"") if annotation is not None else ""
        text = text.removesuffix(" | None")
        for opening in ("list[", "Sequence["):
            if text.startswith(opening):
                return f"[{self._class_or_python(text[len(opening) : -1])}]"
        return self._class_or_python(text)

    def _class_or_python(self, name: str) -> str:
        return name if name in self.facts.members else PYTHON

    def _type(self, node: ast.expr, scope: dict[str, str]) -> str:
        match node:
            case ast.Name(id=name):
                return scope.get(name, PYTHON if name in self._globals else UNKNOWN)
            case ast.Call(func=func):
                return self._called(func, node, scope)
            case ast.Attribute():
                return self._attribute(node, scope)
            case ast.List(elts=[first, *_]) | ast.Tuple(elts=[first, *_]):
                return f"[{self._type(first, scope)}]"
            case _:
                return PYTHON

    def _attribute(self, node: ast.Attribute, scope: dict[str, str]) -> str:
        if (framework := _framework_of(node.value)) in self._frameworks:
            return self._framework_name(node, framework)
        receiver = self._type(node.value, scope)
        if receiver == UNKNOWN:
            self._problem(node, f"cannot tell what {ast.unparse(node.value)} is")
        if receiver not in self.facts.members:
            return PYTHON
        found = self.facts.find(receiver, node.attr)
        if found is None:
            self._problem(node, f"{receiver} has no {node.attr}")
            return PYTHON
        owner, member = found
        self._use(node, owner)
        return self._class_or_python(member.returns)

    def _framework_name(self, node: ast.Attribute, framework: str) -> str:
        if framework == "objc":  # the bridge itself: `error` and `autorelease_pool`
            return PYTHON
        known = {**self.facts.members, **self.facts.functions, **self.facts.constants}
        if node.attr not in known:
            self._problem(node, f"no class, function or constant {node.attr}")
            return PYTHON
        self._use(node, "")
        return f"class {node.attr}" if node.attr in self.facts.members else PYTHON

    def _called(self, func: ast.expr, call: ast.Call, scope: dict[str, str]) -> str:
        match func:
            case ast.Name(id=name):
                return self._returns.get(name, PYTHON)
            case ast.Attribute():
                return self._call(func, call, scope)
            case _:
                return PYTHON

    def _call(self, func: ast.Attribute, call: ast.Call, scope: dict[str, str]) -> str:
        if isinstance(func.value, ast.Name) and func.value.id == "self":
            return self._returns.get(func.attr, PYTHON)
        if _framework_of(func.value) in self._frameworks:
            self._attribute(func, scope)
            return self._checked(func.attr, self.facts.functions.get(func.attr), call)
        kind = self._type(func.value, scope)
        receiver = kind.removeprefix("class ")
        found = self.facts.find(receiver, func.attr)
        if receiver not in self.facts.members:
            return self._pointer_call(func, receiver)
        if found is None:
            self._problem(call, f"{receiver} has no {func.attr}")
            return PYTHON
        owner, member = found
        self._use(func, owner)
        if member.is_static != (kind != receiver):
            self._problem(
                call, f"{func.attr} belongs to the {'class' if member.is_static else 'instance'}"
            )
        result = self._checked(func.attr, member, call)
        return receiver if member.returns == "this" else result

    def _pointer_call(self, func: ast.Attribute, receiver: str) -> str:
        if receiver == "pointer" and func.attr != "as_tuple":
            self._problem(
                func, f"a C array has no {func.attr}; it must be copied by as_tuple(length)"
            )
        if receiver == UNKNOWN:
            self._problem(func, f"cannot tell what {ast.unparse(func.value)} is")
        return PYTHON

    def _checked(self, name: str, member: Member | None, call: ast.Call) -> str:
        """Check the shape of a call and say what it returns."""
        if member is None:
            return PYTHON
        if member.arity is None:
            self._problem(call, f"{name} is a field, not a method")
        elif len(call.args) != member.arity or call.keywords:
            self._problem(call, f"{name} takes {member.arity} arguments, not {len(call.args)}")
        elif member.out is not None and not _is_none(call.args[member.out]):
            self._problem(call, f"{name}: argument {member.out} is an out-parameter, pass None")
        if member.is_pointer:
            return "pointer"
        kind = self._class_or_python(member.returns)
        return f"{kind}, NSError" if member.out is not None else kind

    def _use(self, node: ast.Attribute, owner: str) -> None:
        self.uses.append(Use(node.lineno, owner, node.attr))

    def _problem(self, node: ast.expr, text: str) -> None:
        problem = f"line {node.lineno}: {text}"
        if problem not in self.problems:
            self.problems.append(problem)


def _in_order(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes in source order; a comprehension's loops before the value that uses their variables."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            for generator in child.generators:
                yield generator
                yield from _in_order(generator)
        yield child
        yield from _in_order(child)


def _module_names(tree: ast.Module) -> Iterator[str]:
    """Names that a module imports or defines at its top."""
    for node in tree.body:
        match node:
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                yield from (alias.asname or alias.name for alias in names)
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                yield name
            case ast.Assign(targets=[ast.Name(id=name)]):
                yield name


def _framework_of(node: ast.expr) -> str:
    """`self._vision` → vision."""
    match node:
        case ast.Attribute(value=ast.Name(id="self"), attr=name):
            return name.removeprefix("_")
        case _:
            return ""


def _element(kind: str) -> str:
    return kind[1:-1] if kind.startswith("[") else PYTHON


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
