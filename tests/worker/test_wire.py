import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from immich_ml_metal.errors import InvalidEntries, InvalidOutput, UnknownModel
from immich_ml_metal.types import (
    Answer,
    ClipTextual,
    ClipVisual,
    FaceDetection,
    FaceRecognition,
    Faces,
    Floats,
    ModelKey,
    Part,
    RecognisedFaces,
    Task,
    TaskRequest,
    TextDetection,
    TextLines,
    TextRecognition,
    TextRegions,
)
from immich_ml_metal.worker.wire import count_items, parse_entries, render

CLIP, FACE, OCR = "ViT-B-32__openai", "buffalo_l", "PP-OCRv6_tiny"
VISUAL = ModelKey(Task.CLIP, Part.VISUAL, CLIP)
TEXTUAL = ModelKey(Task.CLIP, Part.TEXTUAL, CLIP)
FACE_BOXES = ModelKey(Task.FACES, Part.DETECTION, FACE)
FACE_VECTORS = ModelKey(Task.FACES, Part.RECOGNITION, FACE)
TEXT_BOXES = ModelKey(Task.OCR, Part.DETECTION, OCR)
TEXT_READER = ModelKey(Task.OCR, Part.RECOGNITION, OCR)


def parse(entries: Any) -> TaskRequest:
    text = entries if isinstance(entries, str) else json.dumps(entries)
    return parse_entries(text, face_min_score=0.6)


def one(task: str, part: str, name: str, **options: Any) -> dict[str, Any]:
    return {task: {part: {"modelName": name, "options": options}}}


# -- entries: the four calls of Immich's server (contract §1.4) ------------------------------------


def test_encode_image() -> None:
    entries = {"clip": {"visual": {"modelName": CLIP}}}
    assert parse(entries) == TaskRequest(clip_visual=ClipVisual(VISUAL))


@pytest.mark.parametrize(
    ("options", "language"),
    [
        ({}, None),
        ({"language": None}, None),
        ({"language": "de"}, "de"),
        ({"language": "en-null"}, "en-null"),
        ({"language": ""}, ""),
    ],
)
def test_encode_text(options: dict[str, Any], language: str | None) -> None:
    request = parse(one("clip", "textual", CLIP, **options))
    assert request == TaskRequest(clip_textual=ClipTextual(TEXTUAL, language))


def test_detect_faces() -> None:
    entries = {
        "facial-recognition": {
            "detection": {"modelName": FACE, "options": {"minScore": 0.034}},
            "recognition": {"modelName": FACE},
        }
    }
    assert parse(entries) == TaskRequest(
        face_detection=FaceDetection(FACE_BOXES, 0.034),
        face_recognition=FaceRecognition(FACE_VECTORS),
    )


def test_read_text() -> None:
    detection = {"modelName": OCR, "options": {"minScore": 0.4, "maxResolution": 1440}}
    recognition = {"modelName": OCR, "options": {"minScore": 0.8}}
    expected = TaskRequest(
        text_detection=TextDetection(TEXT_BOXES, 0.4, 1440),
        text_recognition=TextRecognition(TEXT_READER, 0.8),
    )
    assert parse({"ocr": {"detection": detection, "recognition": recognition}}) == expected
    # the order of keys is irrelevant
    assert parse({"ocr": {"recognition": recognition, "detection": detection}}) == expected


# -- entries: options (contract §1.3) --------------------------------------------------------------


def test_missing_options_get_the_defaults() -> None:
    entries = {
        "facial-recognition": {"detection": {"modelName": FACE}},
        "ocr": {"detection": {"modelName": OCR}, "recognition": {"modelName": OCR}},
    }
    assert parse(entries) == TaskRequest(
        face_detection=FaceDetection(FACE_BOXES, 0.6),  # the setting
        text_detection=TextDetection(TEXT_BOXES, 0.5, 736),
        text_recognition=TextRecognition(TEXT_READER, 0.9),
    )


