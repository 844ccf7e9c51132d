"""Makes a prepared form: `python -m immich_ml_metal.backends.ort.preparing MODEL FOLDER NAME...`.

A process of its own, so that its peak of memory ends with it and the service never imports `onnx`.
The rewritings start from what the runtime's own basic level makes of the file: it folds constants
and biases in the precision of the file, as the official service does, and so the numbers stay the
same. What they leave is then optimised and packed.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

import onnxruntime as ort

from immich_ml_metal.backends.ort.prepared import GRAPH, PACKING
from immich_ml_metal.backends.ort.session import disabled_optimizers, session_options
from immich_ml_metal.onnx_graph.casts import fold_casts
from immich_ml_metal.onnx_graph.graph import Node
from immich_ml_metal.onnx_graph.reader import read
from immich_ml_metal.onnx_graph.rewriting import rewrite
from immich_ml_metal.onnx_graph.shapes import infer_shapes
from immich_ml_metal.onnx_graph.writer import write

log = logging.getLogger(__name__)

_BASIC, _REWRITTEN = "basic.onnx", "rewritten.onnx"


def write_prepared(path: Path, folder: Path, rewritings: Collection[str]) -> tuple[str, ...]:
    """Leave the rewritten, optimised, packed form of `path` in `folder`; gives what was applied.

    A rewriting that fails is no reason to do without the rest: the form is then that of the file.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        try:
            source, applied = _write_rewritten(path, Path(scratch), rewritings)
            _write_packed(source, folder)
        except Exception:  # whatever it is, the file itself still runs
            log.exception("not rewritten: model=%s", path)
        else:
            return applied
    _write_packed(path, folder)
    return ()


def _write_packed(path: Path, folder: Path) -> None:
    options = session_options(threads=os.cpu_count() or 1)
    for key, value in PACKING.items():
        options.add_session_config_entry(key, value)
    options.optimized_model_filepath = str(folder / GRAPH)
    ort.InferenceSession(
        path,
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=disabled_optimizers(),
    )


def _write_rewritten(
    path: Path, folder: Path, chosen: Collection[str]
) -> tuple[Path, tuple[str, ...]]:
    """Rewrite a model into `folder`; gives the file to go on with, and what was applied.

    Raises:
        LoadFailed: the model has something that cannot be read or written again.
    """
    if not chosen:
        return path, ()
    basic = folder / _BASIC
    _write_basic(path, basic)
    program, applied = rewrite(fold_casts(read(basic)), chosen, infer_shapes, _silent)
    if not applied:
        return path, ()
    write(program, folder / _REWRITTEN)
    return folder / _REWRITTEN, applied


def _write_basic(path: Path, basic: Path) -> None:
    options = session_options(threads=1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(basic)
    beside = "session.optimized_model_external_initializers_"
    options.add_session_config_entry(f"{beside}file_name", f"{basic.name}.weights")
    options.add_session_config_entry(f"{beside}min_size_in_bytes", "1024")
    ort.InferenceSession(
        path,
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=disabled_optimizers(),
    )


def _silent(name: str, node: Node, reason: str) -> None:
    """`python -m immich_ml_metal.onnx_mlx MODEL --why` tells; here it is only done."""


if __name__ == "__main__":
    print(*write_prepared(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))  # noqa: T201
