"""Measure models on MLX and on ONNX Runtime: load, first call, steady time, memory; as Markdown.

    python scripts/measure_onnx_mlx.py MODEL.onnx [NAME=1,3,48,320] ...

Each row comes from a process of its own. Times are processor time of all its threads, so that other
work on the machine does not count; steady time is the median over three seconds of calls.
"""

import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

STEADY_S = 3.0
ROWS = 8


def main() -> None:
    """Measure every model named on the command line, shapes applying to the model before them."""
    models: list[tuple[str, list[str]]] = []
    for argument in sys.argv[1:]:
        if argument.endswith(".onnx"):
            models.append((argument, []))
        else:
            models[-1][1].append(argument)
    print("| model | engine | load s | first call ms | one row ms | 8 rows, ms each | peak MiB |")
    print("|---|---|---|---|---|---|---|")
    for path, shapes in models:
        shutil.rmtree(Path(path).parent / "mlx", ignore_errors=True)
        for engine in ("onnxruntime", "mlx", "mlx, prepared"):
            found = json.loads(_child(engine, path, shapes))
            cells = [found[key] for key in ("load", "first", "one", "many", "peak")]
            print(f"| {Path(path).stem} | {engine} | {' | '.join(cells)} |", flush=True)


def _child(engine: str, path: str, shapes: list[str]) -> str:
    command = [sys.executable, __file__, "--child", engine, path, *shapes]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def measure(engine: str, path: Path, shapes: list[str]) -> dict[str, str]:
    """Load and run one model; one process measures one model once."""
    from immich_ml_metal.onnx_graph.reader import read
    from immich_ml_metal.onnx_mlx.__main__ import parse_shape
    from immich_ml_metal.onnx_mlx.compare import guess_shapes, random_feeds

    program = read(path)
    feeds = random_feeds(program, guess_shapes(program, dict(map(parse_shape, shapes))))
    del program
    started = time.process_time()
    run, max_rows = _load_mlx(path) if engine.startswith("mlx") else _load_ort(path)
    load_s = time.process_time() - started
    first_ms = _time_ms(run, feeds)
    one_ms = _steady_ms(run, feeds)
    many = "-"
    if max_rows >= ROWS:
        several = {name: np.repeat(array, ROWS, 0) for name, array in feeds.items()}
        _time_ms(run, several)
        many = f"{_steady_ms(run, several) / ROWS:.1f}"
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "load": f"{load_s:.2f}",
        "first": f"{first_ms:.0f}",
        "one": f"{one_ms:.1f}",
        "many": many,
        "peak": f"{peak_mib:.0f}",
    }


def _load_mlx(path: Path) -> tuple[Callable[[Any], Any], int]:
    from immich_ml_metal.onnx_mlx.compiled import MlxGraph, Options

    graph = MlxGraph(path, Options(max_batch=ROWS, prepared=True))
    return graph.run, graph.max_batch


def _load_ort(path: Path) -> tuple[Callable[[Any], Any], int]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    rows = session.get_inputs()[0].shape[0]
    return (lambda feeds: session.run(None, feeds)), 1 if isinstance(rows, int) else ROWS


def _time_ms(run: Callable[[Any], Any], feeds: Any) -> float:
    started = time.process_time()
    run(feeds)
    return 1000 * (time.process_time() - started)


def _steady_ms(run: Callable[[Any], Any], feeds: Any) -> float:
    times: list[float] = []
    until = time.perf_counter() + STEADY_S
    while not times or time.perf_counter() < until:
        times.append(_time_ms(run, feeds))
    return statistics.median(times)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])))
    else:
        main()
