"""Everything of a release but the publishing: `make release-check`.

Builds the source archive and the wheel, looks into both, installs the wheel with the locked
dependencies into an empty environment and asks it questions there. What a person has still to
decide is listed; with `--strict` (the release workflow) it fails.

    python scripts/release_check.py [--strict] [--dist FOLDER]
"""

import argparse
import email
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAM = "immich-ml-metal"
IN_WHEEL = ("immich_ml_metal/catalog.toml", "immich_ml_metal/py.typed", "licenses/LICENSE")
IN_ARCHIVE = ("pyproject.toml", "requirements.lock", "README.md", "LICENSE", "Makefile")
NEVER = re.compile(r"\.(onnx|safetensors|mlpackage|env|key|pem)$|(^|/)(\.venv|\.git)/")


def main() -> None:
    """Run every step; exit 1 with the list of what is wrong."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--strict", action="store_true", help="what is undecided fails as well")
    options.add_argument("--dist", type=Path, help="keep the built files here")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        dist = chosen.dist or Path(scratch) / "dist"
        undecided = find_undecided()
        say("built", build(dist))
        look_into(dist)
        say("installed", try_wheel(next(dist.glob("*.whl")), Path(scratch) / "empty"))
    for line in undecided:
        print(f"undecided: {line}")
    if undecided and chosen.strict:
        raise SystemExit("a release needs these decided")
    print("release-check: ok" + (", but for what is undecided" if undecided else ""))


def find_undecided() -> list[str]:
    """List what only a person can decide before a release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    changes = (ROOT / "CHANGELOG.md").read_text()
    version = project["version"]
    found = []
    if "urls" not in project:
        found.append("the public address of the repository: [project.urls] in pyproject.toml")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changes, re.MULTILINE):
        found.append(
            f"the date of version {version}: a heading '## [{version}] - DATE' in CHANGELOG"
        )
    return found


def build(dist: Path) -> str:
    """Build both archives with what the lock names; no network."""
    run(sys.executable, "-m", "hatchling", "build", "-d", str(dist))
    return ", ".join(f"{path.name} {path.stat().st_size / 1000:.0f} kB" for path in dist.iterdir())


def look_into(dist: Path) -> None:
    """Everything a user needs is there, and nothing that is nobody's business."""
    wheel, archive = next(dist.glob("*.whl")), next(dist.glob("*.tar.gz"))
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        metadata = email.message_from_bytes(
            opened.read(next(name for name in names if name.endswith("/METADATA")))
        )
    require(wheel.name, names, IN_WHEEL)
    with tarfile.open(archive) as opened:
        require(archive.name, opened.getnames(), IN_ARCHIVE)
    source = (ROOT / "src/immich_ml_metal/__init__.py").read_text()
    assert f'"{metadata["Version"]}"' in source, "pyproject.toml and __init__ name two versions"
    assert "<" in metadata["Requires-Python"], "Requires-Python has no upper end"
    assert len(str(metadata.get_payload())) > 2000, "no long description"


def require(archive: str, names: list[str], wanted: tuple[str, ...]) -> None:
    """Stop when a file is missing or one is there that must not be."""
    missing = [name for name in wanted if not any(path.endswith(name) for path in names)]
    assert not missing, f"{archive} lacks {missing}"
    private = [name for name in names if NEVER.search(name)]
    assert not private, f"{archive} carries {private}"


def try_wheel(wheel: Path, folder: Path) -> str:
    """Install into an empty environment from the lock, then use it with an empty home."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "--require-hashes", "-r", str(ROOT / "requirements.lock"))
    run(*pip, "--no-deps", str(wheel))
    run(str(python), "-m", "pip", "--disable-pip-version-check", "check")
    home = folder / "home"
    home.mkdir()
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "ML_OFFLINE": "1"}
    program = str(folder / "bin" / PROGRAM)
    version = run(program, "version", env=environment).strip()
    run(program, "config", "check", env=environment)
    run(program, "service", "install", "--print", env=environment)
    shown = run(program, "demo", env=environment, cwd=home)
    assert "lines read" in shown, f"text is not read without a download:\n{shown}"
    return version


def run(*command: str, env: dict[str, str] | None = None, cwd: Path = ROOT) -> str:
    """Run a program and give its output; stop with all it said when it fails."""
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def say(step: str, result: str) -> None:
    """One line for a finished step."""
    print(f"{step}: {result}", flush=True)


if __name__ == "__main__":
    main()
