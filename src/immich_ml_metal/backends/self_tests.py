"""Whether each engine really works on this machine: imported, and given a small piece of work.

Being importable proves little: Vision needs a user session, Metal a GPU that the process may use,
and ONNX Runtime goes to the CPU without a word where Core ML is missing.
"""

import importlib
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from immich_ml_metal.backends.selection import Platform, this_platform
from immich_ml_metal.errors import InferenceError

_SIDE = 256  # of the matrices that are multiplied
_TOLERANCE = 1e-3  # relative; 32-bit sums of 256 products are off by about 1e-6


class SystemProbe:
    """The machine that this process runs on."""

    def __init__(self, checks: Mapping[str, Callable[[], None]] | None = None) -> None:
        """`checks` are the self-tests by engine; the real ones when None."""
        self._checks = REAL_CHECKS if checks is None else checks

    @property
    def platform(self) -> Platform:
        """This machine."""
        return this_platform()

    def check(self, engine: str) -> str | None:
        """Run the engine's self-test on a thread of its own; say what went wrong, or None."""
        try:
            with ThreadPoolExecutor(1) as thread:
                thread.submit(self._checks[engine]).result()
        except ImportError as exc:
            return f"{exc.name or exc} cannot be imported"
        except Exception as exc:  # noqa: BLE001 - whatever an engine dies of, it is not usable here
            return f"its self-test failed: {exc}"
        return None


def check_cpu() -> None:
    """ONNX Runtime can be imported; no session, as there is nothing to fall to anyway.

    The first session of a process decides how its thread treats subnormal numbers, and that one
    belongs to the engine.
    """
    importlib.import_module("immich_ml_metal.backends.ort.engine")


def check_mlx() -> None:
    """MLX multiplies on its default device: the GPU on Apple Silicon, the CPU elsewhere.

    Made, evaluated and read on this one thread, as MLX demands.
    """
    mx = importlib.import_module("mlx.core")
    importlib.import_module("immich_ml_metal.backends.mlx")
    try:
        check_product(lambda a, b: np.array(mx.array(a) @ mx.array(b)))
    finally:
        mx.clear_streams()  # a thread of MLX's must not end without


def check_coreml() -> None:
    """Core ML runs a tiny graph."""
    from immich_ml_metal.backends.coreml.session import check_on_coreml, open_session

    with tempfile.TemporaryDirectory() as folder:
        check_on_coreml(open_session, Path(folder))


def check_vision() -> None:
    """Apple Vision reads a drawn word."""
    from immich_ml_metal.backends.vision.bridge import VisionBridge, load_frameworks
    from immich_ml_metal.backends.vision.setup import check_reading

    check_reading(VisionBridge(load_frameworks()))


def check_open_clip() -> None:
    """open_clip and torch are there, and torch multiplies on the device that will be used."""
    importlib.import_module("open_clip")
    torch = importlib.import_module("torch")
    from immich_ml_metal.backends.open_clip import torch_device

    device = torch_device(torch)
    check_product(
        lambda a, b: (torch.tensor(a, device=device) @ torch.tensor(b, device=device)).cpu().numpy()
    )


Product = Callable[[np.ndarray, np.ndarray], np.ndarray]


def check_product(multiply: Product) -> None:
    """Compare a product of two matrices with NumPy's.

    Raises:
        InferenceError: they differ.
    """
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, _SIDE, _SIDE)).astype(np.float32)
    expected = a @ b
    error = float(np.abs(multiply(a, b) - expected).max() / np.abs(expected).max())
    if not error < _TOLERANCE:  # also where it is not a number
        raise InferenceError(f"a product of matrices is off by {error:.2g}, limit {_TOLERANCE:g}")


REAL_CHECKS: Mapping[str, Callable[[], None]] = {
    "cpu": check_cpu,
    "mlx": check_mlx,
    "coreml": check_coreml,
    "vision": check_vision,
    "open_clip": check_open_clip,
}
