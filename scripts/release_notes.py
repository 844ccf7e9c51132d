"""Print what CHANGELOG says of one version: `python scripts/release_notes.py 0.1.0`."""

import re
import sys
from pathlib import Path


def notes_of(version: str, changelog: str) -> str:
    """Give the section of `version`, without its heading.

    Raises:
        LookupError: there is no such section, or it is empty.
    """
    section = rf"^## \[{re.escape(version)}\][^\n]*\n(.*?)(?=^## \[|\Z)"
    found = re.search(section, changelog, re.MULTILINE | re.DOTALL)
    if found is None or not found[1].strip():
        raise LookupError(f"CHANGELOG.md says nothing of {version}")
    return found[1].strip()


if __name__ == "__main__":
    print(notes_of(sys.argv[1], (Path(__file__).parent.parent / "CHANGELOG.md").read_text()))
