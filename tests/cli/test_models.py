import json
from pathlib import Path
from typing import Any

import pytest
from doubles.hub import FakeHub, Fault, add_faces
from typer.testing import CliRunner, Result

from immich_ml_metal.catalog import all_models
from immich_ml_metal.cli import app
from immich_ml_metal.cli.output import Exit
from immich_ml_metal.errors import ModelUnavailable, UnknownModel


class Cli:
    """The command line against one hub and one folder."""

    def __init__(self, hub: FakeHub, folder: Path, **environ: str) -> None:
        env = {
            "HF_ENDPOINT": hub.url,
            "ML_MODELSCOPE_ENDPOINT": hub.url,
            "ML_OCR_MODEL": "PP-OCRv5_mobile",  # not in the rapidocr wheel, not on this hub
            "ML_MODELS_DIR": str(folder),
            "COLUMNS": "200",
            **environ,
        }
        self._runner = CliRunner(env={"ML_CONFIG_FILE": None, **env})

    def __call__(self, *arguments: str, code: int = Exit.OK, answer: str = "") -> Result:
        result = self._runner.invoke(app, ["models", *arguments], input=answer)
        assert result.exit_code == code, result.output
        return result

    def json(self, *arguments: str, code: int = Exit.OK) -> Any:
        return json.loads(self(*arguments, "--json", code=code).stdout)

    def failure(self, *arguments: str) -> BaseException | None:
        return self._runner.invoke(app, ["models", *arguments]).exception


@pytest.fixture
def cli(hub: FakeHub, tmp_path: Path) -> Cli:
    return Cli(hub, tmp_path / "models")


def test_the_list_names_all_75_and_what_is_here(cli: Cli) -> None:
    cli("pull", "buffalo_s")
    rows = cli.json("list")
    assert len(rows) == 75
    here = [row["name"] for row in cli.json("list", "--here") if row["family"] != "paddle"]
    assert here == ["buffalo_s"]
    table = cli("list", "--task", "facial-recognition").stdout
    assert "buffalo_s" in table
    assert "verified" in table
    assert "insightface" in table
    assert "ViT-B-32__openai" not in table


def test_no_name_in_the_list_is_cut_short_however_narrow_the_window(
    hub: FakeHub, tmp_path: Path
) -> None:
    names = [spec.name for spec in all_models()]
    piped = Cli(hub, tmp_path, COLUMNS="60")("list").stdout.splitlines()
    assert [line.split()[0] for line in piped[1:]] == names
    shown = Cli(hub, tmp_path, COLUMNS="80", FORCE_COLOR="1")("list").stdout
    assert all(name in shown for name in names)


def test_the_list_can_be_narrowed_to_a_language(cli: Cli) -> None:
    names = {row["name"] for row in cli.json("list", "--language", "th")}
    assert "TH__PP-OCRv5_mobile" in names
    assert "ViT-B-16-SigLIP2__webli" in names
    assert "ViT-B-32__openai" not in names


def test_pull_fetches_both_halves_and_says_where_they_lie(cli: Cli, tmp_path: Path) -> None:
    said = cli("pull", "ViT-B-32::openai").stderr
    assert "fetched  ViT-B-32__openai/visual" in said
    assert str(tmp_path / "models" / "clip" / "ViT-B-32__openai" / "textual") in said
    assert cli("pull", "ViT-B-32__openai").stderr.count("here ") == 2


def test_pull_goes_on_after_a_failure_and_ends_with_an_exit_code(cli: Cli, hub: FakeHub) -> None:
    hub.fail("detection/model.onnx", forever=Fault(status=404))
    said = cli("pull", "buffalo_s", code=Exit.UNREACHABLE).stderr
    assert "failed   buffalo_s/detection: " in said
    assert "404: no such file" in said
    assert "fetched  buffalo_s/recognition" in said


def test_pull_configured_fetches_the_models_of_the_settings(cli: Cli, hub: FakeHub) -> None:
    add_faces(hub, "buffalo_l")
    said = cli("pull", "--configured", code=Exit.UNREACHABLE).stderr
    assert "fetched  ViT-B-32__openai/visual" in said
    assert "fetched  buffalo_l/detection" in said
    assert "failed   PP-OCRv5_mobile/recognition" in said


