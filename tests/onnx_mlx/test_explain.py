"""The command that explains a model and compares it with ONNX Runtime."""

from pathlib import Path

import numpy as np
import pytest
from doubles.onnx_models import FLOAT, make_model, node, randn, save, value
from typer.testing import CliRunner

from immich_ml_metal.onnx_mlx.__main__ import app, parse_shape
from immich_ml_metal.onnx_mlx.compare import compare_nodes, compare_outputs, difference
from immich_ml_metal.onnx_mlx.explain import explain
from immich_ml_metal.onnx_mlx.formats import NumberFormat


@pytest.fixture
def path(tmp_path: Path) -> Path:
    nodes = [
        node("Conv", "x w", "c", pads=[1, 1, 1, 1]),
        node("Relu", "c", "r"),
        node("GlobalAveragePool", "r", "g"),
        node("Flatten", "g", "f"),
        node("MatMul", "f fc", "m"),
        node("Add", "m b", "y"),
    ]
    constants = {"w": randn(6, 3, 3, 3), "fc": randn(6, 5, seed=1), "b": randn(5, seed=2)}
    x, y = value("x", FLOAT, [None, 3, None, None]), value("y", FLOAT, [None, 5])
    return save(make_model(nodes, [x], [y], constants), tmp_path)


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.output


def test_an_explanation_counts_operators_fusions_parameters_and_work(path: Path) -> None:
    found = explain(path, {"x": (2, 3, 8, 10)})
    assert found.before == {
        "Conv": 1, "Relu": 1, "GlobalAveragePool": 1, "Flatten": 1, "MatMul": 1, "Add": 1,
    }  # fmt: skip
    assert found.lowered is not None
    assert found.lowered.fused == {"Linear": 1}
    assert found.parameters == 6 * 27 + 30 + 5
    assert found.flops == 2 * (2 * 6 * 80) * 27 + 2 * 10 * 6
    assert found.layout_transposes == 2


def test_the_command_prints_the_explanation(path: Path) -> None:
    code, output = run(path, "--shape", "x=1,3,8,8")
    assert code == 0
    for line in ("covered every operator", "fused   1: Linear 1", "batch   free", "GFLOP at"):
        assert line in output


def test_the_command_names_what_it_does_not_cover(tmp_path: Path) -> None:
    model = make_model([node("Det", "x", "y")], [value("x", FLOAT, [2, 2])], ["y"])
    code, output = run(save(model, tmp_path))
    assert (code, "NOT SUPPORTED: Det" in output) == (0, True)


def test_a_comparison_prints_a_row_for_each_output(path: Path) -> None:
    code, output = run(path, "--compare", "--shape", "x=1,3,8,8")
    assert code == 0
    row = output.splitlines()[-1].split()
    assert row[-1] == "y"
    assert float(row[1]) < 1e-5


def test_a_node_comparison_names_every_value_that_both_have(path: Path) -> None:
    code, output = run(path, "--nodes", "--shape", "x=1,3,8,8")
    names = [line.split()[3] for line in output.splitlines()[-5:]]
    assert (code, names) == (0, ["c", "r", "g", "f", "y"])


def test_a_file_that_is_no_model_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"")
    assert run(tmp_path / "x.onnx")[0] == 1


@pytest.mark.parametrize("text", ["x", "x=", "=1,2", "x=a", "x=0,3"])
def test_a_malformed_shape_is_refused(text: str, path: Path) -> None:
    assert run(path, "--shape", text)[0] == 2


def test_a_name_with_an_equals_sign_can_be_given() -> None:
    assert parse_shape("a=b=1,2") == ("a=b", (1, 2))


def test_values_are_compared_in_the_layout_of_the_file(path: Path) -> None:
    for found in compare_nodes(path, NumberFormat.FLOAT32, {"x": (1, 3, 8, 10)}):
        assert found.relative < 1e-5, found


def test_half_precision_shows_as_a_difference(path: Path) -> None:
    (found,) = compare_outputs(path, NumberFormat.FLOAT16, {"x": (1, 3, 8, 8)})
    assert 1e-6 < found.relative < 1e-2


def test_equal_infinities_are_no_difference() -> None:
    masks = np.array([0, -np.inf, np.nan], np.float32)
    found = difference("m", "", masks, masks)
    assert (found.largest, found.relative) == (0, 0)
