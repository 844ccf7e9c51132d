"""A whole run, gateway and worker, watched from outside: names looked up, addresses, files."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from doubles.gateway import free_port
from doubles.live import ALL, TEXTUAL, predict
from doubles.tiny_models import draw_text

PATIENCE_S = 90.0  # under strace, beside other work
FIRST_REPORT_S = 12.0  # ONNX Runtime's first report leaves nine seconds after its first session
ADDRESS = re.compile(r'sin6?_port=htons\((\d+)\).*?(?:inet_addr\("|inet_pton\(AF_INET6, ")([^"]+)')


def whole_run(folder: Path, models: Path, *watcher: str, linger_s: float = 0.0) -> None:
    """Start the service in an empty home, let it answer every task, stay a while, stop it."""
    port, home, tmp = free_port(), folder / "home", folder / "tmp"
    for path in (home, tmp):
        path.mkdir()
    command = [sys.executable, "-m", "immich_ml_metal", "serve", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--models-dir", str(models)]
    own = {"HOME": str(home), "TMPDIR": str(tmp), "ML_OFFLINE": "1", "ML_STATE_DIR": "state"}
    kept = {name: os.environ[name] for name in ("PATH",) if name in os.environ}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*watcher, *command], cwd=folder, env=kept | own, stdout=log, stderr=log
        )
        try:
            ask(f"http://127.0.0.1:{port}")
            time.sleep(linger_s)
            os.kill(serving(process, watcher), signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0, (folder / "log").read_text()
        finally:
            process.kill()
            process.wait()


def ask(url: str) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            httpx.get(f"{url}/ping", timeout=5)
            break
        except httpx.TransportError:  # nobody listens yet
            assert time.monotonic() < end_s, "the service does not answer"
            time.sleep(0.1)
    answer = predict(url, ALL, image=draw_text("abc"))
    assert answer.status_code == 200, answer.text
    assert predict(url, TEXTUAL, text="dog").status_code == 200


def serving(process: "subprocess.Popen[bytes]", watcher: tuple[str, ...]) -> int:
    """The service's own process: the watcher's only child, where there is a watcher."""
    if not watcher:
        return process.pid
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[0])


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_whole_run_writes_no_file_outside_its_own_folders(models: Path, tmp_path: Path) -> None:
    whole_run(tmp_path, models)
    assert files_in(tmp_path / "home") == []
    assert files_in(tmp_path / "tmp") == []
    outside = set(files_in(tmp_path)) - {"log"}
    assert all(name.startswith("state/") for name in outside), outside


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace to see system calls")
@pytest.mark.timeout(240)
def test_a_whole_run_looks_up_no_name_and_speaks_to_this_machine_only(
    models: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    calls = "trace=connect,sendto,sendmsg,sendmmsg"
    strace = ("strace", "-f", "-qq", "-e", calls, "-o", str(trace))
    whole_run(tmp_path, models, *strace, linger_s=FIRST_REPORT_S)
    spoken = {(int(port), host) for port, host in ADDRESS.findall(trace.read_text())}
    assert not {(port, host) for port, host in spoken if port == 53}, "a name was looked up"
    assert all(host.startswith("127.") or host == "::1" for _, host in spoken), spoken
