"""Every export style and family at full size: the rewritten graph against the file, on the CPU.

The weights are random (only their size and range are real), except in `models/real`.
"""

from pathlib import Path

import numpy as np
import pytest
from doubles.shared_models import find_graph

from immich_ml_metal.backends.ort.preparing import write_prepared
from immich_ml_metal.backends.ort.session import OrtGraph, session_options
from immich_ml_metal.onnx_graph.rewriting import REWRITINGS
from immich_ml_metal.types import Tensor

pytestmark = [pytest.mark.shared, pytest.mark.timeout(600)]

# graph → what applies; nothing does where all tokens are averaged or attended to by a pooling head
APPLIED = {
    **{f"ViT-B-32.{style}.visual": "rows" for style in ("ts19", "dynamo19", "dynamo23")},
    **{f"ViT-B-32.{style}.textual": "rows length" for style in ("ts19", "dynamo19", "dynamo23")},
    "SigLIP.depth2.textual": "rows",  # reads its last token, and sees all others
    "XLM-R.depth2.textual": "",
    "SigLIP-B-16.depth2.visual": "",
    "mobilefacenet_512": "",
    "scrfd_500m": "",
    "ppocrv6_tiny_det": "gelu upscaling",
    "ppocrv6_tiny_rec": "gelu",
    "PP-OCRv6_det_small": "upscaling",
    "PP-OCRv6_rec_small": "",
}
# Towers only lose what is not read. In text networks the rounded root of two moves into weights; a
# detector's map of noise, rounded to half precision on its way, moves more than a picture's does.
TOWER, TEXT = 1e-6, 4e-3
WORDS, END = 7, 999


def rows_for(graph: OrtGraph) -> Tensor:
    """One text of seven words, or one picture."""
    (spec,) = graph.inputs
    lengths = [n or (1 if axis == 0 else 96) for axis, n in enumerate(spec.shape)]
    rng = np.random.default_rng(3)
    if spec.dtype.kind == "f":
        return rng.uniform(-1, 1, lengths).astype(spec.dtype)
    text = np.zeros(lengths, spec.dtype)
    text[0, : WORDS + 1] = [*rng.integers(1, 900, WORDS), END]
    return text


@pytest.mark.parametrize("name", APPLIED)
def test_the_rewritten_graph_gives_what_the_file_gives(name: str, tmp_path: Path) -> None:
    path = find_graph(name, tmp_path)
    plain = OrtGraph(path, options=session_options(2))
    applied = write_prepared(path, tmp_path, tuple(REWRITINGS))
    assert " ".join(applied) == APPLIED[name]
    graph = OrtGraph(tmp_path / "model.onnx", options=session_options(2))
    assert graph.metadata.items() >= plain.metadata.items()
    given = rows_for(plain)
    shorter = given[:, : WORDS + 1] if "length" in applied else given
    expected = plain.run({plain.inputs[0].name: given})
    found = graph.run({plain.inputs[0].name: shorter})
    for before, after in zip(expected, found, strict=True):
        limit = TEXT if name.startswith(("ppocr", "PP-OCR")) else TOWER
        assert np.abs(before - after).max() <= limit * np.abs(before).max()