@pytest.mark.parametrize(
    ("task", "part", "name"),
    [
        ("clip", "visual", CLIP),
        ("clip", "textual", CLIP),
        ("facial-recognition", "detection", FACE),
        ("facial-recognition", "recognition", FACE),
        ("ocr", "detection", OCR),
        ("ocr", "recognition", OCR),
    ],
)
def test_unknown_options_are_ignored_and_null_options_refused(
    task: str, part: str, name: str
) -> None:
    plain = parse({task: {part: {"modelName": name}}})
    assert parse(one(task, part, name, scoreMode="slow", cache_dir="/etc")) == plain
    with pytest.raises(InvalidEntries, match=rf"{task}\.{part}\.options: must be an object"):
        parse({task: {part: {"modelName": name, "options": None}}})


def test_numbers_may_be_strings() -> None:
    request = parse(one("ocr", "detection", OCR, minScore="0.25", maxResolution="1088"))
    assert request.text_detection == TextDetection(TEXT_BOXES, 0.25, 1088)


@pytest.mark.parametrize("score", [0, 1, 0.5, "0.25"])
def test_a_score_may_be_anything_from_0_to_1(score: Any) -> None:
    request = parse(one("facial-recognition", "detection", FACE, minScore=score))
    assert request.face_detection == FaceDetection(FACE_BOXES, float(score))


@pytest.mark.parametrize("score", [-0.01, 1.01, "nan", "inf", "high", None, [0.5], {}])
@pytest.mark.parametrize(
    ("task", "part", "name"),
    [
        ("facial-recognition", "detection", FACE),
        ("ocr", "detection", OCR),
        ("ocr", "recognition", OCR),
    ],
)
def test_another_score_is_refused(task: str, part: str, name: str, score: Any) -> None:
    with pytest.raises(InvalidEntries, match=rf"{task}\.{part}\.options\.minScore: input should"):
        parse(one(task, part, name, minScore=score))


@pytest.mark.parametrize("resolution", [0, -1, 736.5, "large", None])
def test_a_resolution_is_a_whole_number_from_1(resolution: Any) -> None:
    with pytest.raises(InvalidEntries, match=r"ocr\.detection\.options\.maxResolution: input"):
        parse(one("ocr", "detection", OCR, maxResolution=resolution))


# -- entries: structure (contract §1.3, §1.6) ------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("", "entries is not JSON"),
        ("nope", "entries is not JSON"),
        ("{'clip': 1}", "entries is not JSON"),
        ('{"clip": NaN}', "entries is not JSON"),
        ("\ud800", "entries is not JSON"),
        ("[" * 100_000, "entries is not JSON"),
        ("[]", r"top level: must be an object \(got \[\]\)"),
        ("3", "top level: must be an object"),
        ('"clip"', "top level: must be an object"),
        ("null", "top level: must be an object"),
        ({}, "^No model task requested.$"),
        ({"clip": {}}, "^No model task requested.$"),
        ({"clip": {"visual": None, "textual": None}}, "^No model task requested.$"),
        ({"clip": None}, r"clip: must be an object \(got None\)"),
        ({"ocr": []}, r"ocr: must be an object"),
        ({"video": {}}, r"video: extra inputs are not permitted"),
        ({"faces": {}}, r"faces: extra inputs are not permitted"),
        ({"clip": {"audio": {"modelName": CLIP}}}, r"clip\.audio: extra inputs"),
        ({"clip": {"visual": CLIP}}, r"clip\.visual: must be an object"),
        ({"clip": {"visual": {}}}, r"clip\.visual\.modelName: field required"),
        ({"clip": {"visual": {"modelName": 3}}}, r"modelName: input should be a valid string"),
        ({"clip": {"visual": {"modelName": None}}}, r"modelName: input should be a valid string"),
        ({"clip": {"visual": {"modelName": CLIP, "x": 1}}}, r"clip\.visual\.x: extra inputs"),
        (one("clip", "textual", CLIP, language=5), r"language: input should be a valid string"),
    ],
)
def test_another_structure_is_refused(entries: Any, message: str) -> None:
    with pytest.raises(InvalidEntries, match=message):
        parse(entries)


def test_a_refusal_stays_short() -> None:
    with pytest.raises(InvalidEntries) as caught:
        parse({f"task{n}": "x" * 10_000 for n in range(1000)})
    assert len(str(caught.value)) < 1000
    assert str(caught.value).count("extra inputs") == 5


