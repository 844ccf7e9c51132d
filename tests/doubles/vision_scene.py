"""What there is to see for `vision_double`: faces and lines whose true places are known."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# A drawn face, upright: x to the right, y down, origin its middle, unit its height.
EYES = ((-0.18, -0.15), (0.18, -0.15))
NOSE = (0.02, 0.06)
MOUTH = ((-0.13, 0.23), (0.15, 0.23))
OUTLINE_POINTS = 8


@dataclass
class FaceTruth:
    """A face of the scene: where it is in pixels, and how far it is turned (clockwise as seen)."""

    centre: tuple[float, float]
    height: float
    turned_deg: float = 0.0
    confidence: float = 0.9
    has_landmarks: bool = True
    is_forgotten: bool = False  # the landmark request does not answer for it at all
    missing: tuple[str, ...] = ()  # names of Vision's regions that it does not report

    @property
    def five_points(self) -> np.ndarray[Any, Any]:
        """(5, 2) xy pixels in ArcFace's order."""
        return self.place([*EYES, NOSE, *MOUTH])

    def place(self, local: Sequence[tuple[float, float]]) -> np.ndarray[Any, Any]:
        """Upright face coordinates → (N, 2) xy pixels."""
        turn = math.radians(self.turned_deg)
        rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        placed: np.ndarray[Any, Any] = np.array(local) @ rotation.T * self.height + self.centre
        return placed

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Upright box around the turned face: xyxy pixels."""
        corners = self.place([(-0.4, -0.5), (0.4, -0.5), (0.4, 0.5), (-0.4, 0.5)])
        return (*corners.min(axis=0), *corners.max(axis=0))

    def regions(self) -> dict[str, np.ndarray[Any, Any]]:
        """Vision's regions by selector, in pixels."""
        steps = [2 * math.pi * index / OUTLINE_POINTS for index in range(OUTLINE_POINTS)]

        def around(x: float, y: float, wide: float, high: float) -> list[tuple[float, float]]:
            return [(x + wide * math.cos(a), y + high * math.sin(a)) for a in steps]

        mouth_x, mouth_half = (MOUTH[0][0] + MOUTH[1][0]) / 2, (MOUTH[1][0] - MOUTH[0][0]) / 2
        local = {
            "leftEye": around(*EYES[0], 0.06, 0.02),
            "rightEye": around(*EYES[1], 0.06, 0.02),
            "leftPupil": [EYES[0]],
            "rightPupil": [EYES[1]],
            "outerLips": around(mouth_x, MOUTH[0][1], mouth_half, 0.05),
            "noseCrest": [(0.0, -0.12), NOSE, (0.01, -0.03)],  # the tip is not the last one
            "nose": [(0, -0.12), (-0.03, 0), (-0.05, 0.07), (0.02, 0.05), (0.09, 0.07), (0.04, 0)],
        }
        return {name: self.place(points) for name, points in local.items()}


@dataclass
class LineTruth:
    """A line of the scene: corners (4, 2) xy pixels TL TR BR BL, and what Vision makes of it."""

    corners: Sequence[tuple[float, float]]
    text: str
    confidence: float = 1.0


@dataclass
class Scene:
    """What is to be seen. `swaps_sides`: whether Vision's "left" is the viewer's or the face's."""

    faces: Sequence[FaceTruth] = ()
    lines: Sequence[LineTruth] = ()
    languages: Sequence[str] = ("en-US", "fr-FR", "de-DE", "zh-Hans", "zh-Hant", "ja-JP", "ko-KR")
    swaps_sides: bool = False
