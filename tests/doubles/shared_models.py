"""The models of ../shared in the layout of Immich's cache, built once for a machine."""

import hashlib
import importlib.util
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx
import pytest
from filelock import FileLock
from onnx import helper

OTHER_FACES = "buffalo_m"
SHARED = Path(__file__).parents[3] / "shared"


def make_shared_models(shared: Path) -> Path:
    """Build the folder unless it is in this machine's temporary folder already. Read-only."""
    maker = shared / "models" / "make_cache.py"
    key = hashlib.sha256(maker.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"immich-ml-metal-test-models-{key}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            staging = Path(f"{folder}.new")
            shutil.rmtree(staging, ignore_errors=True)
            subprocess.run([sys.executable, maker, staging], check=True, timeout=280)
            add_second_face_model(staging / "facial-recognition")
            staging.rename(folder)
    return folder


def add_second_face_model(faces: Path) -> None:
    """The same detector, and a recogniser whose vectors are those of the first, negated."""
    shutil.copytree(faces / "buffalo_s", faces / OTHER_FACES)
    path = faces / OTHER_FACES / "recognition" / "model.onnx"
    model = onnx.load(path)
    (output,) = model.graph.output
    for node in model.graph.node:
        node.output[:] = ["positive" if name == output.name else name for name in node.output]
    model.graph.node.append(helper.make_node("Neg", ["positive"], [output.name]))
    onnx.save(model, path)


def find_graph(name: str, folder: Path) -> Path:
    """The graph: hydrated into `folder`, real, or from the rapidocr wheel. Skips if not there."""
    graphs, real = SHARED / "models" / "graphs", SHARED / "models" / "real"
    if (real / f"{name}.onnx").is_file():
        return real / f"{name}.onnx"
    if (graphs / f"{name}.onnx.gz").is_file():
        hydrate = runpy.run_path(str(SHARED / "models" / "hydrate.py"))["hydrate"]
        hydrate(graphs / f"{name}.onnx.gz", folder / f"{name}.onnx")
        return folder / f"{name}.onnx"
    wheel = importlib.util.find_spec("rapidocr")
    for place in wheel.submodule_search_locations or [] if wheel else []:
        if (file := Path(place) / "models" / f"{name}.onnx").is_file():
            return file
    pytest.skip(f"{name} is neither in {SHARED} nor in an installed rapidocr")
