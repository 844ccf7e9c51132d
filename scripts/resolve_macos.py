"""Resolve the whole dependency set for macOS on Apple Silicon, from any machine.

For each supported Python, with every package as a wheel, so that a release that a Mac could not
install is found on Linux. Also refuses a mix of PyObjC versions. Writes nothing.

    python scripts/resolve_macos.py [3.11 3.12 ...]
"""

import os
import re
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
OLDEST_MACOS = "14.0"  # of MLX's wheels; uv would assume 13 and find none
PLATFORM = "aarch64-apple-darwin"
NEEDED = ("mlx", "mlx-metal", "onnxruntime", "pyobjc-framework-vision", "pyobjc-framework-quartz")


def resolve(python: str) -> dict[str, str]:
    """Give package → version as a Mac with this Python would install them."""
    command = [
        *(sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"),
        *("--python-platform", PLATFORM, "--python-version", python, "--only-binary", ":all:"),
        *("--no-emit-index-url", str(ROOT / "pyproject.toml")),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MACOSX_DEPLOYMENT_TARGET": OLDEST_MACOS},
    )
    if done.returncode != 0:
        raise SystemExit(f"Python {python} on macOS {OLDEST_MACOS}: {done.stderr.strip()}")
    pinned = re.findall(r"^([\w.-]+)==([\w.]+)", done.stdout, re.MULTILINE)
    return {name.lower(): version for name, version in pinned}


def problems(python: str, versions: dict[str, str]) -> list[str]:
    """Say what is wrong with a resolved set."""
    missing = [f"Python {python}: {name} is missing" for name in NEEDED if name not in versions]
    pyobjc = {name: version for name, version in versions.items() if name.startswith("pyobjc")}
    if len(set(pyobjc.values())) > 1:
        missing.append(f"Python {python}: PyObjC versions are mixed: {pyobjc}")
    return missing


def supported() -> tuple[str, ...]:
    """Give the Pythons that the classifiers promise."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    promised = (re.search(r"Python :: (3\.\d+)$", entry) for entry in project["classifiers"])
    return tuple(found[1] for found in promised if found)


def main() -> None:
    """Resolve each Python; exit 1 and say why when one does not work."""
    wrong: list[str] = []
    pythons = sys.argv[1:] or supported()
    with ThreadPoolExecutor() as threads:  # each waits for the package index, and for little else
        resolved = list(threads.map(resolve, pythons))
    for python, versions in zip(pythons, resolved, strict=True):
        wrong += problems(python, versions)
        pyobjc = versions.get("pyobjc-framework-vision")
        print(
            f"Python {python}: {len(versions)} packages, mlx {versions.get('mlx')}, pyobjc {pyobjc}"
        )
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
