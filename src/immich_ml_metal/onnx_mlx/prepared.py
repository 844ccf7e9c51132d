"""The compiled form of a model on disk: a second load maps weights instead of converting them.

One safetensors file beside the model, in a folder of its own: the weights as the device wants them,
and in its header the program and a key made of the model's digest, the number format and the
compiler's own source. Anything that does not match is ignored and replaced. Safe to delete.
"""

import base64
import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from immich_ml_metal.onnx_mlx.graph import Node, Program
from immich_ml_metal.onnx_mlx.lower import Lowered
from immich_ml_metal.onnx_mlx.ops.call import Value
from immich_ml_metal.onnx_mlx.reader import external_files
from immich_ml_metal.types import Tensor, TensorSpec

log = logging.getLogger(__name__)

FOLDER = "mlx"
READABLE = 0o644  # by every user, like the model


class Prepared:
    """The prepared form of one model in one number format."""

    def __init__(self, model: Path, dtype: mx.Dtype) -> None:
        self._model = model
        format_name = str(dtype).rsplit(".", maxsplit=1)[-1]
        self.path = model.parent / FOLDER / f"{model.stem}-{format_name}.safetensors"
        self._format = format_name

    def load(self) -> tuple[Lowered, dict[str, Value]] | None:
        """The program and its constants, on the device; None if there is no good file."""
        if not self.path.is_file():
            return None
        try:
            arrays, header = _read(self.path)  # refuses a file shorter than its header says
            if header["key"] != self._key(json.loads(header["sources"])):
                return None
            lowered, constants = _decode(json.loads(header["program"]))
            mx.eval(arrays)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as exc:
            log.warning("prepared weights ignored: path=%s reason=%s", self.path, exc)
            return None
        return lowered, {**constants, **arrays}

    def save(self, lowered: Lowered, constants: Mapping[str, Value]) -> None:
        """Write the file, replacing an older one at once or not at all.

        A folder that cannot be written is no reason to fail: the model is loaded already.
        """
        arrays = {name: v for name, v in constants.items() if isinstance(v, mx.array)}
        try:
            sources = [self._model.name, *(file.name for file in external_files(self._model))]
            header = {
                "key": self._key(sources),
                "sources": json.dumps(sources),
                "program": json.dumps(_encode(lowered, constants)),
            }
            self.path.parent.mkdir(exist_ok=True)
            handle, name = tempfile.mkstemp(suffix=".safetensors", dir=self.path.parent)
            os.close(handle)
            staged = Path(name)
            try:
                mx.save_safetensors(str(staged), arrays, header)
                _flush(staged)
                staged.chmod(READABLE)
                staged.replace(self.path)
            finally:
                staged.unlink(missing_ok=True)
        except (OSError, RuntimeError) as exc:  # MLX reports a full disk as RuntimeError
            log.warning("weights not prepared: path=%s reason=%s", self.path, exc)
        else:
            log.info("weights prepared: path=%s", self.path)

    def _key(self, sources: list[str]) -> str:
        """What the file depends on: the content of the sources, the format, this compiler.

        The list of sources may come from the prepared file itself: it can only change with the
        model file, which is always one of them.
        """
        digest = hashlib.sha256(f"{self._format} {compiler_digest()}".encode())
        for name in sources:
            with (self._model.parent / name).open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


@functools.cache
def compiler_digest() -> str:
    """Digest of the compiler's source: another compiler may make another program."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _read(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The arrays, not yet read, and the header."""
    loaded: Any = mx.load(str(path), return_metadata=True)  # Any: the type depends on the format
    arrays, header = loaded
    return arrays, header


def _flush(path: Path) -> None:
    """Bring the content to the disk before the name: a power cut must not leave a hollow file."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


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
