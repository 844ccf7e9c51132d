"""The compiled form of a model on disk: a second load maps weights instead of converting them.

One safetensors file, kept as a derived form of the model: the weights as the device wants them, and
in its header the program. The form depends on the weights, the number format, the version of MLX
and of what folds constants, the compiler's own source and what it left out. Safe to delete.
"""

import base64
import functools
import json
import logging
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import onnx

from immich_ml_metal.onnx_files.derived import DerivedForm, source_digest
from immich_ml_metal.onnx_files.protobuf import NotOnnx
from immich_ml_metal.onnx_graph import graph
from immich_ml_metal.onnx_graph.graph import Node, Program
from immich_ml_metal.onnx_mlx.formats import NumberFormat
from immich_ml_metal.onnx_mlx.lower import Lowered
from immich_ml_metal.onnx_mlx.ops.call import Value
from immich_ml_metal.types import Tensor, TensorSpec

log = logging.getLogger(__name__)

FOLDER = "mlx"
FILE = "model.safetensors"


class Prepared:
    """The prepared form of one model in one number format."""

    def __init__(
        self, model: Path, number_format: NumberFormat, skip: Collection[str] = ()
    ) -> None:
        libraries = f"mlx{metadata.version('mlx')}-onnx{onnx.__version__}"
        version = "-".join([libraries, compiler_digest(), *(f"no_{name}" for name in sorted(skip))])
        self._form = DerivedForm(model, FOLDER, version=version, variant=str(number_format))

    def load(self) -> tuple[Lowered, dict[str, Value]] | None:
        """The program and its constants, on the device; None if there is no good form."""
        try:
            found = self._form.find()
        except (OSError, NotOnnx):
            return None  # the reader tells what is wrong with the model
        if found is None:
            return None
        try:
            arrays, header = _read(found / FILE)
            lowered, constants = _decode(json.loads(header["program"]))
            mx.eval(arrays)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as exc:
            log.warning("prepared weights thrown away: folder=%s reason=%s", found, exc)
            self._form.discard(found)
            return None
        return lowered, {**constants, **arrays}

    def save(self, lowered: Lowered, constants: Mapping[str, Value]) -> None:
        """Write the form in place of an older one.

        A folder that cannot be written is no reason to fail: the model is loaded already.
        """
        arrays = {name: v for name, v in constants.items() if isinstance(v, mx.array)}
        header = {"program": json.dumps(_encode(lowered, constants))}
        try:
            folder = self._form.make(
                lambda staging: mx.save_safetensors(str(staging / FILE), arrays, header)
            )
        except (OSError, RuntimeError, NotOnnx) as exc:  # MLX reports a full disk as RuntimeError
            log.warning("weights not prepared: model=%s reason=%s", self._form.model, exc)
        else:
            log.info("weights prepared: folder=%s", folder)


@functools.cache
def compiler_digest() -> str:
    """Digest of the compiler's source: another compiler may make another program."""
    return source_digest(Path(__file__).parent, Path(graph.__file__).parent)


def _read(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The arrays, not yet read, and the header."""
    loaded: Any = mx.load(str(path), return_metadata=True)  # Any: the type depends on the format
    arrays, header = loaded
    return arrays, header


# -- the program as JSON --------------------------------------------------------------------------


def _encode(lowered: Lowered, constants: Mapping[str, Value]) -> dict[str, Any]:
    program = lowered.program
    known = {name: v for name, v in constants.items() if not isinstance(v, mx.array)}
    return {
        "name": program.name,
        "opset": program.opset,
        "metadata": dict(program.metadata),
        "inputs": [_encode_spec(spec) for spec in program.inputs],
        "outputs": [_encode_spec(spec) for spec in program.outputs],
        "nodes": [_encode_node(node) for node in program.nodes],
        "constants": {name: _encode_value(value) for name, value in known.items()},
        "batched": lowered.batched,
        "reason": lowered.reason,
        "fused": dict(lowered.fused),
    }


def _decode(record: Mapping[str, Any]) -> tuple[Lowered, dict[str, Value]]:
    constants: dict[str, Tensor] = {n: _decode_value(v) for n, v in record["constants"].items()}
    program = Program(
        record["name"],
        tuple(_decode_node(node) for node in record["nodes"]),
        constants,
        tuple(_decode_spec(spec) for spec in record["inputs"]),
        tuple(_decode_spec(spec) for spec in record["outputs"]),
        record["opset"],
        record["metadata"],
    )
    lowered = Lowered(program, record["batched"], record["reason"], record["fused"])
    return lowered, dict(constants)


def _encode_spec(spec: TensorSpec) -> list[Any]:
    return [spec.name, spec.dtype.str, list(spec.shape)]


def _decode_spec(record: list[Any]) -> TensorSpec:
    return TensorSpec(record[0], np.dtype(record[1]), tuple(record[2]))


def _encode_node(node: Node) -> list[Any]:
    attributes = {key: _encode_value(value) for key, value in node.attributes.items()}
    return [node.op, node.inputs, node.outputs, attributes, node.name]


def _decode_node(record: list[Any]) -> Node:
    op, inputs, outputs, attributes, name = record
    decoded = {key: _decode_value(value) for key, value in attributes.items()}
    return Node(op, tuple(inputs), tuple(outputs), decoded, name)


def _encode_value(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        content = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"dtype": value.dtype.str, "shape": value.shape, "content": content}
    return value


def _decode_value(value: Any) -> Any:
    if isinstance(value, dict):
        content = np.frombuffer(base64.b64decode(value["content"]), np.dtype(value["dtype"]))
        return content.reshape(value["shape"])
    return tuple(value) if isinstance(value, list) else value
