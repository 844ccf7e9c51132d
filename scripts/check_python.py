"""Whether this Python can run the service: what `make` asks before it installs anything.

Standard library only, and readable by any Python 3.
"""

import platform
import subprocess
import sys

REMEDY = (
    "with uv: `arch -arm64 uv venv --seed --python cpython-3.13-macos-aarch64 .venv`, "
    "then make again"
)


def problem(system: str, machine: str, *, on_apple_silicon: bool) -> str:
    """What is wrong with a Python on this system, with the remedy; empty when nothing is."""
    if system != "Darwin" or machine == "arm64":
        return ""
    if on_apple_silicon:
        return (
            f"this Python is an Intel one under Rosetta; a native (arm64) one is needed. {REMEDY}"
        )
    return "Intel Macs are not supported: ONNX Runtime has no package for them"


def has_apple_silicon() -> bool:
    """Whether the processor is Apple's, also when Rosetta says otherwise."""
    command = ["sysctl", "-n", "hw.optional.arm64"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return False
    return done.stdout.strip() == "1"


def main() -> None:
    """Say what is wrong and end with 1, or end quietly."""
    found = problem(platform.system(), platform.machine(), on_apple_silicon=has_apple_silicon())
    if found:
        sys.exit(f"{sys.executable}: {found}")


if __name__ == "__main__":
    main()