def test_pull_all_faces_fetches_the_four(cli: Cli, hub: FakeHub) -> None:
    for name in ("buffalo_l", "buffalo_m", "antelopev2"):
        add_faces(hub, name)
    assert cli("pull", "--all-faces").stderr.count("fetched") == 8


def test_pull_needs_to_know_what(cli: Cli) -> None:
    assert "name a model" in cli("pull", code=Exit.USAGE).output


def test_an_unknown_name_is_refused_with_near_names(cli: Cli) -> None:
    failure = cli.failure("pull", "buffalo_xl")
    assert isinstance(failure, UnknownModel)
    assert "buffalo_l" in str(failure)


def test_verify_finds_damage_and_repair_mends_it(cli: Cli, tmp_path: Path) -> None:
    cli("pull", "buffalo_s")
    graph = tmp_path / "models/facial-recognition/buffalo_s/detection/model.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content[:-1] + b"?")
    said = cli("verify", code=Exit.FINDING).stdout
    assert "damaged  buffalo_s/detection" in said
    assert "detection/model.onnx is damaged" in said
    assert "verified  buffalo_s/recognition" in said
    states = {row["part"]: row["state"] for row in cli.json("verify", "buffalo_s", "--repair")}
    assert states == {"detection": "verified", "recognition": "verified"}
    assert graph.read_bytes() == content


def test_verify_online_recognises_official_files(cli: Cli, tmp_path: Path) -> None:
    cli("pull", "buffalo_s")
    (tmp_path / "models/facial-recognition/buffalo_s/.immich-ml-metal.json").unlink()
    assert {row["state"] for row in cli.json("verify")} == {"unverified"}
    assert {row["state"] for row in cli.json("verify", "--online")} == {"verified"}


def test_rm_asks_before_it_deletes(cli: Cli, tmp_path: Path) -> None:
    cli("pull", "buffalo_s")
    folder = tmp_path / "models/facial-recognition/buffalo_s"
    cli("rm", "buffalo_s", answer="n\n", code=1)
    assert folder.exists()
    assert "Freed" in cli("rm", "buffalo_s", "--yes").stdout
    assert not folder.exists()
    assert isinstance(cli.failure("rm", "buffalo_s", "--yes"), ModelUnavailable)


def test_prune_lists_and_deletes_what_is_left_over(cli: Cli, tmp_path: Path) -> None:
    assert "Nothing to delete" in cli("prune").stdout
    left = tmp_path / "models/clip/ViT-B-32__openai/.incoming/visual/model.onnx.ab.partial"
    left.parent.mkdir(parents=True)
    left.write_bytes(bytes(2_000_000))
    assert "2.0 MB" in cli("prune", "--yes").stdout
    assert not left.exists()


def test_prune_unused_keeps_the_configured_models(cli: Cli, tmp_path: Path) -> None:
    cli("pull", "buffalo_s", "ViT-B-32__openai")
    cli("prune", "--unused", "--yes")
    assert not (tmp_path / "models/facial-recognition/buffalo_s").exists()
    assert (tmp_path / "models/clip/ViT-B-32__openai/visual/model.onnx").exists()


def test_a_script_sees_what_would_be_deleted_and_deletes_only_with_yes(
    cli: Cli, tmp_path: Path
) -> None:
    cli("pull", "buffalo_s")
    folder = tmp_path / "models/facial-recognition/buffalo_s"
    for command in (["rm", "buffalo_s"], ["prune", "--unused"]):
        said = cli.json(*command)
        assert not said["deleted"]
        assert [row["path"] for row in said["found"]] == [str(folder)]
        assert said["found"][0]["size_bytes"] > 0
    assert folder.exists()
    assert cli.json("rm", "buffalo_s", "--yes")["deleted"]
    assert not folder.exists()
    assert cli.json("prune", "--unused") == {"deleted": False, "found": []}


