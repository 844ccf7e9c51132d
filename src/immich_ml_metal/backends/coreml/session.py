"""One ONNX Runtime session on Core ML: how it is opened, what it really runs, if it is right."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, TensorProto, helper, numpy_helper

from immich_ml_metal.backends.ort.session import session_options
from immich_ml_metal.errors import InferenceError, LoadFailed
from immich_ml_metal.threads import core_count
from immich_ml_metal.types import Tensor

PROVIDER = "CoreMLExecutionProvider"

# Neural Engine and GPU compute in 16 bits. A 16-bit run of CLIP keeps a cosine of 0.999999 to the
# 32-bit one; Immich calls pictures duplicates from 0.99 on, and faces one person from 0.5 on.
MIN_COSINE = 0.999


class Session(Protocol):
    """What is used of an ONNX Runtime session."""

    def run(self, names: Sequence[str] | None, feeds: dict[str, Tensor], /) -> Any:
        """Compute every output."""
        ...

    def get_provider_graph_assignment_info(self) -> Sequence[Any]:
        """Name the provider of each node."""
        ...


SessionMaker = Callable[[bytes, Mapping[str, str]], Session]


def open_session(model: bytes, options: Mapping[str, str]) -> Session:
    """Open a pinned model on Core ML, the CPU taking what Core ML does not know.

    Raises:
        LoadFailed: ONNX Runtime rejects it.
    """
    if PROVIDER not in ort.get_available_providers():
        raise LoadFailed("this onnx runtime has no Core ML provider")
    setup = session_options(core_count())
    setup.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        # MatMulAddFusion makes Gemm nodes, whose weights the provider writes as text: gigabytes,
        # and minutes for a first load (onnxruntime#32212). It goes when it writes them as MatMul's.
        return ort.InferenceSession(  # type: ignore[no-any-return]
            model,
            setup,
            providers=[(PROVIDER, dict(options)), "CPUExecutionProvider"],
            disabled_optimizers=["MatMulAddFusion", "ConvAddActivationFusion"],
        )
    except Exception as exc:  # its exceptions derive from Exception directly
        raise LoadFailed(f"core ml rejects the model: {exc}") from exc


class FedSession:
    """A session whose feeds become what its inputs take: bytes go in as floats."""

    def __init__(self, session: Session, dtypes: Mapping[str, np.dtype[Any]]) -> None:
        self._session = session
        self._dtypes = dtypes

    def run(self, names: Sequence[str] | None, feeds: dict[str, Tensor], /) -> Any:
        """Compute every output."""
        given = {
            name: value.astype(self._dtypes[name], copy=False) for name, value in feeds.items()
        }
        return self._session.run(names, given)

    def get_provider_graph_assignment_info(self) -> Sequence[Any]:
        """Name the provider of each node."""
        return self._session.get_provider_graph_assignment_info()


def open_fed(make: SessionMaker, model: ModelProto, options: Mapping[str, str]) -> FedSession:
    """Open a model in memory.

    Raises:
        LoadFailed: ONNX Runtime rejects it, or it is over protobuf's 2 GiB with its weights inside.
    """
    dtypes = {
        value.name: np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
        for value in model.graph.input
    }
    try:
        content = bytes(model.SerializeToString())
    except Exception as exc:  # protobuf's errors derive from Exception directly
        raise LoadFailed(f"the model does not fit into one piece: {exc}") from exc
    return FedSession(make(content, options), dtypes)


def provider_options(*, use_ane: bool, cache: Path) -> dict[str, str]:
    """Options of the provider; it takes unknown ones for a reason to stay on the CPU."""
    return {
        "ModelFormat": "MLProgram",
        "MLComputeUnits": "ALL" if use_ane else "CPUAndGPU",
        "RequireStaticInputShapes": "1",
        "EnableOnSubgraphs": "0",
        "ModelCacheDirectory": str(cache),
    }


def provider_share(session: Session, provider: str = PROVIDER) -> float:
    """Share of the nodes that run on `provider`, 0..1.

    Asked of the session itself: a provider that cannot be used is left out without a word.
    """
    parts = session.get_provider_graph_assignment_info()
    nodes = [(part.ep_name, len(part.get_nodes())) for part in parts]
    total = sum(count for _, count in nodes)
    return sum(count for name, count in nodes if name == provider) / total if total else 0.0


def cosine(one: Tensor, other: Tensor) -> float:
    """Lowest cosine between equal rows of two outputs; 0 where a number is not finite."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (one, other))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        return 1.0 if np.array_equal(a, b) else 0.0
    return float(((a * b).sum(axis=1) / lengths).min())


def check_on_coreml(make_session: SessionMaker, cache: Path) -> None:
    """Let Core ML run a tiny convolution and compare it with arithmetic.

    Args:
        make_session: opens the session, `open_session`.
        cache: a folder that may be written to.

    Raises:
        LoadFailed: the provider rejects the graph.
        InferenceError: it is missing, takes none of the graph, or computes something else.
    """
    weight = np.arange(12, dtype=np.float32).reshape(4, 3, 1, 1) / 8
    session = make_session(_tiny_graph(weight), provider_options(use_ane=True, cache=cache))
    if provider_share(session) == 0:
        raise InferenceError("onnx runtime gave core ml not one node of a test graph")
    pixels = np.linspace(-1, 1, 3 * 8 * 8, dtype=np.float32).reshape(1, 3, 8, 8)
    expected = np.einsum("oc,nchw->nohw", weight[:, :, 0, 0], pixels).clip(0)
    similarity = cosine(session.run(None, {"x": pixels})[0], expected)
    if similarity < MIN_COSINE:
        raise InferenceError(f"core ml computes a test graph wrongly: cosine {similarity:.4f}")


def _tiny_graph(weight: Tensor) -> bytes:
    """Convolution and ReLU of a (1, 3, 8, 8) input `x`."""
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"]),
            helper.make_node("Relu", ["c"], ["y"]),
        ],
        "self-test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 8, 8])],
        [numpy_helper.from_array(weight, "w")],
    )
    opset = helper.make_opsetid("", 17)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=9)
    return bytes(model.SerializeToString())
