"""The wheel is what users get: it must be whole and run without the source tree."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from immich_ml_metal import __version__

ROOT = Path(__file__).parents[2]
pytest.importorskip("hatchling", reason="hatchling builds the wheel")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def run(
    *command: str, env: Mapping[str, str] | None = None, cwd: Path
) -> "subprocess.CompletedProcess[str]":
    bare = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    clean = {**bare, **(env or {})}
    return subprocess.run(
        command, cwd=cwd, env=clean, capture_output=True, text=True, check=False, timeout=900
    )


def test_the_wheel_carries_every_file_of_the_package(wheel: Path) -> None:
    package = ROOT / "src" / "immich_ml_metal"
    wanted = {
        str(file.relative_to(package.parent))
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith(".")
    }
    with zipfile.ZipFile(wheel) as opened:
        assert wanted <= set(opened.namelist())
        assert not any(name.startswith("tests/") for name in opened.namelist())


def test_the_unpacked_wheel_runs_without_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path / "site")
    env = {"PYTHONPATH": str(tmp_path / "site"), "HOME": str(tmp_path)}
    done = run(sys.executable, "-m", "immich_ml_metal", "version", env=env, cwd=tmp_path)
    assert done.stdout == f"immich-ml-metal {__version__}\n", done.stderr
    code = "import immich_ml_metal.settings as c; print(c.__file__)"
    where = run(sys.executable, "-c", code, env=env, cwd=tmp_path)
    assert where.stdout.startswith(str(tmp_path))


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_a_fresh_install_runs_version_doctor_and_demo(wheel: Path, tmp_path: Path) -> None:
    """As `uv tool install` and `pipx` do it: an empty environment, dependencies from the index."""
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    done = run(str(environment / "bin" / "pip"), "install", "-q", str(wheel), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    program = str(environment / "bin" / "immich-ml-metal")
    home = {"HOME": str(tmp_path), "ML_OFFLINE": "1", "ML_PORT": "1", "COLUMNS": "120"}
    version = run(program, "version", env=home, cwd=tmp_path)
    assert version.stdout == f"immich-ml-metal {__version__}\n", version.stderr
    doctor = run(program, "doctor", env=home, cwd=tmp_path)
    assert doctor.returncode == 1, doctor.stderr
    assert "Fix first: hub" in doctor.stdout  # offline, and nothing is downloaded yet
    assert "not downloaded" in doctor.stdout  # so the service itself did start
    demo = run(program, "demo", env=home, cwd=tmp_path)
    assert demo.returncode == 0, demo.stderr
    assert (tmp_path / "demo-output" / "demo.png").is_file()
