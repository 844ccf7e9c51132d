"""Plant small faults in the source, one at a time, and see whether the tests notice.

`make mutants ROOM=tasks N=40 SEED=0`; without a room, all of them. Works on a copy of the source. A
fault that no test notices is printed: write the test, or know why the fault changes nothing.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = Path("src/immich_ml_metal")
LIMIT_S = 300.0  # for the tests of one fault; a fault that makes them hang is noticed

# What is changed → the tests that answer for it, beside those that bear its name.
ROOMS = {
    "wire": (("worker/wire.py", "worker/form.py", "gateway/http.py"), "tests/worker tests/gateway"),
    "tasks": (("tasks/*.py",), "tests/tasks"),
    "batcher": (("backends/batcher.py",), "tests/backends/test_batcher.py tests/worker"),
    "pool": (("worker/pool.py", "worker/memory.py", "worker/picture_cache.py"), "tests/worker"),
    "gateway": (("gateway/*.py",), "tests/gateway"),
    "models": (("models/*.py",), "tests/models"),
}

_PAIRS = (
    *((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot)),
    *((ast.In, ast.NotIn), (ast.And, ast.Or), (ast.Add, ast.Sub), (ast.Mult, ast.FloorDiv)),
)
_OTHER: dict[type[ast.AST], Any] = {
    **dict(_PAIRS),
    **{other: one for one, other in _PAIRS},
    ast.Not: ast.UAdd,
}
_OTHER_END = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """A fault: the file's whole text with it, and what was changed where."""

    file: Path
    line: int
    before: str
    after: str
    text: str


def mutants_of(file: Path, text: str) -> Iterator[Mutant]:
    """Every fault that this tool can plant in `text`."""
    tree = ast.parse(text)
    heads = (head for node in ast.walk(tree) for head in getattr(node, "decorator_list", ()))
    left_out = {id(node) for head in heads for node in ast.walk(head)}  # frozen, slots: no answers
    for place, node in enumerate(ast.walk(tree)):
        if id(node) in left_out:
            continue
        for number in range(len(_changes(node))):
            changed = copy.deepcopy(tree)
            target = next(one for at, one in enumerate(ast.walk(changed)) if at == place)
            before = ast.unparse(target)
            _changes(target)[number]()
            after = ast.unparse(target)
            line = getattr(node, "lineno", 0)
            yield Mutant(file, line, before, after, ast.unparse(ast.fix_missing_locations(changed)))


Change = Callable[[], object]


def _changes(node: ast.AST) -> list[Change]:
    """What can be done to one node, each as a function that does it."""
    find = _CHANGES.get(type(node))
    return find(node) if find is not None else []


def _swap(node: Any) -> list[Change]:
    is_compare = isinstance(node, ast.Compare)
    other = _OTHER.get(type(node.ops[0] if is_compare else node.op))
    if other is None:
        return []
    if is_compare:
        return [lambda: node.ops.__setitem__(0, other())]
    return [lambda: setattr(node, "op", other())]


def _swap_function(node: ast.Call) -> list[Change]:
    name = ast.unparse(node.func)
    return [lambda: setattr(node.func, "id", _OTHER_END[name])] if name in _OTHER_END else []


def _alter(node: ast.Constant) -> list[Change]:
    value = node.value
    if isinstance(value, bool):
        return [lambda: setattr(node, "value", not value)]
    if isinstance(value, int | float):
        return [lambda: setattr(node, "value", value + 1)]
    if isinstance(value, bytes) and value:
        return [lambda: setattr(node, "value", value + b"x")]
    return []


def _shorten(node: ast.Dict) -> list[Change]:
    return [lambda: (node.keys.pop(), node.values.pop())] if node.keys else []


def _leave_out(node: Any) -> list[Change]:
    lost = [at for at, one in enumerate(node.body) if _can_go(one)]
    return [partial(node.body.__setitem__, at, ast.Pass()) for at in lost]


_CHANGES: dict[type[ast.AST], Callable[[Any], list[Change]]] = {
    **dict.fromkeys((ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp), _swap),
    ast.Call: _swap_function,
    ast.Constant: _alter,
    ast.Dict: _shorten,
    **dict.fromkeys(
        (ast.FunctionDef, ast.AsyncFunctionDef, ast.If, ast.With, ast.AsyncWith, ast.For, ast.Try),
        _leave_out,
    ),
}


def _can_go(statement: ast.stmt) -> bool:
    """Whether a statement can be left out without the rest falling over at once."""
    if isinstance(statement, ast.AugAssign | ast.Raise):
        return True
    called = statement.value if isinstance(statement, ast.Expr) else None
    called = called.value if isinstance(called, ast.Await) else called
    return isinstance(called, ast.Call) and "log" not in ast.unparse(called.func)


def is_noticed(mutant: Mutant, source: Path, tests: str) -> bool:
    """Whether a test fails, or hangs, with the fault in `source`, a copy of the package."""
    place = source / mutant.file
    right = place.read_text()
    place.write_text(mutant.text)
    own = [str(one) for one in (ROOT / "tests").rglob(f"test_{mutant.file.stem}.py")]
    try:
        return (own != [] and _fails(source.parent, own)) or _fails(source.parent, _all(tests))
    finally:
        place.write_text(right)


def _all(tests: str) -> list[str]:
    return ["-n", "2", *tests.split()]  # they wait more than they compute


def _fails(path: Path, tests: list[str]) -> bool:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "not soak and not apple", "--timeout=60", *tests]
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=LIMIT_S, capture_output=True, check=False
        )
    except subprocess.TimeoutExpired:
        return True
    return ended.returncode != 0


def examine(room: str, count: int, seed: int) -> int:
    """Plant `count` faults in a room; prints what no test noticed, and gives how many."""
    patterns, tests = ROOMS[room]
    files = [file for pattern in patterns for file in sorted((ROOT / PACKAGE).glob(pattern))]
    everything = [
        mutant
        for file in files
        for mutant in mutants_of(file.relative_to(ROOT / PACKAGE), file.read_text())
    ]
    chosen = random.Random(seed).sample(everything, min(count, len(everything)))
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, PACKAGE.name)
        shutil.copytree(ROOT / PACKAGE, source)
        if _fails(source.parent, _all(tests)):  # else every fault would count as noticed
            raise SystemExit(f"{room}: the tests fail without a fault")
        for mutant in chosen:
            if is_noticed(mutant, source, tests):
                continue
            survivors += 1
            print(f"  {mutant.file}:{mutant.line}  {mutant.before!r:.90} → {mutant.after!r:.90}")
    noticed = len(chosen) - survivors
    print(f"{room}: {noticed} of {len(chosen)} noticed, of {len(everything)} possible", flush=True)
    return survivors


def main() -> None:
    """Examine what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--room", choices=ROOMS, action="append")
    parser.add_argument("-n", type=int, default=30, help="faults for each room")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    for room in chosen.room or ROOMS:
        examine(room, chosen.n, chosen.seed)


if __name__ == "__main__":
    main()
