"""The whole service with MLX for every task: recorded answers, and processes that end well."""

import contextlib
import ctypes.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from doubles.gateway import free_port
from doubles.live import ALL, TEXTUAL, predict
from doubles.tiny_models import draw_text

from immich_ml_metal.catalog import engine_setting
from immich_ml_metal.gateway.socket_folder import SocketFolder
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import SLOTS

# float32 on a GPU as well: what is compared here is the service, not a number format.
EVERYTHING_ON_MLX: dict[str, Any] = {
    **dict.fromkeys(map(engine_setting, SLOTS), "mlx"),
    "mlx_dtype": "float32",
}
# MLX's wheel for Linux brings the reference BLAS, thirty times slower than a system's OpenBLAS.
OPENBLAS = ctypes.util.find_library("openblas") if sys.platform == "linux" else None
IS_TOO_SLOW = sys.platform == "linux" and OPENBLAS is None
PATIENCE_S = 60.0


@pytest.fixture
def socket_folder() -> Iterator[Path]:
    """Where a socket's path is short enough for every system."""
    with SocketFolder() as folder:
        yield folder.find()


def own(folder: Path, models: Path) -> Path:
    """The models under another root: MLX keeps its prepared weights beside them."""
    return Path(shutil.copytree(models, folder / "models", copy_function=os.link))


def environment() -> dict[str, str]:
    fast = {"LD_PRELOAD": OPENBLAS} if OPENBLAS is not None else {}
    return os.environ | fast


@contextmanager
def service(
    folder: Path, models: Path, *options: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`serve` on loopback with MLX for every task; gives its URL and its process."""
    port = free_port()
    engines = "".join(f'{name} = "{engine}"\n' for name, engine in EVERYTHING_ON_MLX.items())
    config = folder / "settings.toml"
    config.write_text(f"models_dir = {str(own(folder, models))!r}\noffline = true\n{engines}")
    command = [sys.executable, "-m", "immich_ml_metal", "serve", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--config", str(config), *options]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment())
        try:
            wait_until_up(process, ("127.0.0.1", port), socket.AF_INET)
            yield f"http://127.0.0.1:{port}", process
        finally:
            process.kill()  # nothing, where the test has ended it
            process.wait()


def wait_until_up(process: "subprocess.Popen[bytes]", address: Any, family: int) -> None:
    """Return once something accepts connections; the app is whole by then."""
    end_s = time.monotonic() + PATIENCE_S
    while True:
        assert process.poll() is None, "the service ended"
        assert time.monotonic() < end_s, f"nobody listens after {PATIENCE_S:g} s"
        with socket.socket(family) as probe, contextlib.suppress(OSError):
            probe.connect(address)
            return
        time.sleep(0.05)


def stop(process: "subprocess.Popen[bytes]") -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(PATIENCE_S)


@pytest.mark.parametrize("option", ["--gateway", "--no-gateway"])
def test_mlx_serves_every_task_and_the_service_ends_with_zero(
    models: Path, tmp_path: Path, option: str
) -> None:
    with service(tmp_path, models, option) as (url, process):
        answer = predict(url, ALL, image=draw_text("abc"))
        assert answer.status_code == 200, answer.text
        assert set(answer.json()) >= {"clip", "facial-recognition", "ocr"}
        assert predict(url, TEXTUAL, text="dog").status_code == 200
        assert stop(process) == 0
    assert "terminate called" not in (tmp_path / "log").read_text()


def test_the_worker_process_ends_with_zero_after_mlx_ran(
    models: Path, tmp_path: Path, socket_folder: Path
) -> None:
    """The gateway hides its status: an abort at exit would show only here and in crash reports."""
    settings = Settings(models_dir=own(tmp_path, models), offline=True, **EVERYTHING_ON_MLX)
    where = socket_folder / "e.sock"
    command = [sys.executable, "-m", "immich_ml_metal.worker.process", str(where)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdin is not None
        process.stdin.write(settings.model_dump_json().encode() + b"\n")
        process.stdin.flush()
        wait_until_up(process, str(where), socket.AF_UNIX)
        form = {"entries": json.dumps(TEXTUAL), "text": "dog"}
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(where)), timeout=60) as client:
            assert client.post("http://worker/predict", data=form).status_code == 200
            told = client.get("http://worker/health").json()
        assert told["engine_plan"]["mlx"]["dtype"] == "float32"
        assert stop(process) == 0
    finally:
        process.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


@pytest.mark.shared
@pytest.mark.timeout(900)
@pytest.mark.skipif(IS_TOO_SLOW, reason="minutes too slow without OpenBLAS")
def test_mlx_conforms_to_the_recorded_answers_through_the_gateway(
    shared: Path, shared_models: Path, tmp_path: Path
) -> None:
    tool = shared / "tools" / "conform.py"
    with service(tmp_path, shared_models) as (url, process):
        command = [sys.executable, str(tool), "--url", url, "--cosine", "0.9999"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert stop(process) == 0
    assert re.search(r"^\d\d+ passed, 0 failed", done.stdout, re.MULTILINE)
    assert (tmp_path / "log").read_text().count("engine=mlx") >= 6
