"""Commands as pages write them: the blocks of Markdown, and the lines that a person would copy."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>\w*)$")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block; `line` is that of its first line in the page, from 1."""

    page: Path
    line: int
    kind: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """Every fenced block of a page, in order, without its indentation."""
    kind: str | None = None
    inside: list[str] = []
    indent = start = 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line.replace("2. ```", "   ```"))
        if fence is None:
            inside.append(line[indent:])
        elif kind is None:
            kind, inside, start, indent = fence["kind"], [], number + 1, len(fence["indent"])
        else:
            yield Block(page, start, kind, "\n".join(inside) + "\n")
            kind = None


def commands(block: Block) -> list[str]:
    """What a person copies from a `sh` block: its lines, without remarks."""
    lines = [re.sub(r"(^|\s+)#.*", "", line) for line in block.text.splitlines()]
    return [line for line in lines if line.strip()]


def lines_of(page: str, heading: str) -> list[str]:
    """The commands of the `sh` blocks below one heading of a page."""
    path = ROOT / page
    lines = path.read_text(encoding="utf-8").splitlines()
    first = lines.index(heading) + 1
    level = heading.partition(" ")[0]
    ends = [n for n, line in enumerate(lines[first:], first + 1) if line.startswith(f"{level} ")]
    last = min(ends, default=len(lines))
    inside = [b for b in blocks(path) if b.kind == "sh" and first < b.line <= last]
    return [command for block in inside for command in commands(block)]
