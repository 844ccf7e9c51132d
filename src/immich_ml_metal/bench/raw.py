"""The yardstick: ONNX Runtime alone on random input, all cores, in a process of its own."""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from immich_ml_metal.catalog import model_key
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import Part, Task

_TEXT_DETECTION_SHAPE = (736, 1088)  # what a 3:2 preview becomes
_TEXT_LINE_WIDTH = 320


@dataclass(frozen=True, slots=True)
class RawRate:
    """Inferences per second of one graph, one at a time."""

    task: str
    model: str
    per_s: float


def raw_rates(settings: Settings, *, seconds: float) -> list[RawRate]:
    """Measure every configured model whose files are here, in a child process."""
    arguments = json.dumps({"settings": settings.model_dump(mode="json"), "seconds": seconds})
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=arguments,
        capture_output=True,
        text=True,
        check=True,
    )
    return [RawRate(**row) for row in json.loads(done.stdout)]


def _measure(settings: Settings, seconds: float) -> list[RawRate]:
    import onnxruntime as ort

    from immich_ml_metal.models.store import ModelStore

    store = ModelStore(settings)
    rates = []
    for label, name, task, part in (
        ("clip image", settings.clip_model, Task.CLIP, Part.VISUAL),
        ("clip text", settings.clip_model, Task.CLIP, Part.TEXTUAL),
        ("face detection", settings.face_model, Task.FACES, Part.DETECTION),
        ("face recognition", settings.face_model, Task.FACES, Part.RECOGNITION),
        ("text detection", settings.ocr_model, Task.OCR, Part.DETECTION),
        ("text recognition", settings.ocr_model, Task.OCR, Part.RECOGNITION),
    ):
        files = store.locate(model_key(name, task, part))
        if files is None:
            continue
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(files.graph, options, providers=["CPUExecutionProvider"])
        feeds = {value.name: _random(value, task, part) for value in session.get_inputs()}
        rates.append(RawRate(label, name, _rate(lambda: session.run(None, feeds), seconds)))  # noqa: B023 - called at once
    return rates


def _rate(infer: Any, seconds: float) -> float:
    infer()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        infer()
        count += 1
    return count / (time.perf_counter() - started)


def _random(value: Any, task: Task, part: Part) -> Any:
    height, width = {
        (Task.FACES, Part.DETECTION): (640, 640),
        (Task.OCR, Part.DETECTION): _TEXT_DETECTION_SHAPE,
        (Task.OCR, Part.RECOGNITION): (48, _TEXT_LINE_WIDTH),
    }.get((task, part), (1, 1))
    free = {0: 1, 1: 3, 2: height, 3: width}
    shape = [side if isinstance(side, int) else free[i] for i, side in enumerate(value.shape)]
    rng = np.random.default_rng(0)
    if "int" in value.type:
        return rng.integers(0, 200, shape).astype(value.type[7:-1])
    return rng.random(shape, dtype=np.float32)


if __name__ == "__main__":
    given = json.loads(sys.stdin.read())
    found = _measure(Settings(**given["settings"]), given["seconds"])
    sys.stdout.write(json.dumps([asdict(rate) for rate in found]))
