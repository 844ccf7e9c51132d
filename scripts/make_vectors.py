"""Write `tests/data/vectors/*.json`: small inputs and what `docs/contract.md` makes of them.

Plain Python from the formulas of that page. It imports nothing of the service, so that a mistake in
the service cannot hide in the numbers it is tested with.
"""

import json
import math
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "tests" / "data" / "vectors"
DIGITS = 6  # what is kept of a computed number

Point = tuple[float, float]


def main() -> None:
    """Write every file."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, make in VECTORS.items():
        cases = ",\n".join(json.dumps(case, ensure_ascii=False) for case in make())
        (FOLDER / f"{name}.json").write_text(f"[\n{cases}\n]\n", encoding="utf-8")


def rounded(value: Any) -> Any:
    """`value` with its numbers cut to the digits that are kept."""
    if isinstance(value, float):
        return round(value, DIGITS)
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value


# -- search (contract §4) --------------------------------------------------------------------------


def ramp(width: int, height: int) -> list[list[list[int]]]:
    """A picture by formula: three slanted waves, rows of RGB pixels."""
    return [
        [[128 + round(120 * math.sin((x * a + y * b) / 9)) for a, b in ((1, 2), (3, 1), (2, -1))]
         for x in range(width)]
        for y in range(height)
    ]  # fmt: skip


def cubic(distance: float) -> float:
    """The bicubic filter of antialiased resizing, a = -1/2."""
    t = abs(distance)
    if t < 1:
        return (1.5 * t - 2.5) * t * t + 1
    return ((-0.5 * t + 2.5) * t - 4) * t + 2 if t < 2 else 0.0


def resize_line(line: list[float], size: int) -> list[float]:
    """One row or column, antialiased, to bytes."""
    scale = len(line) / size
    width = max(1.0, scale)
    out = []
    for at in range(size):
        centre = (at + 0.5) * scale
        first = max(0, int(centre - 2 * width + 0.5))
        last = min(len(line), int(centre + 2 * width + 0.5))
        weights = [cubic((i - centre + 0.5) / width) for i in range(first, last)]
        mean = sum(w * line[first + k] for k, w in enumerate(weights)) / sum(weights)
        out.append(float(min(255, max(0, math.floor(mean + 0.5)))))
    return out


def resize_plane(plane: list[list[float]], width: int, height: int) -> list[list[float]]:
    """Across first, then down."""
    across = [resize_line(row, width) for row in plane]
    down = [resize_line(list(column), height) for column in zip(*across, strict=True)]
    return [list(row) for row in zip(*down, strict=True)]


def search_pictures() -> list[dict[str, Any]]:
    """Pictures in several shapes → the square the tower sees, one channel after the other."""
    cases = []
    for width, height, mode in ((40, 30, "shortest"), (25, 61, "shortest"), (37, 23, "squash")):
        side = 16
        if mode == "squash":
            new = (side, side)
        elif width < height:
            new = (side, int(height / width * side))
        else:
            new = (int(width / height * side), side)
        left, top = (int(length / 2 - side / 2) for length in new)
        picture = ramp(width, height)
        planes = []
        for channel in range(3):
            plane = [[float(pixel[channel]) for pixel in row] for row in picture]
            rows = resize_plane(plane, *new)[top : top + side]
            planes.append([[int(value) for value in row[left : left + side]] for row in rows])
        cases.append({"size": [width, height], "side": side, "resize_mode": mode, "planes": planes})
    return cases


def search_texts() -> list[dict[str, Any]]:
    """Texts → what the tokenizer gets."""
    texts = (
        "  a  red\tcar ",
        "Don't!  (stop)",
        "Straße, 24h",
        "\n",
        "日本の 写真。",
        "C.A.P.S-lock_ON",
    )
    cases = []
    for text in texts:
        for is_siglip in (False, True):
            clean = " ".join(text.split())
            if is_siglip:
                clean = "".join(c for c in clean if c not in string.punctuation).lower()
            cases.append({"text": text, "canonicalize": is_siglip, "clean": clean})
    return cases


# -- faces (contract §5) ---------------------------------------------------------------------------


def face_canvas() -> list[dict[str, Any]]:
    """Sizes of pictures → their size on the canvas."""
    sizes = ((640, 480), (480, 640), (1440, 1080), (333, 1000), (1000, 7), (1, 2000), (641, 640))
    return [
        {"size": [w, h], "fitted": [max(1, 640 * w // max(w, h)), max(1, 640 * h // max(w, h))]}
        for w, h in sizes
    ]


def iou(a: list[float], b: list[float]) -> float:
    """Overlap of two boxes by their union."""
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, wide) * max(0.0, high)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return both / (sum(areas) - both)


def face_heads() -> list[dict[str, Any]]:
    """What three strides fire → faces."""
    draw = random.Random(5)
    cases = []
    for scale in (1.0, 0.5, 640 / 1440):
        hits, faces = [], []
        for _ in range(12):
            stride = draw.choice((8, 16, 32))
            row = draw.randrange((640 // stride) ** 2 * 2)
            score = round(draw.uniform(0.4, 0.99), 3)
            reach = [round(draw.uniform(0.5, 6), 2) for _ in range(4)]
            points = [round(draw.uniform(-3, 3), 2) for _ in range(10)]
            hits.append(
                {"stride": stride, "row": row, "score": score, "reach": reach, "points": points}
            )
            x, y = row // 2 % (640 // stride) * stride, row // 2 // (640 // stride) * stride
            box = [x - reach[0] * stride, y - reach[1] * stride]
            box += [x + reach[2] * stride, y + reach[3] * stride]
            marks = [[(x + points[k] * stride) / scale, (y + points[k + 1] * stride) / scale]
                     for k in range(0, 10, 2)]  # fmt: skip
            if score >= 0.6:
                faces.append((score, [value / scale for value in box], marks))
        kept: list[tuple[float, list[float], Any]] = []
        for face in sorted(faces, key=lambda face: -face[0]):
            if all(iou(face[1], other[1]) <= 0.4 for other in kept):
                kept.append(face)
        found = [{"score": s, "box": [float(round(v)) for v in b], "landmarks": rounded(m)}
                 for s, b, m in kept]  # fmt: skip
        cases.append({"scale": scale, "min_score": 0.6, "hits": hits, "faces": found})
    return cases


PLACES = (
    *((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366)),
    *((41.5493, 92.3655), (70.7299, 92.2041)),
)


def face_alignment() -> list[dict[str, Any]]:
    """Five points → the similarity; found by solving the normal equations, entry by entry."""
    draw = random.Random(7)
    cases = []
    for angle, scale in ((0.0, 1.0), (0.6, 2.5), (-1.2, 0.4), (3.0, 1.7)):
        points = []
        for px, py in PLACES:
            x = scale * (px * math.cos(angle) - py * math.sin(angle)) + 100 + draw.uniform(-3, 3)
            y = scale * (px * math.sin(angle) + py * math.cos(angle)) + 80 + draw.uniform(-3, 3)
            points.append((round(x, 3), round(y, 3)))
        cases.append({"points": points, "matrix": rounded(similarity(points))})
    return cases


def similarity(points: list[Point]) -> list[list[float]]:
    """(2, 3) that takes the points nearest to their places, as ax - by + c, bx + ay + d."""
    n = len(points)
    mx, my = (sum(p[k] for p in points) / n for k in (0, 1))
    qx, qy = (sum(q[k] for q in PLACES) / n for k in (0, 1))
    a = b = spread = 0.0
    for (x, y), (u, v) in zip(points, PLACES, strict=True):
        a += (x - mx) * (u - qx) + (y - my) * (v - qy)
        b += (x - mx) * (v - qy) - (y - my) * (u - qx)
        spread += (x - mx) ** 2 + (y - my) ** 2
    a, b = a / spread, b / spread
    return [[a, -b, qx - a * mx + b * my], [b, a, qy - b * mx - a * my]]


# -- text (contract §6) ----------------------------------------------------------------------------


def text_sizes() -> list[dict[str, Any]]:
    """Sizes of pictures → the size they are looked at."""
    cases = []
    for width, height in (
        (1440, 1080),
        (640, 480),
        (100, 3000),
        (12000, 900),
        (33, 40),
        (2000, 2000),
    ):
        for most in (736, 1440):
            ratio = min(1.0, most / min(width, height))
            ratio = min(ratio, math.sqrt(2880 * 1440 / (width * height)))
            looked = [max(32, round(side * ratio / 32) * 32) for side in (width, height)]
            cases.append({"size": [width, height], "max_resolution": most, "looked_at": looked})
    return cases


def text_order() -> list[dict[str, Any]]:
    """First corners of boxes → their reading order."""
    draw = random.Random(11)
    cases = []
    for count in (1, 2, 5, 9):
        corners = [[draw.randrange(0, 600), draw.randrange(0, 80)] for _ in range(count)]
        by_y = sorted(range(count), key=lambda k: corners[k][1])
        lines: list[list[int]] = []
        for k in by_y:
            if lines and corners[k][1] - corners[lines[-1][-1]][1] < 10:
                lines[-1].append(k)
            else:
                lines.append([k])
        order = [k for line in lines for k in sorted(line, key=lambda k: corners[k][0])]
        cases.append({"corners": corners, "order": order})
    return cases


def text_widths() -> list[dict[str, Any]]:
    """Shapes of lines → the width of their tensor."""
    sizes = ((10, 48), (96, 48), (500, 48), (333, 31), (2000, 48), (9000, 40))
    return [
        {"size": [w, h], "width": min(2048, max(224, math.ceil(1.25 * int(48 * (w / h)))))}
        for w, h in sizes
    ]


def text_steps() -> list[dict[str, Any]]:
    """Best class and its probability per step → text and score."""
    draw = random.Random(13)
    charset = ["", *"abc", " "]
    cases = []
    for length in (0, 1, 6, 24):
        classes = [draw.choice((0, 0, 1, 1, 2, 3, 4)) for _ in range(length)]
        confidences = [round(draw.uniform(0.3, 1), 3) for _ in range(length)]
        kept = [k for k, c in enumerate(classes) if c and (k == 0 or classes[k - 1] != c)]
        score = sum(confidences[k] for k in kept) / len(kept) if kept else 0.0
        text = "".join(charset[classes[k]] for k in kept)
        cases.append(
            {"classes": classes, "confidences": confidences, "text": text, "score": rounded(score)}
        )
    return cases


VECTORS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "search_pictures": search_pictures,
    "search_texts": search_texts,
    "face_canvas": face_canvas,
    "face_heads": face_heads,
    "face_alignment": face_alignment,
    "text_sizes": text_sizes,
    "text_order": text_order,
    "text_widths": text_widths,
    "text_steps": text_steps,
}

if __name__ == "__main__":
    main()
