from pathlib import Path

import pytest
from doubles.tiny_models import draw_faces

from immich_ml_metal.bench.measure import read_pictures
from immich_ml_metal.errors import InvalidImage


def test_a_bad_picture_is_named_and_the_others_are_measured(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(draw_faces((64, 64)))
    (tmp_path / "b.jpg").write_text("not a picture")
    told: list[str] = []
    assert len(read_pictures([tmp_path], told.append)) == 1
    assert [f"{tmp_path / 'b.jpg'} is not measured" in line for line in told] == [True]


def test_nothing_but_bad_pictures_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "b.jpg").write_text("not a picture")
    with pytest.raises(InvalidImage):
        read_pictures([tmp_path], print)
