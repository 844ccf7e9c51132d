"""Every command's help and main outputs, word for word, with exit codes; see doubles.snapshots."""

import platform
import re
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from doubles import snapshots
from doubles.immich import KEY, ImmichDouble
from doubles.mini_service import MiniService
from doubles.tiny_models import CLIP, FACES, OCR, draw_faces
from typer.core import TyperGroup

from immich_ml_metal import __version__
from immich_ml_metal.cli import COMMANDS, load_command

# One case a line: name of the file, then what is typed. In capitals: what the tests set up.
CASES = """
none                    :
unknown                 : sevre
version                 : version
version-option          : --version
serve-port              : serve --port 70000
serve-no-file           : serve --config /nowhere.toml
demo                    : demo PICTURE --models-dir MODELS --output OUT/demo.png
demo-no-models          : demo PICTURE --models-dir OUT/none --output OUT/demo.png
demo-no-picture         : demo /nowhere.png
doctor                  : doctor --no-test
doctor-json             : doctor --no-test --json
config-check            : config check
config-check-bad        : config check --config BAD
config-show             : config show --config GOOD
config-show-bad         : config show --config /nowhere.toml
config-init             : config init OUT/config.toml
config-init-there       : config init BAD
models-list             : models list --models-dir MODELS --task ocr --language de
models-list-here        : models list --models-dir MODELS --here
models-list-language    : models list --language German
models-info             : models info FACES --models-dir MODELS
models-info-unknown     : models info buffalo_xl
models-verify           : models verify FACES --models-dir MODELS
models-verify-damaged   : models verify --models-dir DAMAGED
models-pull-here        : models pull FACES --models-dir MODELS
models-pull-offline     : models pull antelopev2 --models-dir MODELS
models-pull-nothing     : models pull --models-dir MODELS
models-rm-json          : models rm FACES --models-dir COPY --json
models-rm-refused       : models rm FACES --models-dir COPY
models-rm-absent        : models rm antelopev2 --models-dir COPY
models-rm               : models rm FACES --yes --models-dir COPY
models-accept           : models accept FACES --models-dir MODELS
models-prune            : models prune --models-dir MODELS
models-export           : models export FACES --to OUT/export --models-dir MODELS
models-import           : models import COPY --models-dir OUT/imported
models-import-nothing   : models import OUT/none --models-dir OUT/imported
parity-same             : parity PHOTOS --url MINI --against MINI
parity-people           : parity PHOTOS --url MINI --against OTHER_FACES
parity-unsafe           : parity PHOTOS --url MINI --against OTHER_WEIGHTS
parity-unsafe-json      : parity PHOTOS --url MINI --against OTHER_WEIGHTS --json --task faces
parity-unreachable      : parity PHOTOS --url NOBODY --against MINI
parity-unknown-task     : parity PHOTOS --against MINI --task people
qualify-nonsense        : qualify nonsense --models-dir MODELS
bench-no-models         : bench PHOTOS --models-dir OUT/none
immich-status           : immich status
immich-release          : immich release
immich-requeue          : immich requeue --task ocr
immich-requeue-unknown  : immich requeue --task people
"""
# launchd's words differ, and there is one machine to write them on.
LINUX_CASES = """
service-status          : service status
service-start           : service start
service-logs            : service logs
service-install-print   : service install --print --config GOOD
"""
_NUMBER = r"\d+(?:\.\d+)?"
# What no two machines or runs have alike, for every case.
MASKS = {
    re.escape(__version__): "VERSION",
    rf"{_NUMBER} ms": "N ms",
    r"127\.0\.0\.1:\d+": "127.0.0.1:PORT",
    rf"{_NUMBER}x$": "Nx",  # times as fast
    r'"speed": [\d.]+': '"speed": N',
    rf"^( +-?){_NUMBER}(?=  ')": r"\1N",  # a similarity
    rf"{_NUMBER} k?B\b": "N kB",  # of small models that the tests write
    r'"size_bytes": \d+': '"size_bytes": N',
    r"-?0\.\d{6,}": "0.N",
    r" +│$": " │",  # the frame of an error goes with the length of a path
    "─{9,}": "───",
}
_FOUND = "architecture|system|python|packages|clock|memory|disk|start at boot|address|sleep|logs"
CONFIG_SHOW = {r"(?<=\S) {2,}(?=\S)": "  "}  # columns are as wide as the path of a folder
DOCTOR = {  # what the machine is, is another test's matter
    rf"^ \S+ +({_FOUND})( +).*(\n {{21}}.*)*$": r" ...   \1\2...",
    r'("name": "(?:' + _FOUND + r')",\n +"level": )"\w+"(,\n +"text": ).*(,\n +"fix": ).*(?=,)': (
        r'\1"..."\2"..."\3"..."'
    ),
}


