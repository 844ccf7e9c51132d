"""A model hub and a ModelScope on loopback, with every fault a network can have.

Speaks the parts of the hub's protocol that `huggingface_hub` and the store use: repository metadata
with sizes and digests, and files with ranges. Faults are queued per file, one per request.
"""

import gzip
import hashlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS_FROM_BYTES = 1000  # like the hub: small files live in git, larger ones in LFS
ANY = "*"


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer.

    Attributes:
        status: answer this status instead.
        retry_after_s: with it, this Retry-After.
        cut_at: close the line after this many bytes of the body.
        html: answer 200 with a web page.
        short_by: leave out this many bytes at the end, with a matching Content-Length.
        flip: damage one byte.
        stall_s: wait this long before the body.
        ignore_range: answer 200 with everything although a range was asked for.
        misplace: answer 206 with a range that was not asked for.
        redirect: answer 302 to this address plus the request's path.
        chunk_s: pause between chunks of 4 KiB.
        gzip: answer compressed, whatever was asked for, as some proxies do.
        says_gzip: say that it is compressed, and it is not.
    """

    status: int = 0
    retry_after_s: float | None = None
    cut_at: int | None = None
    html: bool = False
    short_by: int = 0
    flip: bool = False
    stall_s: float = 0.0
    ignore_range: bool = False
    misplace: bool = False
    redirect: str = ""
    chunk_s: float = 0.0
    gzip: bool = False
    says_gzip: bool = False


@dataclass
class Seen:
    """One request as received."""

    path: str
    range: str | None
    authorization: str | None


@dataclass
class FakeHub:
    """The server's content and behaviour; `url` is set while it runs."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    repositories: dict[str, dict[str, bytes]] = field(default_factory=lambda: defaultdict(dict))
    revisions: tuple[str, ...] = ("main", "v2")
    token: str | None = None
    seen: list[Seen] = field(default_factory=list)
    _faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    _always: dict[str, Fault] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, repository: str, path: str, content: bytes) -> None:
        """Put a file into a repository."""
        self.repositories[repository][path] = content

    def fail(self, suffix: str, *faults: Fault, forever: Fault | None = None) -> None:
        """Queue faults for addresses ending with `suffix` (or `ANY`); then `forever`, if given."""
        with self._lock:
            self._faults[suffix].extend(faults)
            if forever is not None:
                self._always[suffix] = forever

    def heal(self) -> None:
        """Forget every fault."""
        with self._lock:
            self._faults.clear()
            self._always.clear()

    def asked(self, suffix: str) -> list[Seen]:
        """The requests for addresses that end with `suffix`."""
        return [seen for seen in self.seen if seen.path.endswith(suffix)]

    def take_fault(self, path: str) -> Fault:
        """The fault for this request, used up."""
        with self._lock:
            for suffix in (*self._faults, *self._always):
                if suffix == ANY or path.endswith(suffix):
                    if self._faults.get(suffix):
                        return self._faults[suffix].pop(0)
                    if suffix in self._always:
                        return self._always[suffix]
        return Fault()

    def metadata(self, repository: str) -> bytes:
        """What the hub says of a repository when asked for its files' metadata."""
        siblings = []
        for path, content in self.repositories[repository].items():
            row: dict[str, object] = {"rfilename": path, "size": len(content)}
            row["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if len(content) >= LFS_FROM_BYTES:
                digest = hashlib.sha256(content).hexdigest()
                row["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
            siblings.append(row)
        return json.dumps(
            {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings}
        ).encode()

    def find(self, path: str) -> bytes | int:
        """The content at an address, or the status that says why not."""
        if path in self.files:
            return self.files[path]
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) == 6:
            repository, revision = "/".join(parts[2:4]), parts[5]
            if repository not in self.repositories:
                return 404
            return self.metadata(repository) if revision in self.revisions else 404
        if len(parts) > 4 and parts[2] == "resolve":
            content = self.repositories.get("/".join(parts[:2]), {})
            return content.get("/".join(parts[4:]), 404)
        return 404


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization")
        self.hub.seen.append(Seen(path, self.headers.get("Range"), authorization))
        fault = self.hub.take_fault(path)
        if self.hub.token is not None and authorization != f"Bearer {self.hub.token}":
            self._status(401, {"X-Error-Code": "RepoNotFound"})
        elif fault.redirect:
            self._status(302, {"Location": fault.redirect + self.path})
        elif fault.status:
            headers = {"X-Error-Code": "RepoNotFound"} if fault.status == 404 else {}
            if fault.retry_after_s is not None:
                headers["Retry-After"] = str(fault.retry_after_s)
            self._status(fault.status, headers)
        elif fault.html:
            self._body(b"<html>please log in</html>", 200, {"Content-Type": "text/html"}, fault)
        else:
            self._answer(path, fault)

    def _answer(self, path: str, fault: Fault) -> None:
        content = self.hub.find(path)
        if isinstance(content, int):
            known = path.startswith("/api/") and "/revision/" in path
            missing_revision = known and path.split("/revision/")[0][12:] in self.hub.repositories
            code = "RevisionNotFound" if missing_revision else "RepoNotFound"
            self._status(content, {"X-Error-Code": code} if known else {})
            return
        headers = {"Content-Type": "application/octet-stream", "X-Repo-Commit": COMMIT}
        if path.startswith("/api/"):
            headers["Content-Type"] = "application/json"
        if fault.flip:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault.gzip or fault.says_gzip:
            headers["Content-Encoding"] = "gzip"
        if fault.gzip:
            content = gzip.compress(content)
        if fault.short_by:
            content = content[: -fault.short_by]
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        if start and not fault.ignore_range:
            if start >= len(content):
                self._status(416, {})
                return
            said = start + 1 if fault.misplace else start
            headers["Content-Range"] = f"bytes {said}-{len(content) - 1}/{len(content)}"
            self._body(content[start:], 206, headers, fault)
        else:
            self._body(content, 200, headers, fault)

    def _status(self, status: int, headers: dict[str, str]) -> None:
        self._body(b"", status, headers, Fault())

    def _body(self, body: bytes, status: int, headers: dict[str, str], fault: Fault) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        time.sleep(fault.stall_s)
        end = len(body) if fault.cut_at is None else fault.cut_at
        for at in range(0, min(end, len(body)), 4096):
            self.wfile.write(body[at : min(at + 4096, end)])
            if fault.chunk_s:
                self.wfile.flush()
                time.sleep(fault.chunk_s)
        if fault.cut_at is not None:
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that goes away mid-answer is what the tests are about


@contextmanager
def serve_hub() -> Iterator[FakeHub]:
    """Run a fake hub on a free loopback port."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# -- content ---------------------------------------------------------------------------------------


def onnx_bytes(weight_bytes: int = 20_000, *, seed: int = 0) -> bytes:
    """A whole, loadable ONNX model: one matrix product with random weights."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper

    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((max(1, weight_bytes // 16), 4)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, weights.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 10
    return bytes(model.SerializeToString())


def external_onnx(folder: Path, weight_bytes: int = 40_000) -> dict[str, bytes]:
    """An ONNX model with its weights in a side file: the files by name."""
    import onnx

    model = onnx.load_model_from_string(onnx_bytes(weight_bytes))
    path = folder / "model.onnx"
    onnx.save_model(
        model, str(path), save_as_external_data=True, location="w.bias", size_threshold=0
    )
    return {name: (folder / name).read_bytes() for name in ("model.onnx", "w.bias")}


CLIP_FILES: dict[str, Callable[[], bytes]] = {
    "config.json": lambda: b'{"embed_dim": 4, "text_cfg": {"context_length": 77}}',
    "README.md": lambda: b"# model",
    ".gitattributes": lambda: b"*.onnx filter=lfs",
    "visual/model.onnx": lambda: onnx_bytes(60_000, seed=1),
    "visual/preprocess_cfg.json": lambda: b'{"size": [224, 224]}',
    "visual/model.armnn": lambda: b"arm" * 1000,
    "visual/fp16/model.armnn": lambda: b"arm" * 1000,
    "visual/rknpu/rk3588/model.rknn": lambda: b"rk" * 1000,
    "textual/model.onnx": lambda: onnx_bytes(40_000, seed=2),
    "textual/tokenizer.json": lambda: b'{"model": {}}',
    "textual/tokenizer_config.json": lambda: b'{"pad_token": "<pad>"}',
    "textual/vocab.json": lambda: b'{"a": 1}',
}


def add_clip(hub: FakeHub, name: str = "ViT-B-32__openai", org: str = "immich-app") -> None:
    """Publish a small search model laid out as Immich's repositories are."""
    for path, make in CLIP_FILES.items():
        hub.add(f"{org}/{name}", path, make())


def add_faces(hub: FakeHub, name: str = "buffalo_s", org: str = "immich-app") -> None:
    """Publish a small face model."""
    hub.add(f"{org}/{name}", "detection/model.onnx", onnx_bytes(30_000, seed=3))
    hub.add(f"{org}/{name}", "recognition/model.onnx", onnx_bytes(30_000, seed=4))
