"""The examples in `deploy/`, run by the programs they are for."""

import asyncio
import contextlib
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest
from doubles.gateway import free_port, right_answer, running_gateway
from doubles.timing import until

DEPLOY = Path(__file__).parents[2] / "deploy"
Nginx = Callable[..., contextlib.AbstractAsyncContextManager[httpx.AsyncClient]]
BODY = b"picture" * 300_000  # 2 MB: more than nginx takes by default


def program(name: str) -> str:
    found = shutil.which(name, path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def example(name: str, changes: dict[str, str]) -> str:
    """The file as it is shipped, with what a user is told to change changed."""
    text = (DEPLOY / name).read_text()
    for before, after in changes.items():
        assert before in text, f"{before} is no longer in {name}"
        text = text.replace(before, after)
    return text


@contextlib.asynccontextmanager
async def running(*command: str, port: int) -> AsyncIterator[None]:
    process = await asyncio.create_subprocess_exec(*command)
    try:
        await until(lambda: process.returncode is not None or is_open(port), f"{command[0]}")
        assert process.returncode is None
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    crt, key = tmp_path / "ml.example.crt", tmp_path / "ml.example.key"
    command = [program("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-keyout", str(key), "-out", str(crt), "-subj", "/CN=ml.example"]
    command += ["-addext", "subjectAltName=DNS:ml.example,IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    return crt, key


@pytest.fixture
def through_nginx(tmp_path: Path, certificate: tuple[Path, Path]) -> Nginx:
    """Starts nginx with the shipped site in front of a port; gives a client that trusts it."""
    crt, key = certificate

    @contextlib.asynccontextmanager
    async def start(port: int, allowed: str = "127.0.0.1") -> AsyncIterator[httpx.AsyncClient]:
        public = free_port()
        site = example(
            "nginx.conf",
            {
                "127.0.0.1:3003": f"127.0.0.1:{port}",
                "listen 3443 ssl": f"listen 127.0.0.1:{public} ssl",
                "/etc/nginx/ml.example.crt": str(crt),
                "/etc/nginx/ml.example.key": str(key),
                "allow 127.0.0.1": f"allow {allowed}",
            },
        )
        folders = " ".join(
            f"{kind}_temp_path {tmp_path}/{kind};"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        config = tmp_path / "nginx.conf"
        config.write_text(
            f"daemon off; master_process off; pid {tmp_path}/pid; error_log {tmp_path}/errors;\n"
            f"events {{}}\nhttp {{ access_log off; {folders}\n{site}\n}}"
        )
        command = [program("nginx"), "-p", str(tmp_path), "-e", f"{tmp_path}/errors", "-c"]
        async with running(*command, str(config), port=public):
            context = ssl.create_default_context(cafile=str(crt))
            url = f"https://127.0.0.1:{public}"
            async with httpx.AsyncClient(base_url=url, verify=context, timeout=30) as client:
                yield client

    return start


@pytest.mark.anyio
async def test_nginx_passes_big_photos_on_unchanged(tmp_path: Path, through_nginx: Nginx) -> None:
    async with (
        running_gateway(tmp_path) as service,
        through_nginx(service.port) as client,
    ):
        assert (await client.get("/ping")).text == "pong"
        for _ in range(3):
            response = await client.post("/predict", content=BODY)
            assert (response.status_code, response.json()) == (200, right_answer(BODY))
        assert len(service.journal("start")) == 3


@pytest.mark.anyio
async def test_nginx_turns_strangers_away(tmp_path: Path, through_nginx: Nginx) -> None:
    async with (
        running_gateway(tmp_path) as service,
        through_nginx(service.port, allowed="10.9.8.7") as client,
    ):
        assert (await client.get("/ping")).status_code == 403


@pytest.mark.anyio
async def test_haproxy_sends_photos_where_ping_answers(tmp_path: Path) -> None:
    haproxy = program("haproxy")
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    public = free_port()
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(running_gateway(folders[0]))
        async with running_gateway(folders[1]) as second:
            config = tmp_path / "haproxy.cfg"
            changes = {
                "bind :3010": f"bind 127.0.0.1:{public}",
                "192.168.1.20:3003": f"127.0.0.1:{first.port}",
                "192.168.1.21:3003": f"127.0.0.1:{second.port}",
                "inter 2s": "inter 500ms",
            }
            config.write_text(example("haproxy.cfg", changes))
            await stack.enter_async_context(
                running(haproxy, "-db", "-q", "-f", str(config), port=public)
            )
            url = f"http://127.0.0.1:{public}"
            client = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=30))
            bodies = [b"photo %d" % number for number in range(20)]
            answers = await asyncio.gather(*(client.post("/predict", content=b) for b in bodies))
            assert [a.json() for a in answers] == [right_answer(body) for body in bodies]
            # a machine whose /ping was late under load is out for a check or two, then back
            while not (first.journal("start") and second.journal("start")):
                assert (await client.post("/predict", content=bodies[0])).status_code == 200
            seen = len(first.journal("start"))
        # the second machine is gone: everything goes to the first, nothing fails
        await asyncio.sleep(2)
        answers = await asyncio.gather(*(client.post("/predict", content=b) for b in bodies))
        assert [a.json() for a in answers] == [right_answer(body) for body in bodies]
        assert len(first.journal("start")) == seen + 20


def test_promtool_accepts_the_example_and_its_rules(tmp_path: Path) -> None:
    for name in ("prometheus.yml", "prometheus-alerts.yml"):
        shutil.copy(DEPLOY / name, tmp_path / name)
    done = subprocess.run(
        [program("promtool"), "check", "config", str(tmp_path / "prometheus.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"SUCCESS: [1-9]\d* rules found", done.stdout)
