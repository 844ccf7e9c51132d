"""A tensor graph made of a function, so that tasks can be tested without an engine."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from immich_ml_metal.types import Tensor, TensorSpec


def spec(name: str, dtype: Any = np.float32, shape: Sequence[int | None] = ()) -> TensorSpec:
    return TensorSpec(name, np.dtype(dtype), tuple(shape))


class FakeGraph:
    """Computes its outputs with `compute`, and remembers what it was fed."""

    def __init__(
        self,
        compute: Callable[[dict[str, Tensor]], list[Tensor]],
        *,
        inputs: Sequence[TensorSpec] = (spec("input"),),
        outputs: Sequence[TensorSpec] = (spec("output"),),
        max_batch: int = 4,
        fixed_shapes: bool = False,
    ) -> None:
        self._compute = compute
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.metadata: Mapping[str, str] = {}
        self.max_batch = max_batch
        self.fixed_shapes = fixed_shapes
        self.size_bytes = 1234
        self.fed: list[dict[str, Tensor]] = []
        self.is_closed = False

    def run(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        self.fed.append(dict(feeds))
        return self._compute(dict(feeds))

    def close(self) -> None:
        self.is_closed = True
