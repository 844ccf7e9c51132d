"""Pauses between tries, and how a small file is written."""

import os
from pathlib import Path

import pytest

from immich_ml_metal.models.manifest import write_atomically
from immich_ml_metal.models.remote import Retry


@pytest.mark.parametrize(("failures", "most_s"), [(1, 1.0), (2, 2.0), (5, 16.0), (9, 30.0)])
def test_pauses_double_up_to_their_limit_and_are_spread(failures: int, most_s: float) -> None:
    pauses = [Retry().wait_s(failures) for _ in range(200)]
    assert 0.75 * most_s <= min(pauses) < 0.85 * most_s
    assert 0.9 * most_s < max(pauses) <= most_s


def test_a_power_cut_leaves_the_old_content_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder" / "file"
    on_disk: list[bytes] = []

    def sync(descriptor: int) -> None:  # what is not synced before it takes the name may be lost
        assert not path.exists() or path.read_bytes() == b"old"
        on_disk.append(Path(f"/dev/fd/{descriptor}").resolve().read_bytes())

    monkeypatch.setattr(os, "fsync", sync)
    for content in (b"old", b"new"):
        write_atomically(path, content)
        assert path.read_bytes() == on_disk[-1] == content
    assert list(path.parent.iterdir()) == [path]
