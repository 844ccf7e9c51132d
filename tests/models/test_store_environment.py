"""The usual variables of hubs, proxies and tokens, as a user sets them: each in its own process."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from doubles.hub import FakeHub, onnx_bytes

from immich_ml_metal.catalog import get_model, model_key
from immich_ml_metal.models.paddle import find_in_wheel
from immich_ml_metal.models.shelf import FileState
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.settings import Settings
from immich_ml_metal.system.network_settings import network_troubles
from immich_ml_metal.types import Part, Task

SRC = Path(__file__).parents[2] / "src"
FETCH = """
import sys
from immich_ml_metal.catalog import model_key
from immich_ml_metal.settings_sources import load_settings
from immich_ml_metal.errors import ModelError
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.types import Part, Task

try:
    store = ModelStore(load_settings())
    print(store.ensure(model_key("buffalo_s", Task.FACES, Part.DETECTION)).graph.stat().st_size)
except ModelError as exc:
    print(type(exc).__name__, exc)
"""


def fetch(folder: Path, **environ: str) -> str:
    """What a fetch says in a process with these variables and no others of ours."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().endswith("_PROXY") and not name.startswith(("HF_", "ML_"))
    }
    clean |= {"PYTHONPATH": str(SRC), "ML_MODELS_DIR": str(folder), "HF_HOME": str(folder / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", FETCH], capture_output=True, text=True, env={**clean, **environ}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


SIZE = str(len(onnx_bytes(30_000, seed=3)))


def test_hf_endpoint_names_a_mirror(hub: FakeHub, tmp_path: Path) -> None:
    assert fetch(tmp_path, HF_ENDPOINT=f"{hub.url}/") == SIZE
    assert hub.seen


def test_hf_token_opens_a_private_hub(hub: FakeHub, tmp_path: Path) -> None:
    hub.token = "hf_secret"
    refused = fetch(tmp_path, HF_ENDPOINT=hub.url)
    assert refused.startswith("ModelUnavailable")
    assert "HF_TOKEN is missing or wrong" in refused
    assert fetch(tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN="hf_secret") == SIZE


def test_a_proxy_is_used_for_the_list_and_for_the_files(hub: FakeHub, tmp_path: Path) -> None:
    said = fetch(tmp_path, HF_ENDPOINT="http://hub.invalid", HTTP_PROXY=hub.url)
    assert said == SIZE
    assert len(hub.asked("detection/model.onnx")) == 1


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "ML_OFFLINE"])
def test_offline_variables_keep_the_network_untouched(
    hub: FakeHub, tmp_path: Path, variable: str
) -> None:
    said = fetch(tmp_path, HF_ENDPOINT=hub.url, **{variable: "1"})
    assert said.startswith("ModelUnavailable")
    assert "models pull buffalo_s" in said
    assert not hub.seen


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:7890"),
        ("HTTPS_PROXY", "ftp://127.0.0.1:3128"),
        ("http_proxy", '"http://127.0.0.1:3128"'),
        ("HTTP_PROXY", "http://127.0.0.1:port"),
        ("SSL_CERT_FILE", "/nonexistent.pem"),
        ("HF_TOKEN", "hf_\u00e4"),
        ("HF_HUB_ETAG_TIMEOUT", "10.5"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "1e3"),
    ],
)
def test_a_wrong_network_variable_is_a_failed_download_that_names_it(
    hub: FakeHub, tmp_path: Path, name: str, value: str
) -> None:
    said = fetch(tmp_path, HF_ENDPOINT=hub.url, **{name: value})
    assert said.startswith("DownloadFailed")
    assert name in said
    assert "\n" not in said


def test_variables_that_are_right_are_not_blamed(tmp_path: Path) -> None:
    certificates = tmp_path / "ca.pem"
    certificates.write_text("-----BEGIN CERTIFICATE-----\n")
    right = {
        "HTTPS_PROXY": "http://me:secret@proxy:3128",
        "http_proxy": "127.0.0.1:3128",
        "NO_PROXY": "localhost",
        "SSL_CERT_FILE": str(certificates),
        "SSL_CERT_DIR": str(tmp_path),
        "HF_TOKEN": "hf_abc",
        "HF_HUB_ETAG_TIMEOUT": "10",
    }
    assert network_troubles(right) == []
    wrong = network_troubles({"HTTPS_PROXY": "gopher://me:secret@proxy"})
    assert "secret" not in "".join(wrong)
    assert network_troubles({"SSL_CERT_FILE": str(tmp_path / "empty")}) != []


# -- the rapidocr wheel ----------------------------------------------------------------------------


def make_wheel(folder: Path, content: bytes) -> Path:
    """A folder as the rapidocr wheel has one."""
    models = folder / "rapidocr" / "models"
    models.mkdir(parents=True)
    (models / "PP-OCRv6_det_small.onnx").write_bytes(content)
    return models


def test_a_wheel_that_carries_another_file_under_the_name_is_not_used(tmp_path: Path) -> None:
    models = make_wheel(tmp_path, onnx_bytes())
    spec = get_model("PP-OCRv6_small")
    assert spec is not None
    assert find_in_wheel(spec, Part.DETECTION, models) is None


def test_a_model_that_no_wheel_carries_is_not_found_there(tmp_path: Path) -> None:
    models = make_wheel(tmp_path, onnx_bytes())
    for name in ("PP-OCRv5_mobile", "buffalo_l"):
        spec = get_model(name)
        assert spec is not None
        assert find_in_wheel(spec, Part.DETECTION, models) is None


def test_the_installed_wheel_serves_the_small_text_model_without_network(tmp_path: Path) -> None:
    if not any(found.name == "rapidocr" for found in metadata.distributions()):
        pytest.skip("the rapidocr wheel is not installed")
    store = ModelStore(Settings(models_dir=tmp_path, offline=True))
    for part in (Part.DETECTION, Part.RECOGNITION):
        key = model_key("PP-OCRv6_small", Task.OCR, part)
        assert store.ensure(key).graph.stat().st_size > 9_000_000
        assert store.status(key).state is FileState.VERIFIED
    assert not list(tmp_path.iterdir())
