"""A comparison as one self-contained HTML page, with the worst pairs pictured."""

import base64
import io
from collections.abc import Iterable
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, UnidentifiedImageError

from immich_ml_metal.parity.compare import Comparison, FaceMatch
from immich_ml_metal.parity.judge import ParityReport, TaskSummary

WORST = 6  # pairs pictured per task
SAME = 1 - 1e-6  # float32 noise of a cosine
_SIDE_PX = 320
_OURS, _THEIRS = "#1a9850", "#d73027"
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid #8885; }
th:first-child, td:first-child, th:last-child, td.note { text-align: left; }
td:first-child { white-space: nowrap; }
.verdict { padding: .8rem 1rem; border-left: .4rem solid; font-size: 1.3rem; }
.level0 { border-color: #1a9850; } .level1 { border-color: #d9a400; }
.level2 { border-color: #d73027; } .level3 { border-color: #888; }
figure { display: inline-block; vertical-align: top; width: 19rem; margin: .6rem .8rem .6rem 0; }
figure img { max-width: 100%; border-radius: 4px; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; }
ul.lines { padding-left: 1rem; margin: .2rem 0; }
"""


def render_html(report: ParityReport) -> str:
    """The whole page; pictures are embedded as small JPEGs, so keep it as private as they are."""
    verdict = report.verdict
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in verdict.reasons)
    cause = f"<p>Most likely cause: {escape(report.cause)}.</p>" if report.cause else ""
    rows = "".join(_row(summary) for summary in report.summaries)
    worst = "".join(_worst(summary.task, report.comparisons) for summary in report.summaries)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Parity: {escape(verdict.words)}</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>
<h1>Parity</h1>
<p>Ours: {escape(report.ours)}<br>Against: {escape(report.theirs)}</p>
<p class="verdict level{int(verdict.level)}">{escape(verdict.words)}</p>
<ul>{reasons}</ul>{cause}
<table><tr><th>task</th><th>compared</th><th>min</th><th>p5</th><th>median</th><th>speed</th>
<th>what it means</th></tr>{rows}</table>{worst}
</body></html>
"""


def _row(summary: TaskSummary) -> str:
    figures = (summary.minimum, summary.p5, summary.median)
    cells = "".join(f"<td>{'-' if value is None else f'{value:.5f}'}</td>" for value in figures)
    speed = "-" if summary.speed is None else f"{summary.speed:.2f}x"
    faces = ""
    if summary.task == "faces":
        faces = (
            f"{summary.faces_both} found by both, {summary.faces_only_ours} only by ours, "
            f"{summary.faces_only_theirs} only by theirs. "
        )
    meaning = faces + (summary.reason or "the same")
    return (
        f"<tr><td>{escape(summary.task)}</td><td>{summary.count}</td>{cells}<td>{speed}</td>"
        f'<td class="note">{escape(meaning)}</td></tr>'
    )


def _worst(task: str, comparisons: Iterable[Comparison]) -> str:
    mine = [c for c in comparisons if c.task == task and (c.problem or _differs(c.value))]
    if not mine:
        return ""
    mine.sort(key=lambda c: -1.0 if c.value is None else c.value)
    figures = "".join(_figure(comparison) for comparison in mine[:WORST])
    return f"<h2>Lowest: {escape(task)}</h2>{figures}"


def _differs(value: float | None) -> bool:
    """Whether there is something to see; both refusing the picture is nothing."""
    return value is not None and value < SAME


def _figure(comparison: Comparison) -> str:
    value = comparison.problem or f"{comparison.value:.5f}"
    picture = "" if comparison.task == "clip text" else _thumbnail(comparison)
    name = comparison.subject if comparison.task == "clip text" else Path(comparison.subject).name
    caption = f"{escape(name)}<br>{escape(value)}{_faces_caption(comparison.faces)}"
    return (
        f"<figure>{picture}<figcaption>{caption}{_lines_caption(comparison)}</figcaption></figure>"
    )


def _faces_caption(match: FaceMatch | None) -> str:
    if match is None:
        return ""
    found = f"ours {len(match.ours.boxes)}, theirs {len(match.theirs.boxes)}"
    lowest = f", lowest cosine {min(match.cosines):.4f}" if match.cosines else ""
    return f"<br>{found}{lowest} (green: ours, red: theirs)"


def _lines_caption(comparison: Comparison) -> str:
    if comparison.lines is None:
        return ""
    ours, theirs = (set(lines) for lines in comparison.lines)
    items = [f"<li>only ours: {escape(line)}</li>" for line in sorted(ours - theirs)[:5]]
    items += [f"<li>only theirs: {escape(line)}</li>" for line in sorted(theirs - ours)[:5]]
    return f'<ul class="lines">{"".join(items)}</ul>' if items else ""


def _thumbnail(comparison: Comparison) -> str:
    try:
        picture = Image.open(comparison.subject).convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return "<p>(not a picture)</p>"
    if comparison.faces is not None:
        _draw_boxes(picture, comparison.faces)
    picture.thumbnail((_SIDE_PX, _SIDE_PX))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=80)
    encoded = base64.b64encode(out.getvalue()).decode()
    name = escape(Path(comparison.subject).name)
    return f'<img alt="{name}" src="data:image/jpeg;base64,{encoded}">'


def _draw_boxes(picture: Image.Image, match: FaceMatch) -> None:
    draw = ImageDraw.Draw(picture)
    width_px = max(2, max(picture.size) // 200)
    for boxes, colour in ((match.theirs.boxes, _THEIRS), (match.ours.boxes, _OURS)):
        for x1, y1, x2, y2 in boxes.tolist():
            draw.rectangle((x1, y1, x2, y2), outline=colour, width=width_px)
