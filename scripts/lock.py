"""Write `requirements.lock` and `requirements-dev.lock`: universal, hashed, without URLs.

The first is what the service needs, the second adds the development tools on top of the same
versions. The set-up installs from them with plain pip.
"""

import subprocess
import sys

COMMON = [
    *("uv", "pip", "compile", "pyproject.toml", "--universal", "--generate-hashes", "--quiet"),
    *("--python-version", "3.11", "--no-emit-index-url", "--no-header", "--no-annotate"),
    "--upgrade",
]
# hatchling and editables make the editable install work without a network
BUILD = ["--group", "build"]


def main() -> None:
    """Resolve both sets; the second one keeps the versions of the first."""
    run = [sys.executable, "-m", *COMMON]
    subprocess.run([*run, *BUILD, "-o", "requirements.lock"], check=True)
    subprocess.run(
        [*run, *BUILD, "--group", "dev", "-c", "requirements.lock", "-o", "requirements-dev.lock"],
        check=True,
    )


if __name__ == "__main__":
    main()
