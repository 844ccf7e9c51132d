from pathlib import Path

import pytest

from immich_ml_metal.service.mac_privacy import needs_local_network, unreadable, used_paths
from immich_ml_metal.settings import Settings

HOME = Path("/Users/me")


@pytest.mark.parametrize(
    ("path", "is_closed"),
    [
        ("/Users/me/Documents/immich", True),
        ("/Users/me/Desktop", True),
        ("/Users/me/Downloads/x/y", True),
        ("/Volumes/Photos/models", True),
        ("/Users/me/.cache/immich_ml", False),
        ("/Users/me/DocumentsToo", False),
        ("/opt/homebrew", False),
    ],
)
def test_folders_that_a_job_may_not_read(path: str, is_closed: bool) -> None:
    assert bool(unreadable([Path(path)], HOME)) is is_closed


def test_every_place_the_service_uses_is_looked_at(tmp_path: Path) -> None:
    settings = Settings(models_dir=tmp_path / "m", state_dir=tmp_path / "s")
    used = used_paths(settings, tmp_path / "config.toml")
    assert {tmp_path / "m", tmp_path / "s", tmp_path / "config.toml"} < set(used)


@pytest.mark.parametrize(
    ("url", "release", "is_needed"),
    [
        ("http://192.168.1.20:2283", "15.1", True),
        ("http://nas.local:2283", "26.0", True),
        ("http://nas:2283", "15.0", True),
        ("http://[fd00::1]:2283", "15.0", True),
        ("http://192.168.1.20:2283", "14.5", False),
        ("http://127.0.0.1:2283", "15.1", False),
        ("http://localhost:2283", "15.1", False),
        ("https://photos.example.org", "15.1", False),
        (None, "15.1", False),
        ("http://nas:2283", "", False),
    ],
)
def test_calling_a_machine_in_the_local_network_needs_a_permission(
    url: str | None, release: str, is_needed: bool
) -> None:
    assert needs_local_network(Settings(immich_url=url), release) is is_needed