def test_a_null_type_counts_as_absent() -> None:
    entries = {"clip": {"visual": {"modelName": CLIP}, "textual": None}}
    assert parse(entries) == TaskRequest(clip_visual=ClipVisual(VISUAL))


def test_tasks_combine_and_parts_may_name_different_models() -> None:
    entries = {
        "ocr": {"recognition": {"modelName": OCR}},
        "facial-recognition": {
            "recognition": {"modelName": "buffalo_s"},
            "detection": {"modelName": FACE},
        },
        "clip": {"visual": {"modelName": CLIP}, "textual": {"modelName": CLIP}},
    }
    assert parse(entries) == TaskRequest(
        clip_visual=ClipVisual(VISUAL),
        clip_textual=ClipTextual(TEXTUAL),
        face_detection=FaceDetection(FACE_BOXES, 0.6),
        face_recognition=FaceRecognition(ModelKey(Task.FACES, Part.RECOGNITION, "buffalo_s")),
        text_recognition=TextRecognition(TEXT_READER, 0.9),
    )


# -- entries: names (contract §2.1) ----------------------------------------------------------------


@pytest.mark.parametrize(
    "spelling",
    [
        "ViT-B-32__openai",
        "ViT-B-32::openai",
        "immich-app/ViT-B-32__openai",
        "a/b/ViT-B-32::openai",
        "ViT-B-32\\:openai",
        "ViT-B-32_:openai",
        "ViT-B-32__open.ai",
    ],
)
def test_names_are_cleaned(spelling: str) -> None:
    assert parse(one("clip", "visual", spelling)).clip_visual == ClipVisual(VISUAL)


@pytest.mark.parametrize(
    ("task", "part", "name"),
    [
        ("clip", "textual", "ViT-B-33__openai"),
        ("clip", "visual", "vit-b-32__openai"),  # case counts
        ("clip", "visual", "ViT-B-32__openai/"),
        ("clip", "visual", ""),
        ("clip", "textual", "buffalo_l"),
        ("facial-recognition", "detection", CLIP),
        ("ocr", "recognition", "buffalo_l"),
    ],
)
def test_an_unknown_or_unfit_model_is_named_never_replaced(task: str, part: str, name: str) -> None:
    with pytest.raises(UnknownModel) as caught:
        parse(one(task, part, name))
    assert repr(name) in str(caught.value)


# -- answers: exact bytes (contract §1.5) ----------------------------------------------------


def floats(*values: Any) -> Floats:
    return np.array(values, dtype=np.float32)


def faces(count: int) -> Faces:
    boxes = floats([72, 64, 104, 112], [690, -89, 833, 96]).reshape(-1, 4)
    landmarks = np.arange(20, dtype=np.float32).reshape(2, 5, 2) + np.float32(0.5)
    return Faces(boxes[:count], floats(0.9, 0.035756)[:count], landmarks[:count])


def test_a_picture_vector() -> None:
    answer = Answer(size=(600, 800), clip=floats(-0.013126737, 0.7, 1e-8, 1, 0))
    assert render(answer) == (
        b'{"clip":"[-0.013126737,0.7,1e-8,1.0,0.0]","imageHeight":800,"imageWidth":600}'
    )


def test_a_text_vector_has_no_image_keys() -> None:
    assert render(Answer(clip=floats(0.5, -2))) == b'{"clip":"[0.5,-2.0]"}'


def test_recognised_faces() -> None:
    found = RecognisedFaces(faces(2), floats([0.25, -0.5], [3, 1e-8]))
    assert render(Answer(size=(1000, 500), faces=found)) == (
        b'{"facial-recognition":['
        b'{"boundingBox":{"x1":72.0,"y1":64.0,"x2":104.0,"y2":112.0},'
        b'"embedding":"[0.25,-0.5]","score":0.9},'
        b'{"boundingBox":{"x1":690.0,"y1":-89.0,"x2":833.0,"y2":96.0},'
        b'"embedding":"[3.0,1e-8]","score":0.035756}],'
        b'"imageHeight":500,"imageWidth":1000}'
    )


