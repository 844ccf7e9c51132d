"""MLX computes on the CPU here: these tests compare with limits that no GPU format could keep."""

from collections.abc import Iterator

import mlx.core as mx
import pytest


@pytest.fixture(scope="package", autouse=True)
def on_the_cpu() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)
