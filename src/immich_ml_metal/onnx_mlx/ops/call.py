"""What an operator's function is given: the node's attributes, its opset, and the precision.

Values are NumPy while they are known without running the network (shapes, indices, constants) and
MLX afterwards. Operators see MLX arrays, except at the positions that their table entry declares.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from immich_ml_metal.onnx_graph.graph import Node
from immich_ml_metal.types import Tensor

Value = Tensor | mx.array
Result = Value | Sequence[Value]
HALF_TYPES = (mx.float16, mx.bfloat16)

_HALF_MAX = {mx.float16: 65504.0, mx.bfloat16: 3.3895314e38}  # largest finite values
_INTEGERS = {"b": mx.int32, "i": mx.int32, "u": mx.uint32}
_SMALL = {"bool": mx.bool_, "uint8": mx.uint8, "int8": mx.int8}


class Unsupported(Exception):
    """The operator, or this form of it, has no translation."""


@dataclass(frozen=True, slots=True)
class Operator:
    """One entry of the operator table.

    Attributes:
        function: called with a `Call` and the node's inputs; None stands for an absent one.
        host: positions of inputs that must be known without running the network (shapes, axes).
        keep_scalars: leave constants of one element in NumPy, so that they take the type of the
            other operand instead of widening it.
        host_result: the outputs are known even if the inputs are not (`Shape`).
        on_device: computed on the device even where all inputs are known: an operator that passes
            make, which ONNX's reference may lack in the opset of the file.
    """

    function: Callable[..., Result]
    host: frozenset[int] = frozenset()
    keep_scalars: bool = False
    host_result: bool = False
    on_device: bool = False

    def is_host(self, position: int) -> bool:
        """Whether the input at `position` has to be a NumPy array."""
        return position in self.host


@dataclass(frozen=True, slots=True)
class Call:
    """One node about to be computed.

    Attributes:
        dtype: the floating type of the network: float32, float16 or bfloat16.
    """

    node: Node
    opset: int
    dtype: mx.Dtype

    def has(self, name: str) -> bool:
        """Whether the attribute is given."""
        return name in self.node.attributes

    def integer(self, name: str, default: int = 0) -> int:
        """An integer attribute."""
        return int(self._get(name, default))

    def number(self, name: str, default: float = 0.0) -> float:
        """A floating attribute."""
        return float(self._get(name, default))

    def text(self, name: str, default: str = "") -> str:
        """A string attribute."""
        return str(self._get(name, default))

    def integers(self, name: str, default: Sequence[int] = ()) -> list[int]:
        """A list of integers."""
        return [int(v) for v in self._get(name, default)]

    def _get(self, name: str, default: Any) -> Any:
        return self.node.attributes.get(name, default)

    def parameter(self, name: str, given: Tensor | None) -> list[int] | None:
        """A list that old opsets keep in an attribute and newer ones in an input."""
        if given is not None:
            return [int(v) for v in np.ravel(given)]
        return self.integers(name) if self.has(name) else None

    @property
    def nhwc(self) -> bool:
        """Whether pictures are channels-last here."""
        return bool(self.integer("nhwc"))


def to_device(value: Tensor, dtype: mx.Dtype) -> mx.array:
    """Bring a NumPy array to MLX: floats as `dtype`, large integers as 32 bits.

    A GPU has no float64 and gains nothing from int64: only token ids, indices and masks get here.
    Values beyond the range saturate (an int64 mask of "everything" stays one), infinities stay.
    """
    if value.dtype.kind == "f":
        return _floats(value, dtype)
    if value.dtype.name in _SMALL:
        return mx.array(value)
    if value.dtype.kind == "i":
        bounds = np.iinfo(np.int32)
        return mx.array(np.clip(value, bounds.min, bounds.max).astype(np.int32))
    if value.dtype.kind == "u":
        return mx.array(np.minimum(value, np.iinfo(np.uint32).max).astype(np.uint32))
    raise Unsupported(f"values of type {value.dtype} have no place on the device")


def _floats(value: Tensor, dtype: mx.Dtype) -> mx.array:
    if value.dtype == np.float16 and dtype not in HALF_TYPES:
        return mx.array(value)  # half the memory; the graph widens what it takes from the table
    limit = _HALF_MAX.get(dtype)
    if limit is not None and value.dtype != np.float16:
        finite = np.clip(value, -limit, limit, dtype=np.float32)
        value = np.where(np.isinf(value), value, finite)
    return mx.array(np.ascontiguousarray(value, np.float32)).astype(dtype)


def device_type(dtype: np.dtype[Any], precision: mx.Dtype) -> mx.Dtype:
    """The MLX type that stands for the ONNX type `dtype` in a network of this precision."""
    if dtype.kind == "f":
        return precision
    if dtype.name in _SMALL:
        return _SMALL[dtype.name]
    if dtype.kind in _INTEGERS:
        return _INTEGERS[dtype.kind]
    raise Unsupported(f"values of type {dtype} have no place on the device")


def is_floating(x: mx.array) -> bool:
    """Whether `x` holds floats of any width."""
    return bool(mx.issubdtype(x.dtype, mx.floating))


Table = Mapping[str, Operator]
