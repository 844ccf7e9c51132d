import os
from pathlib import Path

import pytest

from immich_ml_metal.system.network_settings import CARRIED


@pytest.fixture(autouse=True)
def _no_network_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may need a proxy or a certificate; what is written may not hold it."""
    for name in {*os.environ} & {*CARRIED, *(name.lower() for name in CARRIED)}:
        monkeypatch.delenv(name)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with a `systemctl` of its own that writes down what it was asked."""
    tools = tmp_path / "tools"
    tools.mkdir()
    program = tools / "systemctl"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'
        'case "$2" in show) echo ActiveState=active; echo MainPID=99;; esac\n'
    )
    program.chmod(0o755)
    return tmp_path
