"""Run every command of README.md and docs/*.md as it is written, and compare what pages show.

Each `sh` block is one shell of somebody who copies its lines; a `console` block is the same, with
what it prints below. `...` stands for words or lines left out. Times, sizes, versions, addresses
and process numbers may differ, words may not. What cannot run here is in NOT_HERE, with its reason.
`make run-docs`; `python scripts/run_docs.py --page docs/start.md` runs one page.

Needs Linux with namespaces (root, or user namespaces) and the test models of ../shared.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import docs_scene
from doc_blocks import ROOT, Block, blocks, commands

TRIED = "by `make try-install`, in an empty Debian"
RUN = ("sh", "console")  # kinds of blocks
HUB = "the hub is not reached from the scene"
NOT_HERE = {
    "uv tool install immich-ml-metal": TRIED,
    "pipx install immich-ml-metal": TRIED,
    "python3 -m venv ~/immich-ml": TRIED,
    "~/immich-ml/bin/pip install --require-hashes -r requirements.lock": TRIED,
    "~/immich-ml/bin/pip install --no-deps immich_ml_metal-*.whl": TRIED,
    "~/immich-ml/bin/immich-ml-metal serve": TRIED,
    "uv tool upgrade immich-ml-metal": "nothing is released yet",
    "immich-ml-metal models pull ViT-B-16-SigLIP2__webli buffalo_l": HUB,
    "immich-ml-metal models pull --all-faces": HUB,
    "immich-ml-metal models verify --online": HUB,
    "immich-ml-metal models import buffalo_l.zip": "the pack is InsightFace's",
    "immich-ml-metal bench --import-only --rounds 4 --against http://docker-host:3003 PHOTOS": (
        "it wants a quiet machine for an hour"
    ),
    "make test": "it is the whole test suite",
    "make check": "it is the linters and type checkers",
    "make fmt": "it is the formatter",
}
# Commands that are right to end with 1.
SAY_NO = {
    ".venv/bin/immich-ml-metal doctor": "no model is here yet, and the scene has no way to the hub",
}
IMMICH = {"ML_IMMICH_URL": "http://nas:2283", "ML_IMMICH_API_KEY": docs_scene.IMMICH_KEY}
BARE = ":".join(docs_scene.PROGRAMS.split(":")[2:])  # nothing of ours is on the path yet
# What readers of a page have set by then.
SET_ON = {"README.md": {"PATH": f"{docs_scene.HOME}/stand-ins:{BARE}"}, "guard.md": IMMICH}
# Pages that are read before the service is installed, or want an idle machine.
WITHOUT_SERVICE = ("README.md", "start.md", "engines.md", "models.md", "performance.md")
FRESH = "README.md"  # it shows what a new installation prints, without a model
GOES_ON = re.compile(r"\bserve\b(?!.*--help)|logs -f|--watch|^haproxy")  # until somebody stops it
LOOK_S = 4.0  # at what goes on
LIMIT_S = 600.0
URL = "http://127.0.0.1:{port}/ping"
_MEASURED = re.compile(
    r"\d[\d,]*\.\d[\d.]*|\d[\d,]*(?= ?(?:ms|s|min|MB|GB|kB|B|%|x)\b)"
    r"|(?<=process )\d+|(?<=:)\d{5}\b|\d+(?=\s+right:)"
)


def main() -> None:
    """Run all pages; exit 1 with what differs."""
    scratch = docs_scene.enter()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="append", help="only this one; repeat it")
    parser.add_argument("--models", type=Path, help="a cache with Immich's usual models")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    models = chosen.models or docs_scene.make_models(scratch / "models")
    with docs_scene.scene(scratch, models) as variables:
        runner = Runner(variables)
        for page in pages(chosen.page):
            runner.run_page(page)
    stale = sorted(set(NOT_HERE) - runner.left_out) if not chosen.page else []
    runner.wrong += [f"NOT_HERE names what no page says: {line}" for line in stale]
    print(f"{runner.count} commands run, {len(runner.left_out)} left out, each with its reason")
    if runner.wrong:
        sys.exit("\n\n".join(runner.wrong))


def pages(names: list[str] | None) -> list[Path]:
    """README, then the others in the order in which docs/README.md has them."""
    listed = re.findall(r"\]\((\w[\w-]*\.md)", (ROOT / "docs/README.md").read_text())
    docs = [ROOT / "docs" / name for name in dict.fromkeys(listed)]
    every = [ROOT / "README.md", *docs, ROOT / "CONTRIBUTING.md"]
    return [page for page in every if not names or str(page.relative_to(ROOT)) in names]


class Runner:
    """Runs pages and keeps what was not as written."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables
        self.wrong: list[str] = []
        self.left_out: set[str] = set()
        self.count = 0

    def run_page(self, page: Path) -> None:
        """Every block of it, in order."""
        found = [block for block in blocks(page) if block.kind in RUN]
        docs_scene.show_models(wanted=page.name != FRESH)
        if found and page.name not in WITHOUT_SERVICE:
            self._prepare("immich-ml-metal service install")
        for block in found:
            shell = Shell({**self._variables, **SET_ON.get(page.name, {})})
            try:
                for line, shown in lines(block):
                    self._run_line(shell, block, line, shown)
            finally:
                shell.close()

    def _run_line(self, shell: "Shell", block: Block, line: str, shown: str | None) -> None:
        if line in NOT_HERE:
            self.left_out.add(line)
            return
        begun_s = time.monotonic()
        code, printed = shell.run(line)
        self.count += 1
        where = f"{block.page.relative_to(ROOT)}:{block.line}: {line}"
        print(f"{time.monotonic() - begun_s:6.1f} s  {where}", flush=True)
        if shown is None and code not in ((0, 1) if line in SAY_NO else (0,)):
            self.wrong.append(f"{where}\nended with {code}:\n{printed}")
        elif shown is not None and not agrees(shown, printed):
            self.wrong.append(f"{where}\n-- shown\n{shown}\n-- printed\n{printed}")

    def _prepare(self, line: str) -> None:
        shell = Shell(self._variables)
        code, printed = shell.run(line)
        if code:
            self.wrong.append(f"{line} (before a page) ended with {code}:\n{printed}")


