"""Every official name leads to its own repository, and to no other."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from doubles.hub import FakeHub, onnx_bytes, serve_hub

from immich_ml_metal.catalog import ModelSpec, all_models
from immich_ml_metal.errors import ModelUnavailable
from immich_ml_metal.models.hub import Hub


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    graph = onnx_bytes(64)
    with serve_hub() as hub:
        for spec in all_models():
            for part in spec.parts:
                hub.add(f"immich-app/{spec.name}", f"{part}/model.onnx", graph)
        yield hub


@pytest.mark.parametrize("spec", all_models(), ids=lambda spec: spec.name)
def test_a_name_asks_for_its_own_repository_and_half(hub: FakeHub, spec: ModelSpec) -> None:
    repositories = Hub("immich-app", "v2", hub.url, 10.0)
    for part in spec.parts:
        before = len(hub.seen)
        listing = repositories.list_files(spec, part)
        assert [file.path for file in listing.files] == [f"{part}/model.onnx"]
        assert listing.source == f"{hub.url}/immich-app/{spec.name}"
        asked = [seen.path for seen in hub.seen[before:]]
        assert asked == [f"/api/models/immich-app/{spec.name}/revision/v2"]


def test_another_organisation_is_asked_when_set(hub: FakeHub) -> None:
    spec = all_models()[0]
    with pytest.raises(ModelUnavailable, match=f"immich-testing/{spec.name} does not exist"):
        Hub("immich-testing", "main", hub.url, 10.0).list_files(spec, spec.parts[0])


def test_a_revision_that_is_not_there_is_named(hub: FakeHub) -> None:
    spec = all_models()[0]
    with pytest.raises(ModelUnavailable, match="has no revision 'v9'"):
        Hub("immich-app", "v9", hub.url, 10.0).list_files(spec, spec.parts[0])


def test_a_repository_without_the_half_is_named(hub: FakeHub, tmp_path: Path) -> None:
    spec = all_models()[0]
    hub.repositories[f"other/{spec.name}"] = {"README.md": b"empty"}
    with pytest.raises(ModelUnavailable, match=r"has no visual/model\.onnx"):
        Hub("other", "main", hub.url, 10.0).list_files(spec, spec.parts[0])
