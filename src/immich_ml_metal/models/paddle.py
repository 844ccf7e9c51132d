"""RapidOCR's files on ModelScope: where the official service gets its text models from."""

from immich_ml_metal.catalog import ModelSpec
from immich_ml_metal.models.transfer import Listing, RemoteFile
from immich_ml_metal.types import Part

RELEASE = "v3.10.0"  # of RapidOCR; the catalogue's digests are those of this release


def list_pinned(spec: ModelSpec, part: Part, endpoint: str) -> Listing:
    """The one file of a half of a text model, with the digest the catalogue pins."""
    pinned = spec.pinned[part]
    base = f"{endpoint.rstrip('/')}/models/RapidAI/RapidOCR/resolve/{RELEASE}/onnx"
    file = RemoteFile(
        path=f"{part}/model.onnx",
        url=f"{base}/{pinned.path}",
        size_bytes=None,  # the catalogue's sizes are approximate; the digest decides
        sha256=pinned.sha256,
    )
    return Listing(base, RELEASE, (file,))
