"""The text models: RapidOCR's files on ModelScope, as the official service fetches them.

Some of them come inside the installed `rapidocr` wheel: text without any download.
"""

from importlib import metadata
from pathlib import Path

from immich_ml_metal.catalog import ModelSpec
from immich_ml_metal.models.manifest import sha256_of
from immich_ml_metal.models.remote import Listing, RemoteFile
from immich_ml_metal.types import ModelFiles, Part

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


def find_in_wheel(spec: ModelSpec, part: Part, folder: Path | None = None) -> ModelFiles | None:
    """The half's file in the wheel, if it is there and has the official file's digest.

    Args:
        spec: which model.
        part: which half.
        folder: the wheel's folder of models; where it is installed when None.
    """
    pinned = spec.pinned.get(part)
    folder = folder or _models_folder()
    if pinned is None or folder is None:
        return None
    graph = folder / Path(pinned.path).name
    if not graph.is_file() or sha256_of(graph) != pinned.sha256:
        return None  # another release of the wheel carries another file under this name
    return ModelFiles(graph=graph, folder=folder, root=folder)


def _models_folder() -> Path | None:
    try:
        found = metadata.distribution("rapidocr").locate_file("rapidocr/models")
    except metadata.PackageNotFoundError:
        return None
    folder = Path(str(found))
    return folder if folder.is_dir() else None