def cases() -> dict[str, list[str]]:
    text = CASES + (LINUX_CASES if platform.system() == "Linux" else "")
    rows = (line.partition(":") for line in text.splitlines() if line)
    return {str(name).strip(): str(words).split() for name, _, words in rows}


def helps() -> dict[str, list[str]]:
    """The name of each command's help, however deep it lies."""
    found: dict[str, list[str]] = {"help": ["--help"], "help-version": ["version", "--help"]}
    for name in COMMANDS:
        found[f"help-{name}"] = [name, "--help"]
        if isinstance(group := load_command(name), TyperGroup):
            found |= {f"help-{name}-{one}": [name, one, "--help"] for one in group.commands}
    return found


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def places(out: Path, models: Path) -> dict[str, str]:
    """What stands in capitals in a case, but for the services."""
    (out / "bad.toml").write_text("face_min_score = 7\n")
    (out / "good.toml").write_text("port = 3003\n")
    (out / "photos").mkdir()
    for name, centre in (("a.png", (160, 160)), ("b.png", (320, 240))):
        (out / "photos" / name).write_bytes(draw_faces(centre))
    (out / "picture.png").write_bytes(draw_faces((160, 160)))
    shutil.copytree(models / "facial-recognition", out / "copy" / "facial-recognition")
    shutil.copytree(out / "copy", out / "damaged")
    for graph in (out / "damaged").rglob("model.onnx"):
        graph.write_bytes(b"<html>")
    with socket.create_server(("127.0.0.1", 0)) as sock:
        nobody = f"http://127.0.0.1:{sock.getsockname()[1]}"
    return {
        "BAD": str(out / "bad.toml"),
        "GOOD": str(out / "good.toml"),
        "OUT": str(out),
        "PHOTOS": str(out / "photos"),
        "PICTURE": str(out / "picture.png"),
        "COPY": str(out / "copy"),
        "DAMAGED": str(out / "damaged"),
        "MODELS": str(models),
        "FACES": FACES,
        "NOBODY": nobody,
    }


@pytest.fixture
def services(loopback: Callable[[Any], str]) -> dict[str, str]:
    other = {"OTHER_FACES": MiniService(face_noise=0.2), "OTHER_WEIGHTS": MiniService(seed=1)}
    made = {"MINI": MiniService(), **other}
    return {name: loopback(service.app) for name, service in made.items()}


@pytest.mark.parametrize("name", cases())
def test_a_command_prints_what_it_printed_before(
    name: str,
    places: dict[str, str],
    loopback: Callable[[Any], str],
    request: Any,
    tmp_path: Path,
) -> None:
    words = cases()[name]
    known = places | {"COPY": str(shutil.copytree(places["COPY"], tmp_path / "copy"))}
    if name.startswith("parity"):
        known |= request.getfixturevalue("services")
    env = {"ML_MODELS_DIR": known["MODELS"], "ML_PORT": "1", "HOME": known["OUT"], "COLUMNS": "400"}
    env |= {"ML_CLIP_MODEL": CLIP, "ML_FACE_MODEL": FACES, "ML_OCR_MODEL": OCR}
    engines = ("CLIP", "FACE_DETECTION", "FACE_RECOGNITION", "OCR")
    env |= {f"ML_{engine}_ENGINE": "cpu" for engine in engines}
    if name.startswith("immich"):
        env |= {"ML_IMMICH_URL": loopback(ImmichDouble().app), "ML_IMMICH_API_KEY": KEY}
    text = snapshots.run(filled(words, known), env, typed="n\n")
    masks = {re.escape(known[one]): one for one in ("MODELS", "COPY", "DAMAGED", "PHOTOS", "OUT")}
    masks |= {re.escape(sys.executable): "PYTHON"}
    masks |= MASKS
    masks |= DOCTOR if name.startswith("doctor") else {}
    masks |= CONFIG_SHOW if name == "config-show" else {}
    snapshots.check(name, text, masks)


def filled(words: list[str], known: dict[str, str]) -> list[str]:
    """The words with what stands in capitals replaced."""
    pattern = re.compile(r"\b(" + "|".join(known) + r")\b")
    return [pattern.sub(lambda found: known[found[0]], word) for word in words]


@pytest.mark.parametrize("name", helps())
def test_a_command_explains_itself_as_before(name: str) -> None:
    snapshots.check(name, snapshots.run(helps()[name], {}), {})


def test_no_snapshot_is_left_of_a_command_that_is_gone() -> None:
    linux = {line.partition(":")[0].strip() for line in LINUX_CASES.strip().splitlines()}
    kept = {file.stem for file in snapshots.FOLDER.glob("*.txt")}
    assert kept == {*cases(), *helps(), *linux}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_says_of_a_command_what_its_own_help_says(name: str) -> None:
    first = str(load_command(name).help).partition("\n\n")[0]
    assert " ".join(first.split()) == COMMANDS[name]
