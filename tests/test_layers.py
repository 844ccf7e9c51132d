"""Who may import what, and what an import may do: the arrows of the architecture, as a test."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import immich_ml_metal

ROOT = Path(immich_ml_metal.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# One rank for each package and each module at the top, the lowest first. Whoever needs something
# from above moves it down, or is handed it by the one who calls.
RANKS = (
    *("errors", "urgency", "threads", "system", "state", "types", "drawing", "catalog"),
    *("setting_kinds", "settings", "settings_environment"),
    *("settings_text", "settings_sources", "logs", "metrics"),
    *("onnx_files", "onnx_graph", "onnx_mlx", "tasks", "models", "index_guard", "backends"),
    "qualification",
    "worker",
    *("client", "parity", "immich", "gateway", "service", "bench", "doctor"),
    *("cli", "__main__"),
)

MAX_MODULE_LINES = 350
MAX_FUNCTION_LINES = 30

HARDWARE = {"mlx", "onnxruntime", "coreml", "Vision", "Quartz", "CoreML", "Foundation", "objc"}
HARDWARE |= {"coremltools", "torch", "open_clip"}
HEAVY = {"numpy", "cv2", "PIL", "onnx", "tokenizers", "starlette", "huggingface_hub"} | HARDWARE
# The pure core: what it may know of the rest of the package.
CORE = {
    "errors": set(),
    "types": set(),
    "worker/wire": {"catalog", "errors", "types"},
    "tasks": {"errors", "tasks", "types"},
}


def module_name(path: Path) -> str:
    """`tasks.clip` for its file; the package itself is the empty name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path): path for path in FILES}
MODULES = sorted(f"{ROOT.name}.{name}".rstrip(".") for name in NAMES if name != "__main__")


def imports(path: Path) -> set[str]:
    """Every module a file imports, at the top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == ROOT.name:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def dependencies(name: str) -> set[str]:
    """The modules of this package that a module imports, wherever in its text."""
    found = set()
    for node in ast.walk(ast.parse(NAMES[name].read_text(encoding="utf-8"))):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports name their module in full"
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        for target in targets:
            if target.partition(".")[0] == ROOT.name:
                inner = target.partition(".")[2]
                found.add(inner if inner in NAMES else inner.rpartition(".")[0])
    return found - {name}


def room(name: str) -> str:
    """What has a rank: a package, or a module at the top."""
    return name.partition(".")[0]


GRAPH = {name: dependencies(name) for name in NAMES}


def circle_through(start: str) -> list[str]:
    """The shortest way from a module back to itself along imports; empty where there is none."""
    ways = [[start]]
    seen: set[str] = set()
    for way in ways:
        for after in sorted(GRAPH[way[-1]]):
            if after == start:
                return way
            if after not in seen:
                seen.add(after)
                ways.append([*way, after])
    return []


def functions(path: Path) -> list[tuple[str, int]]:
    """Each function of a file with its length in lines, signature and docstring included."""
    return [
        (f"{module_name(path)}.{node.name}", (node.end_lineno or 0) - node.lineno + 1)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def test_every_package_and_top_module_has_one_rank() -> None:
    rooms = {room(name) for name in NAMES} - {""}
    assert set(RANKS) == rooms, "RANKS and the source folder disagree about these"
    assert len(set(RANKS)) == len(RANKS)


def test_the_architecture_page_lists_the_packages_by_rank() -> None:
    page = (ROOT.parents[1] / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = page.partition("## The folders")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = [name for cell in cells for name in re.findall(r"`(\w+)/?`", cell)]
    assert sorted([*named, "__main__"]) == sorted(RANKS)
    packages = [name for cell in cells for name in re.findall(r"`(\w+)/`", cell)]
    assert packages == sorted(packages, key=RANKS.index)


def test_nothing_imports_upwards_not_even_inside_a_function() -> None:
    upwards = {
        (name, target)
        for name, targets in GRAPH.items()
        for target in targets
        if name and target and RANKS.index(room(target)) > RANKS.index(room(name))
    }
    assert upwards == set()


def test_no_circle_of_imports_anywhere() -> None:
    circles = {tuple(sorted(circle)) for name in NAMES if (circle := circle_through(name))}
    assert circles == set()


def test_no_module_is_longer_than_its_limit() -> None:
    sizes = {name: len(path.read_text("utf-8").splitlines()) for name, path in NAMES.items()}
    assert {name for name, lines in sizes.items() if lines > MAX_MODULE_LINES} == set()


def test_no_function_is_longer_than_its_limit() -> None:
    found = {
        name for path in FILES for name, lines in functions(path) if lines > MAX_FUNCTION_LINES
    }
    assert found == set()


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def own(path: Path) -> set[str]:
    """The parts of this package a file imports: `tasks` for `immich_ml_metal.tasks.clip`."""
    prefix = f"{ROOT.name}."
    return {name.split(".")[1] for name in imports(path) if name.startswith(prefix)}


def test_only_backends_and_onnx_mlx_import_hardware_libraries() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if path.relative_to(ROOT).parts[0] not in {"backends", "onnx_mlx"}
        and packages(path) & HARDWARE
    }
    # the yardstick measures the bare library, in a process of its own
    assert users <= {"bench/raw.py"}


def test_only_the_worker_speaks_http_through_starlette() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if "starlette" in packages(path)
    }
    assert users <= {"worker/server.py", "worker/form.py", "worker/compose.py"}


def test_only_wire_and_the_client_speak_of_immichs_fields() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if any(name in path.read_text(encoding="utf-8") for name in ('"boundingBox"', '"boxScore"'))
    }
    assert users == {"worker/wire.py", "client/calls.py"}  # each side of the wire has one place


@pytest.mark.parametrize("part", CORE)
def test_the_core_knows_only_what_lies_below_it(part: str) -> None:
    files = sorted((ROOT / part).glob("*.py")) or [ROOT / f"{part}.py"]
    for path in files:
        assert own(path) <= CORE[part], path


def test_the_tasks_touch_no_files_no_network_and_no_clock() -> None:
    forbidden = {"os", "pathlib", "socket", "time", "threading", "subprocess", "httpx", "asyncio"}
    for path in (ROOT / "tasks").glob("*.py"):
        assert not packages(path) & forbidden, path


# Imports each module in turn and reports what it did beside defining names.
PROBE = """
import importlib, json, logging, os, sys, threading, warnings
modules = json.load(sys.stdin)
opened = []
def watch(event, args):
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        opened.append(str(args[0]))
    if event in ("socket.connect", "socket.bind", "subprocess.Popen", "os.mkdir", "os.remove"):
        opened.append(event)
