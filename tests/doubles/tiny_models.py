"""Small ONNX graphs that really do their task, laid out as Immich lays out its cache.

CLIP towers that average colours and words, a face detector that finds bright squares, a face
recogniser that averages colours, a text detector that finds what is dark, and a reader of bars
whose shades stand for letters. Tens of KB, in both forms: float NCHW (`main`), uint8 NHWC (`v2`).
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw

CLIP, FACES, FACES_TOO, OCR = "ViT-B-32__openai", "buffalo_s", "buffalo_l", "PP-OCRv6_tiny"
DIM = 512
SIDE_PX = 32  # what the small visual tower sees
WORDS = ("a", "photo", "of", "dog", "cat", "tree", "house", "sunset", "over", "the", "sea", "red")
CONTEXT = 8
VOCABULARY = 200  # rows of the table of words; `bench` draws from as many
LETTERS = {"a": 0, "b": 43, "c": 85}  # shade of each letter, bytes
_UNIT = {"a": -1.0, "b": -0.6628, "c": -0.3333}  # the same in -1..1


# -- pictures --------------------------------------------------------------------------------------


def to_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def draw_faces(*centres: tuple[int, int], size: tuple[int, int] = (640, 480)) -> bytes:
    """Bright squares of 64 px on black around `centres` (multiples of 16), in different shades."""
    image = Image.new("RGB", size)
    draw = ImageDraw.Draw(image)
    for row, (x, y) in enumerate(centres):
        draw.rectangle((x - 32, y - 32, x + 31, y + 31), fill=(255, 255, 255 - 30 * row))
    return to_png(image)


def draw_text(*lines: str, size: tuple[int, int] = (640, 480)) -> bytes:
    """One bar for each line on white, a shade for each letter."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for row, line in enumerate(lines):
        for column, letter in enumerate(line):
            x, y = 60 + 48 * column, 60 + 100 * row
            draw.rectangle((x, y, x + 47, y + 29), fill=(LETTERS[letter],) * 3)
    return to_png(image)


# -- graphs ----------------------------------------------------------------------------------------


