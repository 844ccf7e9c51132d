"""The pages say what is so: no setting, command, series, link or path that is not there."""

import importlib.util
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from doc_blocks import blocks, commands
from doubles.live import VISUAL, predict
from doubles.tiny_models import draw_faces
from run_docs import NOT_HERE, RUN, agrees

from immich_ml_metal.client.own_service import running_service
from immich_ml_metal.settings import Settings, env_names

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
HISTORY = ROOT / "CHANGELOG.md"  # names what is gone
LIVE = [page for page in PAGES if page != HISTORY]
SOURCES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py")])
WRITTEN_BY_USE = {"demo-output/demo.png", "c.toml", "config.toml"}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def reference() -> ModuleType:
    """The script that writes the reference page."""
    spec = importlib.util.spec_from_file_location("r", ROOT / "scripts" / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- the reference, and what other pages say beside it ---------------------------------------------


def test_the_reference_is_what_the_code_says() -> None:
    same = text_of(ROOT / "docs" / "reference.md") == reference().render()
    assert same, "docs/reference.md is not what the code says now; run: make reference"


def test_no_page_names_a_setting_that_is_gone() -> None:
    known = {name for field in Settings.model_fields.values() for name in env_names(field)}
    known |= {"ML_CONFIG_FILE"}
    for page in LIVE:
        named = set(re.findall(r"\bML_[A-Z][A-Z0-9_]*\b", text_of(page)))
        patterns = {name for name in named if name.endswith("_")}  # `ML_PRELOAD_*`
        unknown = {n for n in named - patterns if n not in known}
        unknown |= {n for n in patterns if not any(k.startswith(n) for k in known)}
        unknown -= {"ML_PROT"}  # the misspelling that an example shows
        assert unknown == set(), name_of(page)


def calls(page: Path) -> list[list[str]]:
    """The words after the program's name, in code spans and blocks, up to a pipe or remark."""
    text = text_of(page)
    blocks = re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", without_code(text))
    lines = [line for block in blocks for line in block.splitlines()] + spans
    found = re.findall(
        r"(?:^|[ /])immich-ml-metal +([a-z][^|#>\n]*)", "\n".join(lines), re.MULTILINE
    )
    return [words.split() for words in found]


def test_no_page_names_a_command_or_option_that_is_gone() -> None:
    commands = reference().commands()
    options = {name: options_of(command) for name, command in commands.items()}
    options |= {"immich-ml-metal version": set()}
    groups = {name.rpartition(" ")[0] for name in options} - {"immich-ml-metal"}
    for page in LIVE:
        for words in calls(page):
            depth = 2 if f"immich-ml-metal {words[0]}" in groups else 1
            name = " ".join(["immich-ml-metal", *words[:depth]])
            assert name in options or name in groups, f"{name_of(page)}: no command {name!r}"
            given = {word.partition("=")[0] for word in words if word.startswith("--")}
            gone = given - options.get(name, set()) - {"--help"}
            assert gone == set(), f"{name_of(page)}: {name} has no {sorted(gone)}"


def test_what_pages_let_people_type_stands_in_blocks_that_run_docs_runs() -> None:
    typed = re.compile(r"^\$? ?(immich-ml-metal|make|python|uv|pipx) ", re.MULTILINE)
    found = [block for page in LIVE for block in blocks(page) if block.kind not in RUN]
    assert [block for block in found if typed.search(block.text)] == []


def test_what_run_docs_leaves_out_is_on_a_page_with_a_reason() -> None:
    shown = [line for page in LIVE for b in blocks(page) if b.kind == "sh" for line in commands(b)]
    assert set(NOT_HERE) - set(shown) == set()
    assert all(NOT_HERE.values())


def test_an_output_that_differs_in_more_than_measures_does_not_agree() -> None:
    assert agrees("4 lines in 5 ms\n ...\n end", "4 lines in 77 ms\nmore\nand more\nend\n")
    for other in ("5 lines in 5 ms\nx\nend", "4 lines in 5 ms\nend", "4 lines in 5 ms\nx\nend x"):
        assert not agrees("4 lines in 5 ms\n...\nend", other)


def options_of(command: Any) -> set[str]:
    return {name for param in command.params for name in (*param.opts, *param.secondary_opts)}


def test_no_page_names_a_series_that_is_gone() -> None:
    known = set(reference().families(None))
    for page in LIVE:
        named = set(re.findall(r"\bimmich_ml_(?!metal)[a-z_]+", text_of(page)))
        bases = {re.sub(r"_(bucket|count|sum)$", "", name) for name in named}
        assert {name for name in bases - known if not name.endswith("_")} <= {"immich_ml"}, page


# -- /health ---------------------------------------------------------------------------------------


def fields(value: Any, path: str = "") -> set[str]:
    """Dotted names of every field; what has names of its own choice ends in `*`."""
    if isinstance(value, list):
        return {path} if not value else set.union(*(fields(each, f"{path}[]") for each in value))
    if not isinstance(value, dict):
        return {path}
    if any("/" in name for name in value):
        return set.union(*(fields(each, f"{path}.*") for each in value.values()))
    found = {path} if not value else set()
    for name, each in value.items():
        found |= fields(each, f"{path}.{name}".lstrip("."))
    return found


def documented_fields() -> set[str]:
    page = text_of(ROOT / "docs" / "health.md")
    return set(re.findall(r"^\| `([\w.*\[\]]+)`", page, re.MULTILINE))


def test_every_field_of_health_is_documented_and_none_is_gone(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ML_OFFLINE", "1")
    monkeypatch.setenv("ML_LOG_LEVEL", "warning")
    with running_service({"--models-dir": str(models)}) as child:
        assert predict(child.url, VISUAL, image=draw_faces((160, 160))).is_success
        seen = fields(httpx.get(f"{child.url}/health").json())
    documented = documented_fields()
    assert seen - documented == set(), "docs/health.md does not explain these"
    assert documented - seen == set(), "docs/health.md explains these, but they are not there"


# -- links, paths, citations -----------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What a code host makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", without_code(text_of(page)), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
    return {title.replace(" ", "-") for title in plain}


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = without_code(text_of(page))
    pictures = re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for target in [*re.findall(r"\]\(([^)\s]+)\)", text), *pictures]:
        if target.startswith(("http://", "https://")):
            continue
        place, _, anchor = target.partition("#")
        there = (page.parent / place).resolve() if place else page
        assert there.exists(), f"{target} is not there"
        if anchor:
            assert anchor in anchors(there), f"{place or page.name} has no heading for #{anchor}"


def test_every_picture_is_shown_and_has_words_for_those_who_do_not_see_it() -> None:
    text = "\n".join(map(text_of, LIVE))
    told = {name: words for words, name in re.findall(r"!\[([^\]]*)\]\(.*?([\w-]+\.png)\)", text)}
    told |= dict(re.findall(r'([\w-]+\.png)" alt="([^"]*)"', text))
    there = {path.name for path in (ROOT / "docs" / "pictures").iterdir()}
    assert {name for name in there if not name.endswith("-dark.png")} == set(told)
    assert all(f"pictures/{name}" in text for name in there)
    assert all(len(words) > 20 for words in told.values())


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text_of(page))
        local = [link for link in links if "://" not in link]
        todo += [(page.parent / link).resolve() for link in local]
    assert {name_of(page) for page in LIVE} - {name_of(page) for page in reached} == set()


@pytest.mark.parametrize("page", LIVE, ids=name_of)
def test_every_path_named_is_there(page: Path) -> None:
    homes = (ROOT, ROOT / "src" / "immich_ml_metal", ROOT / "docs", page.parent)
    ends = r"(?:py|md|toml|json|yml|lock|ini|sh|cfg)"
    named = re.findall(rf"`((?:[\w.-]+/)*[\w-]+\.{ends})`", without_code(text_of(page)))
    named += re.findall(
        r"`((?:src|tests|scripts|docs|deploy|gateway|worker|backends)/[\w/]*)`", text_of(page)
    )
    missing = [name for name in named if not any((home / name).exists() for home in homes)]
    assert set(missing) - NOT_OURS == set()


# Files of Immich's cache, of models and of users, which pages speak of.
NOT_OURS = {
    *("config.json", "preprocess_cfg.json", "tokenizer.json", "tokenizer_config.json"),
    *("manifest.json", "config.toml"),
}


def test_every_citation_of_the_contract_names_a_section_that_exists() -> None:
    page = text_of(ROOT / "docs" / "contract.md")
    sections = set(re.findall(r"^#+ (\d+(?:\.\d+)*)", page, re.MULTILINE))
    for path in [*SOURCES, ROOT / "src" / "immich_ml_metal" / "catalog.toml"]:
        for cited in re.findall(r"contract(?:,)? ([^)\n]*)", text_of(path)):
            for section in re.findall(r"§\s?([\d.]*\d)", cited):
                assert section in sections, f"{name_of(path)} cites §{section} of docs/contract.md"


def test_the_gateways_page_lists_its_modules() -> None:
    page = (
        text_of(ROOT / "docs" / "gateway.md")
        .partition("## How it is built")[2]
        .partition("\n## ")[0]
    )
    first_cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    modules = {path.stem for path in (ROOT / "src/immich_ml_metal/gateway").glob("[!_]*.py")}
    assert named == modules


def test_every_workaround_is_listed_with_what_retires_it() -> None:
    rows = re.findall(r"^\| `([\w/.]+)` \| .* \| .* \|$", workarounds(), re.MULTILINE)
    files = [*(ROOT / "src").rglob("*.py"), ROOT / "pyproject.toml"]
    counts = {
        path.relative_to(
            ROOT / "src" / "immich_ml_metal" if path.suffix == ".py" else ROOT
        ).as_posix(): len(re.findall(r"\bgoes\s+when\b", text_of(path), re.IGNORECASE))
        for path in files
    }
    assert {name: rows.count(name) for name in rows} == {n: c for n, c in counts.items() if c}


def workarounds() -> str:
    return text_of(ROOT / "docs" / "maintain.md").partition("## Workarounds")[2]


def test_every_page_keeps_to_one_word_for_each_process() -> None:
    """The child is the worker; an engine is a way to run a model."""
    words = r"engine (?:process|app)|the engine (?:dies|died|crashes|restarts|hangs)|neural worker"
    wrong = re.compile(words, re.I)
    deployed = (file for file in (ROOT / "deploy").rglob("*") if file.is_file())
    for page in {*LIVE, *SOURCES, *deployed} - {Path(__file__)}:
        assert wrong.findall(text_of(page)) == [], name_of(page)