def lines(block: Block) -> Iterator[tuple[str, str | None]]:
    """Each command of a block with what the page shows below it; None where it shows nothing."""
    if block.kind == "sh":
        yield from ((line, None) for line in commands(block))
        return
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        line, _, shown = part.partition("\n")
        yield line, shown


class Shell:
    """What somebody types into one window: variables stay, what goes on is stopped at the end."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = dict(variables)
        self._going_on: list[subprocess.Popen[str]] = []
        self._code = 0

    def run(self, line: str) -> tuple[int, str]:
        """Run one line; its exit code and all it printed."""
        if line.startswith("export "):
            name, _, value = line.removeprefix("export ").partition("=")
            self._variables[name] = value
            return 0, ""
        if line == "echo $?":
            return 0, f"{self._code}\n"
        child = subprocess.Popen(
            ["sh", "-c", line],
            cwd=docs_scene.CHECKOUT,
            env=self._variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        if GOES_ON.search(line):
            return self._let_go_on(line, child)
        try:
            printed, _ = child.communicate("y\n", timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            return -1, f"it went on for more than {LIMIT_S:.0f} s"
        self._code = child.returncode
        if re.search(r"service (install|start|restart)$", line) and self._code == 0:
            docs_scene.wait_for(URL.format(port=3003))
        return self._code, printed

    def _let_go_on(self, line: str, child: "subprocess.Popen[str]") -> tuple[int, str]:
        if "serve" not in line:
            time.sleep(LOOK_S)
            self._going_on.append(child)
            return self.close()
        port = re.search(r"ML_PORT=(\d+)", line)
        self._going_on.append(child)
        try:
            docs_scene.wait_for(URL.format(port=port[1] if port else 3003))
        except TimeoutError:
            _, printed = self.close()
            return 1, printed
        return 0, ""

    def close(self) -> tuple[int, str]:
        """Press Ctrl-C in what still goes on; the code and words of the last."""
        code, printed = 0, ""
        for child in self._going_on:
            os.killpg(child.pid, signal.SIGINT)
            printed, _ = child.communicate(timeout=60)
            code = 0 if child.returncode in (-signal.SIGINT, 130) else child.returncode
        self._going_on.clear()
        return code, printed


def agrees(shown: str, printed: str) -> bool:
    """Whether a page shows what was printed, but for times and what `...` leaves out."""
    words = [re.escape(word) for word in plain(shown)]
    pattern = r"\s".join(words).replace(r"\s".join([re.escape("...")]), r"\S*(?:\s\S+)*?")
    return re.fullmatch(pattern, " ".join(plain(printed))) is not None


def plain(text: str) -> list[str]:
    """The words of a text, with everything that is measured as `#`."""
    return _MEASURED.sub("#", text).split()


if __name__ == "__main__":
    main()
