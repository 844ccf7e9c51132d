import json
import subprocess
import sys
from pathlib import Path

import pytest

from immich_ml_metal.system.switches import SWITCHES

SHOW = "import immich_ml_metal, json, os; print(json.dumps(dict(os.environ)))"


def environment_after_import(**before: str) -> dict[str, str]:
    command = [sys.executable, "-c", SHOW]
    done = subprocess.run(command, env=before, capture_output=True, text=True, check=True)
    after: dict[str, str] = json.loads(done.stdout)
    return after


def test_importing_the_package_tells_libraries_not_to_report_home() -> None:
    after = environment_after_import()
    assert {name: after.get(name) for name in SWITCHES} == dict(SWITCHES)


def test_the_package_sets_nothing_else() -> None:
    bare = [sys.executable, "-c", SHOW.replace("immich_ml_metal, ", "")]
    before = json.loads(subprocess.run(bare, env={}, capture_output=True, check=True).stdout)
    assert environment_after_import().keys() - before.keys() == SWITCHES.keys()


@pytest.mark.parametrize("value", ["0", "1"])
def test_what_the_operator_has_set_stays(value: str) -> None:
    after = environment_after_import(ORT_DISABLE_TELEMETRY=value)
    assert after["ORT_DISABLE_TELEMETRY"] == value


def test_the_hub_library_reads_our_switch() -> None:
    code = (
        "import immich_ml_metal, huggingface_hub.constants as c; print(c.HF_HUB_DISABLE_TELEMETRY)"
    )
    done = subprocess.run([sys.executable, "-c", code], env={}, capture_output=True, check=True)
    assert done.stdout == b"True\n"


MLX_USERS = [
    "immich_ml_metal.onnx_mlx.__main__",
    "immich_ml_metal.backends.mlx",
    "immich_ml_metal.worker.process",
    "immich_ml_metal.bench.raw",
]


@pytest.mark.parametrize("module", MLX_USERS)
def test_float32_is_asked_for_before_mlx_is_there(module: str) -> None:
    """MLX reads the switch once: whoever imports MLX has imported the package before."""
    code = f"""
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mlx":
            print(os.environ.get("MLX_ENABLE_TF32"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())
import {module}
print("never imported", os.environ.get("MLX_ENABLE_TF32"))
"""
    done = subprocess.run([sys.executable, "-c", code], env={}, capture_output=True, check=True)
    assert done.stdout.split()[-1] == b"0"


def test_mlx_knows_the_switch_under_this_name() -> None:
    """A misspelt switch would say nothing: its name stands in the headers of the library."""
    core = pytest.importorskip("mlx.core")
    header = Path(core.__file__).parent / "include" / "mlx" / "utils.h"
    assert 'get_var("MLX_ENABLE_TF32"' in header.read_text(encoding="utf-8")