def test_no_faces() -> None:
    found = RecognisedFaces(faces(0), np.empty((0, 512), np.float32))
    assert render(Answer(size=(4, 3), faces=found)) == (
        b'{"facial-recognition":[],"imageHeight":3,"imageWidth":4}'
    )


def test_faces_without_vectors() -> None:
    assert render(Answer(size=(4, 3), faces=faces(1))) == (
        b'{"facial-recognition":{"boxes":[[72.0,64.0,104.0,112.0]],"scores":[0.9],'
        b'"landmarks":[[[0.5,1.5],[2.5,3.5],[4.5,5.5],[6.5,7.5],[8.5,9.5]]]},'
        b'"imageHeight":3,"imageWidth":4}'
    )


def test_no_faces_without_vectors() -> None:
    assert render(Answer(size=(4, 3), faces=faces(0))) == (
        b'{"facial-recognition":{"boxes":[],"scores":[],"landmarks":[]},'
        b'"imageHeight":3,"imageWidth":4}'
    )


def test_read_lines() -> None:
    lines = TextLines(
        quads=floats([[0.1, 0.2], [0.5, 0.2], [0.5, 0.25], [0.1, 0.25]]).reshape(1, 4, 2),
        box_scores=floats(0.75),
        texts=('Gruß "λ" 漢\n',),
        text_scores=floats(1),
    )
    assert render(Answer(size=(4, 3), text=lines)).decode() == (
        '{"ocr":{"box":[0.1,0.2,0.5,0.2,0.5,0.25,0.1,0.25],"text":["Gruß \\"λ\\" 漢\\n"],'
        '"boxScore":[0.75],"textScore":[1.0]},"imageHeight":3,"imageWidth":4}'
    )


def test_no_lines() -> None:
    empty = np.empty(0, np.float32)
    answer = Answer(size=(4, 3), text=TextLines(empty.reshape(0, 4, 2), empty, (), empty))
    assert json.loads(render(answer))["ocr"] == {
        "box": [],
        "boxScore": [],
        "text": [],
        "textScore": [],
    }


def test_text_boxes_alone() -> None:
    regions = TextRegions(
        floats([[8, 9], [40, 9], [40, 20], [8, 20]]).reshape(1, 4, 2), floats(0.6)
    )
    assert render(Answer(size=(64, 32), text=regions)) == (
        b'{"ocr":{"boxes":[[[8.0,9.0],[40.0,9.0],[40.0,20.0],[8.0,20.0]]],"scores":[0.6]},'
        b'"imageHeight":32,"imageWidth":64}'
    )


def test_an_answers_items_are_its_faces_and_its_lines() -> None:
    found = RecognisedFaces(faces(2), floats([0.0], [1.0]))
    assert count_items(Answer(size=(1, 1), faces=found)) == 2
    assert count_items(Answer(size=(1, 1), faces=faces(1))) == 1
    assert count_items(Answer(clip=floats(1.0))) == 0


def test_several_tasks_in_one_answer() -> None:
    answer = Answer(
        size=(4, 3),
        clip=floats(1),
        faces=faces(0),
        text=TextRegions(np.empty((0, 4, 2), np.float32), np.empty(0, np.float32)),
    )
    assert list(json.loads(render(answer))) == [
        "clip",
        "facial-recognition",
        "ocr",
        "imageHeight",
        "imageWidth",
    ]


def test_strided_arrays_are_rendered_too() -> None:
    wide = np.stack([faces(2).scores, faces(2).scores], axis=1)
    strided = Faces(np.asfortranarray(faces(2).boxes), wide[:, 0], faces(2).landmarks[:, ::-1])
    scores = json.loads(render(Answer(size=(4, 3), faces=strided)))["facial-recognition"]["scores"]
    assert floats(*scores).tolist() == faces(2).scores.tolist()