def test_a_script_learns_which_half_could_not_be_pulled_and_why(cli: Cli, hub: FakeHub) -> None:
    hub.fail("detection/model.onnx", forever=Fault(status=404))
    rows = {row["part"]: row for row in cli.json("pull", "buffalo_s", code=Exit.UNREACHABLE)}
    assert "404: no such file" in rows["detection"]["error"]
    assert not rows["detection"]["usable"]
    assert rows["recognition"]["error"] is None
    assert rows["recognition"]["state"] == "verified"


def test_a_script_learns_which_files_were_exported(cli: Cli, tmp_path: Path) -> None:
    cli("pull", "buffalo_s")
    said = cli.json("export", "buffalo_s", "--to", str(tmp_path / "x.zip"))
    assert said["to"] == str(tmp_path / "x.zip")
    assert "facial-recognition/buffalo_s/detection/model.onnx" in said["files"]


def test_prune_unused_keeps_what_is_preloaded_or_spelt_as_immich_allows(
    hub: FakeHub, tmp_path: Path
) -> None:
    names = {"ML_CLIP_MODEL": "ViT-B-32::openai", "ML_PRELOAD_FACE_DETECTION": "buffalo_s"}
    cli = Cli(hub, tmp_path / "models", **names)
    cli("pull", "buffalo_s", "ViT-B-32__openai")
    assert cli.json("prune", "--unused")["found"] == []


def test_export_and_import_move_a_model(cli: Cli, hub: FakeHub, tmp_path: Path) -> None:
    cli("pull", "buffalo_s")
    assert "3 files" in cli("export", "buffalo_s", "--to", str(tmp_path / "x.zip")).stdout
    other = Cli(hub, tmp_path / "other")
    rows = other.json("import", str(tmp_path / "x.zip"))
    assert {row["outcome"] for row in rows} == {"imported"}
    assert {row["state"] for row in other.json("verify")} == {"verified"}


def test_import_of_nothing_says_so(cli: Cli, tmp_path: Path) -> None:
    assert "no official model found" in str(cli.failure("import", str(tmp_path)))


def test_import_says_what_it_refused(cli: Cli, tmp_path: Path) -> None:
    bad = tmp_path / "in/ocr/PP-OCRv5_mobile/detection/model.onnx"
    bad.parent.mkdir(parents=True)
    bad.write_bytes(b"<html>")
    said = cli("import", str(tmp_path / "in"), code=Exit.FINDING).stdout
    assert "refused   PP-OCRv5_mobile/detection: detection/model.onnx is damaged" in said


def test_info_tells_dimension_memory_and_what_changing_means(cli: Cli) -> None:
    said = cli("info", "ViT-SO400M-16-SigLIP2-384__webli").stdout
    assert "1152 numbers" in said
    assert "mlx 2.3 GB" in said
    assert "smart search must be run for all assets" in said.replace("\n", " ")
    row = cli.json("info", "buffalo_l")
    assert row["memory_bytes"]["cpu"] == row["size_bytes"]
    assert "cannot be compared" in row["changing"]
    assert "text recognition job" in cli.json("info", "PP-OCRv6_small")["changing"]
    assert "configured" in cli.json("info", "ViT-B-32__openai")["changing"]


def test_info_tells_where_each_file_came_from(cli: Cli, hub: FakeHub) -> None:
    cli("pull", "buffalo_s")
    said = cli("info", "buffalo_s").stdout
    assert "detection/model.onnx" in said
    assert f"{hub.url}/immich-app/buffalo_s 0123456789ab" in said
    origin = cli.json("info", "buffalo_s")["origin"]["recognition/model.onnx"]
    assert len(origin["sha256"]) == 64


def test_recommend_answers_for_this_machine(cli: Cli) -> None:
    names = [row["model"] for row in cli.json("recommend", "--language", "uk")]
    assert names[1:] == ["buffalo_l", "ESLAV__PP-OCRv5_mobile"]
    assert f"models pull {' '.join(names)}" in cli("recommend", "--language", "uk").stdout


@pytest.mark.parametrize("command", ["list", "recommend"])
def test_a_language_that_is_not_a_code_is_refused(cli: Cli, command: str) -> None:
    assert "such as de" in cli(command, "--language", "German", code=Exit.USAGE).output
    assert cli.json(command, "--language", "de-AT") == cli.json(command, "--language", "de")