def state():
    environment = hash(frozenset(os.environ.items()))
    handlers, filters = len(logging.root.handlers), len(warnings.filters)
    return threading.active_count(), environment, handlers, filters, os.getcwd()
sys.dont_write_bytecode = True
sys.addaudithook(watch)
report = {}
for name in modules:
    before = state()
    try:
        importlib.import_module(name)
    except ImportError as exc:
        report[name] = f"not installed: {exc.name}"
        continue
    after = state()
    report[name] = "" if before == after and not opened else f"{before} {after} {opened}"
    opened.clear()
json.dump([report, sorted({module.split(".")[0] for module in sys.modules})], sys.stdout)
"""


def probe(modules: list[str]) -> tuple[dict[str, str], set[str]]:
    """Import in a clean process: what each module did, and every package that was loaded."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT.parent)!r})\n{PROBE}"],
        input=json.dumps(modules),
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    report, loaded = json.loads(done.stdout)
    assert done.stderr == ""
    return report, set(loaded)


def test_imports_have_no_effects() -> None:
    others = [*sorted(HEAVY - HARDWARE), "onnxruntime", "mlx.core", "uvicorn", "rich", "httpx"]
    report, _ = probe([*others, *MODULES])  # other people's imports have theirs first
    assert {name: did for name, did in report.items() if did and name in MODULES} == {}


def test_the_command_line_starts_without_heavy_imports() -> None:
    report, loaded = probe(["immich_ml_metal.cli"])
    assert report == {"immich_ml_metal.cli": ""}
    assert not loaded & HEAVY


def test_the_help_that_lists_the_commands_imports_none_of_them() -> None:
    code = """
import json, sys
from immich_ml_metal.cli import COMMANDS, main
try:
    main(["--help"])
finally:
    json.dump(sorted(sys.modules), sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stderr)
    assert not {name.split(".")[0] for name in loaded} & (HEAVY | {"httpx", "pydantic", "psutil"})
    ours = {name for name in loaded if name.startswith("immich_ml_metal.cli.")}
    assert ours == {"immich_ml_metal.cli.output", "immich_ml_metal.cli.ending"}
