"""What a release says and what it refuses."""

import zipfile
from pathlib import Path

import pytest
import release_check
import yaml  # type: ignore[import-untyped]
from doc_blocks import lines_of
from release_notes import notes_of

ROOT = Path(__file__).parents[1]
CHANGES = "# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2026-12-01\n\n- B\n\n## [0.1.0]\n- A\n"


def test_the_notes_are_the_section_of_the_version() -> None:
    assert notes_of("0.2.0", CHANGES) == "- B"
    assert notes_of("0.1.0", CHANGES) == "- A"


@pytest.mark.parametrize("version", ["Unreleased", "0.3.0", "0.2"])
def test_a_version_without_notes_is_refused(version: str) -> None:
    with pytest.raises(LookupError, match=f"says nothing of {version}"):
        notes_of(version, CHANGES)


def test_a_release_without_an_address_is_undecided() -> None:
    assert any("public address" in line for line in release_check.find_undecided())


def test_a_wheel_with_weights_or_secrets_is_refused() -> None:
    wanted = ("a/LICENSE",)
    release_check.require("x.whl", ["pkg/a/LICENSE"], wanted)
    with pytest.raises(AssertionError, match="lacks"):
        release_check.require("x.whl", [], wanted)
    for name in ("pkg/model.onnx", "x/.env", ".venv/bin/python"):
        with pytest.raises(AssertionError, match="carries"):
            release_check.require("x.whl", ["pkg/a/LICENSE", name], wanted)


def test_an_archive_that_lacks_its_catalogue_is_refused(tmp_path: Path) -> None:
    for name, content in {"x.whl": "x-1.dist-info/METADATA", "x.tar.gz": ""}.items():
        with zipfile.ZipFile(tmp_path / name, "w") as opened:
            opened.writestr(content or "x", "Version: 1")
    with pytest.raises(AssertionError, match=r"catalog\.toml"):
        release_check.look_into(tmp_path)


def test_the_workflow_refuses_what_is_undecided_and_publishes_without_a_token() -> None:
    text = (ROOT / ".github/workflows/release.yml").read_text()
    jobs = yaml.safe_load(text)["jobs"]
    assert "release_check.py --strict" in text
    assert jobs["publish"]["needs"] == "test"
    assert jobs["test"]["needs"] == "build"
    assert jobs["publish"]["permissions"]["id-token"] == "write"
    assert "password" not in text


def test_the_readme_leads_from_the_start_to_the_way_back() -> None:
    lines = lines_of("README.md", "## Start")
    steps = ("make serve", "make demo", "doctor", "service install --print", "uninstall")
    assert [step for step in steps if not any(line.endswith(step) for line in lines)] == []
    uv, pipx, *from_lock = lines_of("docs/start.md", "## As a program of its own")
    assert (uv.split()[0], pipx.split()[0]) == ("uv", "pipx")
    assert "--require-hashes -r requirements.lock" in " ".join(from_lock)
