"""What commands write for a person, on a disk that is full: one line that names the file."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FILLED = "mount -t tmpfs -o size=16k none {0} && echo kept > {0}/old && cat /dev/zero > {0}/fill"


@pytest.mark.parametrize(
    ("words", "file"),
    [
        ("config init {}/new.toml", "new.toml"),
        ("config init --force {}/old", "old"),
        ("doctor --no-test --share {}/bundle.zip", "bundle.zip"),
    ],
)
def test_a_full_disk_is_named_with_the_file_and_harms_none(
    words: str, file: str, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    unshare = ["unshare", "-rm", "sh", "-c"]
    probe = [*unshare, f"mount -t tmpfs -o size=16k none {full}"]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here")
    command = f"{sys.executable} -m immich_ml_metal {words.format(full)}"
    script = (
        f"{FILLED.format(full)} 2>/dev/null; {command}; echo code $?; cd {full}; cat old; ls -A"
    )
    home = {"HOME": str(tmp_path), "ML_STATE_DIR": str(tmp_path / "state"), "ML_OFFLINE": "1"}
    done = subprocess.run(
        [*unshare, script], capture_output=True, text=True, env={**os.environ, **home}
    )
    (said,) = done.stderr.splitlines()
    assert said == f"immich-ml-metal: {full}/{file}: the disk is full"
    assert done.stdout.split("code ")[1].split() == ["1", "kept", "fill", "old"]