class Net:
    """A graph under construction: values are named in the order they are made."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []

    def add(self, op: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        name = name or f"v{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def const(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"w{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def weights(self, rows: int, *, seed: int) -> str:
        return self.const(np.random.default_rng(seed).normal(size=(rows, DIM)))

    def save(
        self,
        path: Path,
        input_: tuple[str, int, Sequence[Any]],
        outputs: Sequence[tuple[str, int, Sequence[Any]]],
        metadata: dict[str, str] | None = None,
    ) -> None:
        graph = helper.make_graph(
            self._nodes,
            "tiny",
            [helper.make_tensor_value_info(*input_)],
            [helper.make_tensor_value_info(*output) for output in outputs],
            self._weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        model.ir_version = 8
        helper.set_model_props(model, metadata or {})
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, path)


FLOAT, UINT8 = TensorProto.FLOAT, TensorProto.UINT8


def _planes(net: Net, name: str, *, fused: bool, scale: Any, offset: Any) -> str:
    """The input as normalised NCHW: as it comes, or made from bytes where the graph is fused."""
    if not fused:
        return name
    pixels = net.add("Cast", name, to=FLOAT)
    scaled = net.add("Add", net.add("Mul", pixels, net.const(scale)), net.const(offset))
    return net.add("Transpose", scaled, perm=[0, 3, 1, 2])


def _image_input(name: str, n: Any, h: Any, w: Any, *, fused: bool) -> tuple[str, int, list[Any]]:
    return (name, UINT8, [n, h, w, 3]) if fused else (name, FLOAT, [n, 3, h, w])


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def make_visual(path: Path, *, fused: bool = False, dim: int = DIM) -> None:
    net = Net()
    std = np.array(STD)
    planes = _planes(net, "image", fused=fused, scale=1 / 255 / std, offset=-np.array(MEAN) / std)
    pooled = net.add("AveragePool", planes, kernel_shape=[16, 16], strides=[16, 16])
    flat = net.add("Flatten", pooled)
    weights = net.const(np.random.default_rng(1).normal(size=(12, dim)))
    net.add("LpNormalization", net.add("MatMul", flat, weights), name="embedding", axis=1, p=2)
    net.save(
        path,
        _image_input("image", "n", SIDE_PX, SIDE_PX, fused=fused),
        [("embedding", FLOAT, ["n", dim])],
    )


def make_textual(path: Path) -> None:
    net = Net()
    table = net.const(np.random.default_rng(2).normal(size=(VOCABULARY, 16)))
    mean = net.add("ReduceMean", net.add("Gather", table, "text"), axes=[1], keepdims=0)
    vector = net.add("MatMul", mean, net.weights(16, seed=3))
    net.add("LpNormalization", vector, name="embedding", axis=1, p=2)
    net.save(path, ("text", TensorProto.INT32, ["n", CONTEXT]), [("embedding", FLOAT, ["n", DIM])])


LANDMARKS = (-0.8, -0.5, 0.8, -0.5, 0.0, 0.1, -0.6, 0.9, 0.6, 0.9)  # cells from the centre


def make_face_detector(path: Path, *, fused: bool = False, scale: float = 1.0) -> None:
    """Score = brightness of 4x4 cells less that of the ring around them; `scale` spoils boxes."""
    net = Net()
    planes = _planes(net, "input.1", fused=fused, scale=1 / 128, offset=-127.5 / 128)
    grey = net.add("ReduceMean", planes, axes=[1])
    light = net.add("Add", net.add("Mul", grey, net.const(128 / 255)), net.const(0.5))  # 0..1
    heads: dict[str, list[tuple[str, int, list[int]]]] = {"score": [], "box": [], "landmark": []}
    for stride in (8, 16, 32):
        rows = 2 * (640 // stride) ** 2
        cells = net.add("AveragePool", light, kernel_shape=[stride] * 2, strides=[stride] * 2)
        inner = _around(net, cells, 4)
        outer = _around(net, cells, 6)
        ring = net.add(
            "Sub", net.add("Mul", outer, net.const(36 / 20)), net.add("Mul", inner, net.const(0.8))
        )
        score = net.add("Clip", net.add("Sub", inner, ring), net.const(0), net.const(1))
        column = net.add("Reshape", score, net.const([-1, 1], np.int64))
        both = net.add("Mul", column, net.const([[1, 0.5]]))  # the second anchor of each cell
        shapes = {"score": both, "box": [[2.0 * scale] * 4], "landmark": [LANDMARKS]}
        for kind, width in (("score", 1), ("box", 4), ("landmark", 10)):
            shape = net.const([rows, width], np.int64)
            name = f"{kind}_{stride}"
            if kind == "score":
                net.add("Reshape", both, shape, name=name)
            else:
                net.add("Expand", net.const(shapes[kind]), shape, name=name)
            heads[kind].append((name, FLOAT, [rows, width]))
    outputs = [*heads["score"], *heads["box"], *heads["landmark"]]
    net.save(path, _image_input("input.1", 1, 640, 640, fused=fused), outputs)


def _around(net: Net, cells: str, side: int) -> str:
    """Mean of `side` x `side` cells around the top-left corner of each cell; black outside."""
    before, after = side // 2, side // 2 - 1
    return net.add(
        "AveragePool",
        cells,
        kernel_shape=[side, side],
        pads=[before, before, after, after],
        count_include_pad=1,
    )


def make_face_recogniser(path: Path, *, fused: bool = False, seed: int = 4) -> None:
    net = Net()
    planes = _planes(net, "input.1", fused=fused, scale=1 / 127.5, offset=-1)
    pooled = net.add("AveragePool", planes, kernel_shape=[56, 56], strides=[56, 56])
    net.add("MatMul", net.add("Flatten", pooled), net.weights(12, seed=seed), name="vector")
    net.save(
        path,
        _image_input("input.1", "n", 112, 112, fused=fused),
        [("vector", FLOAT, ["n", DIM])],
    )


def make_text_detector(path: Path, *, fused: bool = False) -> None:
    net = Net()
    planes = _planes(net, "x", fused=fused, scale=1 / 127.5, offset=-1)
    grey = net.add("ReduceMean", planes, axes=[1])  # -1..1
    net.add("Add", net.add("Mul", grey, net.const(-0.5)), net.const(0.5), name="darkness")
    net.save(
        path, _image_input("x", 1, "h", "w", fused=fused), [("darkness", FLOAT, [1, 1, "h", "w"])]
    )


def make_text_recogniser(path: Path, *, fused: bool = False) -> None:
    """Reads the shade of every 8 columns of the middle rows; a step with an edge in it is blank."""
    net = Net()
    planes = _planes(net, "x", fused=fused, scale=1 / 127.5, offset=-1)
    rows = net.add(
        "Slice", planes, *(net.const([value], np.int64) for value in (20, 28, 2))
    )  # (N, 3, 8, W)
    columns = net.add("ReduceMean", rows, axes=[1, 2], keepdims=0)  # (N, W)
    line = net.add("Unsqueeze", columns, net.const([1], np.int64))
    high = net.add("MaxPool", line, kernel_shape=[8], strides=[8])
    low = net.add("Neg", net.add("MaxPool", net.add("Neg", line), kernel_shape=[8], strides=[8]))
    shade = net.add("Mul", net.add("Add", high, low), net.const(0.5))
    edge = net.add("Mul", net.add("Sub", high, low), net.const(100))
    distances = [
        net.add("Abs", net.add("Sub", shade, net.const(value))) for value in (*_UNIT.values(), 9.0)
    ]
    blank = net.add("Sub", net.add("Relu", net.add("Neg", shade)), edge)
    logits = net.add(
        "Mul", net.add("Concat", blank, *distances, axis=1), net.const(-40)
    )  # (N, classes, T)
    steps = net.add("Transpose", logits, perm=[0, 2, 1])
    classes = len(_UNIT) + 2
    image = _image_input("x", "n", 48, "w", fused=fused)
    if fused:
        scores = net.add("Softmax", steps, axis=-1)
        net.add("ArgMax", scores, name="ctc_indices", axis=-1, keepdims=0)
        net.add("ReduceMax", scores, name="ctc_confidences", axes=[-1], keepdims=0)
        indices = ("ctc_indices", TensorProto.INT64, ["n", "t"])
        net.save(path, image, [indices, ("ctc_confidences", FLOAT, ["n", "t"])])
        (path.parent / "charset.txt").write_text("\n".join(_UNIT))
        return
    net.add("Softmax", steps, name="fetch_name_0", axis=-1)
    characters = {"character": "\n".join(_UNIT)}
    net.save(path, image, [("fetch_name_0", FLOAT, ["n", "t", classes])], characters)


# -- the folder ------------------------------------------------------------------------------------


def make_tokenizer(folder: Path) -> None:
    vocabulary = {word: row for row, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
        "pre_tokenizer": {"type": "Whitespace"},
        "added_tokens": [],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))


def make_models(folder: Path, *, fused: bool = False) -> None:
    """All models, in the layout of Immich's cache; the fused form under revision `v2`."""
    revision = "v2" if fused else "."
    clip = folder / "clip" / CLIP / revision
    make_visual(clip / "visual" / "model.onnx", fused=fused)
    config = {"size": [SIDE_PX, SIDE_PX], "mean": MEAN, "std": STD, "interpolation": "bicubic"}
    (clip / "visual" / "preprocess_cfg.json").write_text(json.dumps(config))
    make_textual(clip / "textual" / "model.onnx")
    make_tokenizer(clip / "textual")
    text_config = {"embed_dim": DIM, "text_cfg": {"context_length": CONTEXT}}
    (clip / "config.json").write_text(json.dumps(text_config))
    for seed, name in ((4, FACES), (5, FACES_TOO)):
        faces = folder / "facial-recognition" / name / revision
        make_face_detector(faces / "detection" / "model.onnx", fused=fused)
        make_face_recogniser(faces / "recognition" / "model.onnx", fused=fused, seed=seed)
    ocr = folder / "ocr" / OCR / revision
    make_text_detector(ocr / "detection" / "model.onnx", fused=fused)
    make_text_recogniser(ocr / "recognition" / "model.onnx", fused=fused)
