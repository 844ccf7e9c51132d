"""The tool that plants faults plants them, one at a time, and sees what a test sees."""

import ast
from pathlib import Path

import mutants
import pytest

SOURCE = """
LIMIT = 5

def take(items, more=True):
    found = {"a": 1, "b": 2}
    if len(items) < LIMIT and not more:
        items.append(min(items))
    return len(items) - 1
"""


def changed(text: str) -> list[tuple[str, str]]:
    return [(one.before, one.after) for one in mutants.mutants_of(Path("x.py"), text)]


def test_each_fault_is_planted_alone() -> None:
    found = changed(SOURCE)
    assert ("len(items) < LIMIT", "len(items) <= LIMIT") in found
    assert ("not more", "+more") in found
    assert ("min(items)", "max(items)") in found
    assert ("len(items) - 1", "len(items) + 1") in found
    assert ("{'a': 1, 'b': 2}", "{'a': 1}") in found
    assert ("True", "False") in found
    assert ("5", "6") in found
    right = ast.unparse(ast.parse(SOURCE)).splitlines()
    for one in mutants.mutants_of(Path("x.py"), SOURCE):
        wrong = one.text.splitlines()
        assert sum(a != b for a, b in zip(right, wrong, strict=True)) == 1


def test_a_line_of_the_log_is_no_fault() -> None:
    assert changed("def f():\n    log.info('x')\n") == []


@pytest.mark.parametrize(("operator", "is_seen"), [("<=", True), ("!=", False)])
def test_a_fault_is_noticed_when_a_test_fails(
    operator: str, is_seen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    (root / "tests").mkdir(parents=True)
    (root / "tests" / "test_part.py").write_text(
        "from mutated_package import part\ndef test(): assert part.is_below(1, 2)\n"
        "def test_itself(): assert not part.is_below(2, 2)\n"
    )
    (root / "pytest.ini").write_text("[pytest]\nmarkers =\n  soak\n  apple\n")
    package = tmp_path / "copy" / "mutated_package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "part.py").write_text("def is_below(a, b): return a < b\n")
    monkeypatch.setattr(mutants, "ROOT", root)
    text = f"def is_below(a, b): return a {operator} b\n"
    mutant = mutants.Mutant(Path("part.py"), 1, "a < b", f"a {operator} b", text)
    assert mutants.is_noticed(mutant, package, "tests") is is_seen
    assert (package / "part.py").read_text() == "def is_below(a, b): return a < b\n"