@given(
    hnp.arrays(
        np.float32,
        st.integers(1, 40),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
def test_every_float32_comes_back_exactly_from_its_shortest_form(values: Floats) -> None:
    text = json.loads(render(Answer(clip=values)))["clip"]
    assert " " not in text
    numbers = text.strip("[]").split(",")
    np.testing.assert_array_equal(np.array([np.float32(number) for number in numbers]), values)
    # no float32 needs more than 9 digits
    digits = [
        number.lower().split("e")[0].strip("-").replace(".", "").strip("0") for number in numbers
    ]
    assert max(map(len, digits)) <= 9


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_json_cannot_say_is_never_sent(bad: float) -> None:
    quads = np.full((1, 4, 2), 0.5, np.float32)
    answers = [
        Answer(clip=floats(1, bad)),
        Answer(faces=RecognisedFaces(faces(1), floats([bad, 1]))),
        Answer(faces=Faces(floats([bad, 0, 1, 1]).reshape(1, 4), floats(1), faces(1).landmarks)),
        Answer(text=TextRegions(quads * np.float32(bad), floats(0.5))),
        Answer(text=TextLines(quads, floats(0.5), ("x",), floats(bad))),
    ]
    for answer in answers:
        with pytest.raises(InvalidOutput, match="not finite"):
            render(answer)


def test_lists_of_unequal_length_are_never_sent() -> None:
    lines = TextLines(np.zeros((2, 4, 2), np.float32), floats(1, 1), ("one",), floats(1, 1))
    with pytest.raises(AssertionError, match="side by side"):
        render(Answer(text=lines))
    with pytest.raises(ValueError, match="shorter"):
        render(Answer(faces=RecognisedFaces(faces(2), np.ones((1, 512), np.float32))))


@pytest.mark.parametrize(("corners", "message"), [(3, "shorter"), (5, "longer")])
def test_a_box_that_has_not_four_numbers_is_never_sent(corners: int, message: str) -> None:
    odd = Faces(np.zeros((1, corners), np.float32), floats(1), faces(1).landmarks)
    with pytest.raises(ValueError, match=message):
        render(Answer(faces=RecognisedFaces(odd, np.ones((1, 512), np.float32))))


# -- what a real client sends, and what the official service answered ------------------------------


@pytest.mark.shared
@pytest.mark.parametrize("call", ["clip_visual", "clip_textual", "faces", "ocr"])
def test_the_entries_of_a_recorded_request_are_understood(shared: Path, call: str) -> None:
    body = (shared / "wire" / f"{call}.http").read_bytes()
    entries = body.split(b'name="entries"\r\n\r\n')[1].split(b"\r\n")[0]
    request = parse(entries.decode())
    expected: dict[str, list[object]] = {
        "clip_visual": [request.clip_visual],
        "clip_textual": [request.clip_textual],
        "faces": [request.face_detection, request.face_recognition],
        "ocr": [request.text_detection, request.text_recognition],
    }
    asked = expected[call]
    assert all(asked)
    assert sum(getattr(request, name) is not None for name in TaskRequest.__slots__) == len(asked)


@pytest.mark.shared
def test_recorded_vectors_and_faces_are_rendered_byte_for_byte(shared: Path) -> None:
    for case in json.loads((shared / "golden" / "faces.json").read_text()):
        if case["status"] != 200 or not case["body"]["facial-recognition"]:
            continue
        body = case["body"]
        official = body["facial-recognition"]
        found = Faces(
            boxes=floats(*[list(face["boundingBox"].values()) for face in official]),
            scores=floats(*[face["score"] for face in official]),
            landmarks=np.zeros((len(official), 5, 2), np.float32),
        )
        vectors = floats(*[json.loads(face["embedding"]) for face in official])
        size = (body["imageWidth"], body["imageHeight"])
        rendered = render(Answer(size=size, faces=RecognisedFaces(found, vectors)))
        assert json.loads(rendered) == body  # the embeddings are compared as strings
        assert list(json.loads(rendered)) == list(body)


@pytest.mark.parametrize("depth", [3, 200, 1000, 30_000])
@pytest.mark.parametrize("place", ["%s", '{"clip": {"visual": {"modelName": %s}}}'])
@pytest.mark.parametrize(("opening", "end"), [('{"clip":', "}"), ("[", "]")])
def test_entries_nested_deeply_are_refused(place: str, opening: str, end: str, depth: int) -> None:
    nested = place % (opening * depth + "1" + end * depth)
    with pytest.raises(InvalidEntries) as refusal:
        parse_entries(nested, face_min_score=0.7)
    assert len(str(refusal.value)) < 1000
