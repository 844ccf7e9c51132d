"""Which files a model consists of, found by walking its skeleton without reading its weights.

Big models keep weights in sibling files (ONNX external data): one, or one for each tensor. A walk
touches a few pages of a file however large, and fails when the file is cut short, so it also tells
a whole file from a torn one. What else lies in the folder does not matter to anybody.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from immich_ml_metal.onnx_files.protobuf import NotOnnx, messages

# Field numbers of onnx.proto3 that lead to a TensorProto.
_MODEL_GRAPH, _MODEL_FUNCTION = 7, 25
_FUNCTION_NODE = 7
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE = 1, 5, 15
_NODE_ATTRIBUTE = 5
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_TENSOR_EXTERNAL = 13

_CHILDREN = {
    "model": {_MODEL_GRAPH: "graph", _MODEL_FUNCTION: "function"},
    "function": {_FUNCTION_NODE: "node"},
    "graph": {_GRAPH_NODE: "node", _GRAPH_INITIALIZER: "tensor", _GRAPH_SPARSE: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "node": {_NODE_ATTRIBUTE: "attribute"},
    "attribute": {
        _ATTRIBUTE_TENSOR: "tensor",
        _ATTRIBUTE_TENSORS: "tensor",
        _ATTRIBUTE_GRAPH: "graph",
        _ATTRIBUTE_GRAPHS: "graph",
    },
    "tensor": {_TENSOR_EXTERNAL: "entry"},
}


@dataclass(frozen=True, slots=True)
class ExternalFile:
    """A side file, relative to the ONNX file's folder, and the bytes it must at least have."""

    location: str
    min_bytes: int


def external_files(path: Path) -> tuple[ExternalFile, ...]:
    """The side files of the ONNX model at `path`; empty when its weights are inside.

    Raises:
        NotOnnx: the file is empty, torn, something else, or points out of its folder.
        OSError: it cannot be read.
    """
    needed: dict[str, int] = {}
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise NotOnnx(f"{path} is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            walk = _Walk(view)
            for entry in walk.tensors_outside():
                location, end = entry
                check_location(location)
                needed[location] = max(needed.get(location, 0), end)
            if not walk.saw_graph:
                raise NotOnnx(f"{path} is not an ONNX model")
    return tuple(ExternalFile(location, end) for location, end in sorted(needed.items()))


def check_location(location: str) -> None:
    """Let only names through that stay in the model's folder.

    Raises:
        NotOnnx: an absolute path, or one with `..`: it could read any file of this machine.
    """
    path = PurePosixPath(location)
    if not path.name or path.is_absolute() or ".." in path.parts or "\0" in location:
        raise NotOnnx(f"weights lie outside the model's folder: {location!r}")


def weight_files(path: Path) -> tuple[Path, ...]:
    """The ONNX file and the side files that its graph names: all that decides what it computes.

    Raises:
        NotOnnx, OSError: as `external_files`.
    """
    sides = (path.parent / side.location for side in external_files(path))
    return tuple(dict.fromkeys((path, *sides)))


def weight_bytes(path: Path) -> int:
    """Size of the graph with its side files: about what it takes in memory once loaded.

    A file that is absent counts nothing, a torn one itself alone: whoever loads it says so.
    """
    try:
        files = weight_files(path)
    except (OSError, NotOnnx):
        files = (path,)
    return sum(file.stat().st_size for file in files if file.is_file())


class _Walk:
    """One pass over a model's messages."""

    def __init__(self, view: mmap.mmap) -> None:
        self._view = view
        self.saw_graph = False

    def tensors_outside(self) -> Iterator[tuple[str, int]]:
        """(location, end of the bytes used) of every tensor kept in a side file."""
        yield from self._message("model", 0, len(self._view))

    def _message(self, kind: str, start: int, end: int) -> Iterator[tuple[str, int]]:
        children = _CHILDREN[kind]
        entries: dict[str, str] = {}
        for number, lo, hi in messages(self._view, start, end):
            child = children.get(number)
            if child == "entry":
                key, value = self._entry(lo, hi)
                entries[key] = value
            elif child is not None:
                self.saw_graph |= child == "graph"
                yield from self._message(child, lo, hi)
        if "location" in entries:
            yield entries["location"], _number(entries, "offset") + _number(entries, "length")

    def _entry(self, start: int, end: int) -> tuple[str, str]:
        """A StringStringEntryProto."""
        text = {number: self._view[lo:hi] for number, lo, hi in messages(self._view, start, end)}
        try:
            return text.get(1, b"").decode(), text.get(2, b"").decode()
        except UnicodeDecodeError as exc:
            raise NotOnnx("a side file's name is not text") from exc


def _number(entries: dict[str, str], name: str) -> int:
    text = entries.get(name) or "0"
    if not text.isdecimal():
        raise NotOnnx(f"the {name} of a side file is not a number: {text!r}")
    return int(text)
