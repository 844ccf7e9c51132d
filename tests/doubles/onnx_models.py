"""Tiny ONNX models made in code, and two ways to run them: ours and ONNX Runtime's."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from immich_ml_metal.onnx_graph.graph import Program
from immich_ml_metal.onnx_graph.reader import read
from immich_ml_metal.onnx_mlx.executor import Executor, place
from immich_ml_metal.onnx_mlx.lower import lower
from immich_ml_metal.onnx_mlx.ops.call import to_device

Array = np.ndarray[Any, np.dtype[Any]]
FLOAT, INT32, INT64, UINT8 = (
    TensorProto.FLOAT,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.UINT8,
)


def randn(*shape: int, seed: int = 0) -> Array:
    """Normal float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def scalar(number: float) -> Array:
    return np.array(number, np.float32)


def ints(*values: int) -> Array:
    """An int64 vector."""
    return np.array(values, np.int64)


def value(name: str, kind: int, shape: Sequence[int | str | None] | None) -> onnx.ValueInfoProto:
    """The description of an input or output; no shape means an unknown rank."""
    return helper.make_tensor_value_info(name, kind, shape)


def make_model(
    nodes: Sequence[NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto | str],
    constants: Mapping[str, Array] | None = None,
    opset: int = 19,
) -> ModelProto:
    """A model; outputs given by name alone are float32 of unknown rank."""
    graph = helper.make_graph(
        list(nodes),
        "tiny",
        list(inputs),
        [
            helper.make_tensor_value_info(o, FLOAT, None) if isinstance(o, str) else o
            for o in outputs
        ],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    ir = 8 if opset < 20 else 10
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> NodeProto:
    """A node with space-separated names; `-` stands for an absent input."""
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(op, names, outputs.split(), name=f"{op}:{outputs}", **attributes)


def save(model: ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    """Write the model."""
    path = folder / name
    onnx.save(model, path)
    return path


def lowered(path: Path, skip: Collection[str] = ()) -> Program:
    """The program that runs."""
    return lower(read(path), skip=skip).program


def run_program(
    program: Program, feeds: Mapping[str, Array], dtype: mx.Dtype = mx.float32
) -> list[Array]:
    """Run node by node on MLX."""
    executor = Executor(program, place(program, dtype), dtype)
    results = executor({name: to_device(array, dtype) for name, array in feeds.items()})
    return [
        np.array(r.astype(mx.float32) if mx.issubdtype(r.dtype, mx.floating) else r)
        for r in results
    ]


def run_ours(
    path: Path,
    feeds: Mapping[str, Array],
    dtype: mx.Dtype = mx.float32,
    skip: Collection[str] = (),
) -> list[Array]:
    """Lower the file and run it node by node on MLX."""
    return run_program(lowered(path, skip), feeds, dtype)


def run_ort(model: ModelProto | Path, feeds: Mapping[str, Array]) -> list[Array]:
    """Run on ONNX Runtime."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    source = model if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return [np.asarray(result) for result in session.run(None, dict(feeds))]


def assert_close(ours: Sequence[Array], theirs: Sequence[Array], tolerance: float = 2e-6) -> None:
    """Same shapes, and values equal to rounding, measured against the largest magnitude."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        gap = np.where(
            (a == b) | (np.isnan(a.astype(float)) & np.isnan(b.astype(float))),
            0,
            np.abs(a.astype(np.float64) - b.astype(np.float64)),
        )
        scale = max(float(np.abs(b[np.isfinite(b.astype(float))]).max(initial=0)), 1e-6)
        assert gap.max(initial=0) <= tolerance * scale, f"{gap.max():.3e} of {scale:.3e}"
