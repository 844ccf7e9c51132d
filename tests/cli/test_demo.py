import io
from pathlib import Path

import httpx
import pytest
from doubles.live import serve
from doubles.tiny_models import FACES, OCR, draw_faces, draw_text
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from immich_ml_metal.cli import app
from immich_ml_metal.cli.demo import show_demo
from immich_ml_metal.cli.output import own_command
from immich_ml_metal.errors import ServiceError
from immich_ml_metal.settings import Settings
from immich_ml_metal.worker.compose import build_app


def small(models_dir: Path) -> Settings:
    return Settings(models_dir=models_dir, offline=True, face_model=FACES, ocr_model=OCR)


def show(settings: Settings, url: str, image: bytes, output: Path, *, pull: bool = False) -> str:
    words = io.StringIO()
    show_demo(settings, url, image, output, Console(file=words, width=200), pull=pull)
    return words.getvalue()


def test_the_answers_are_told_and_the_faces_drawn(
    models: Path, service: str, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "demo.png"
    words = show(small(models), service, draw_faces((160, 160)), output)
    assert "640x480 pixels" in words
    assert "512 numbers" in words
    assert "'a plate of spaghetti'" in words
    assert "1 found" in words
    assert "score 1.00 at [128.0, 128.0, 192.0, 192.0] px" in words
    assert f"boxes drawn in {output}" in words
    with Image.open(output) as drawn:
        assert drawn.getpixel((128, 160)) == (255, 196, 0)
        assert drawn.getpixel((20, 400)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.jpg", "JPEG"), ("a.PNG", "PNG"), ("a", "PNG"), ("a.txt", "PNG")]
)
def test_the_drawing_is_of_the_kind_that_its_name_says(
    name: str, kind: str, models: Path, service: str, tmp_path: Path
) -> None:
    show(small(models), service, draw_faces((160, 160)), tmp_path / name)
    with Image.open(tmp_path / name) as drawn:
        assert drawn.format == kind


def test_a_folder_is_no_place_for_the_drawing(tmp_path: Path) -> None:
    ended = CliRunner().invoke(app, ["demo", "--output", str(tmp_path)])
    assert (ended.exit_code, "directory" in ended.output) == (2, True)


def test_the_lines_are_told_and_drawn(models: Path, service: str, tmp_path: Path) -> None:
    output = tmp_path / "demo.png"
    words = show(small(models), service, draw_text("abc", "cb"), output)
    assert "2 lines read" in words
    assert "1.00  abc" in words
    with Image.open(output) as drawn:
        pixels = drawn.convert("RGB").getcolors(640 * 480)
    assert (0, 90, 255) in {colour for _, colour in pixels or []}


def test_missing_models_are_named_with_the_way_to_get_them(
    models: Path, service: str, tmp_path: Path
) -> None:
    settings = small(models).model_copy(update={"clip_model": "ViT-L-14__openai"})
    words = show(settings, service, draw_faces((160, 160)), tmp_path / "demo.png")
    assert "not shown: ViT-L-14__openai is not in" in words
    assert "immich-ml-metal models pull ViT-L-14__openai" in words
    assert "1 found" in words


def test_commands_are_named_as_they_work_where_the_user_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / ".venv" / "bin" / "immich-ml-metal"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.argv", [str(program)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    assert own_command() == ".venv/bin/immich-ml-metal"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert own_command() == str(program)
    monkeypatch.setenv("PATH", str(program.parent))
    assert own_command() == "immich-ml-metal"


def test_with_pull_a_missing_model_is_asked_for_all_the_same(
    models: Path, service: str, tmp_path: Path
) -> None:
    settings = small(models).model_copy(update={"clip_model": "ViT-L-14__openai"})
    with pytest.raises(ServiceError, match=r"503: .*downloads are switched off"):
        show(settings, service, draw_faces((160, 160)), tmp_path / "demo.png", pull=True)


def test_a_file_that_is_no_picture_ends_with_the_reason(
    models: Path, service: str, tmp_path: Path
) -> None:
    with pytest.raises(ServiceError, match="cannot be decoded"):
        show(small(models), service, b"text", tmp_path / "demo.png")


def test_a_service_that_is_not_there_ends_with_the_reason(models: Path, tmp_path: Path) -> None:
    with serve(build_app(small(models))) as gone:
        assert httpx.get(f"{gone}/ping").is_success
    with pytest.raises(ServiceError, match=gone):
        show(small(models), gone, draw_faces((160, 160)), tmp_path / "demo.png")


def test_the_command_starts_a_service_of_its_own(models: Path, tmp_path: Path) -> None:
    picture, output = tmp_path / "p.png", tmp_path / "demo.png"
    picture.write_bytes(draw_faces((160, 160)))
    env = {"ML_FACE_MODEL": FACES, "ML_OCR_MODEL": OCR, "ML_OFFLINE": "1"}
    arguments = ["demo", str(picture), "--models-dir", str(models), "--output", str(output)]
    result = CliRunner(env=env).invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "1 found" in result.stdout
    assert output.is_file()


def test_a_picture_that_is_not_there_is_a_wrong_use() -> None:
    result = CliRunner().invoke(app, ["demo", "none.png"])
    assert result.exit_code == 2
    assert "'none.png'" in result.output
