"""One ONNX Runtime session on Core ML: how it is opened, and what it really runs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, helper

from immich_ml_metal.backends.ort.session import session_options
from immich_ml_metal.errors import LoadFailed
from immich_ml_metal.threads import core_count
from immich_ml_metal.types import Tensor

PROVIDER = "CoreMLExecutionProvider"


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
