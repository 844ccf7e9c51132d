"""Maps one engine's confidence onto another's scale, by straight lines between known points. Pure.

Immich's thresholds were chosen for its own detectors. Vision grades differently, so its grades are
translated before any threshold is applied; the order of two grades never changes.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Knots = tuple[tuple[float, float], ...]  # (Vision's confidence, the official model's score), 0..1

# Vision's rectangles request graded real faces 0.61 to 0.93 (public measurements of a peer), and
# at Immich's default minimum of 0.7 a quarter of them would vanish; 0.6 is the floor it settled on.
FACE_KNOTS: Knots = ((0.0, 0.0), (0.6, 0.7), (1.0, 1.0))

# Vision grades a line 0.3, 0.5 or 1.0 and nothing between (public issue reports). 1.0 is sure; 0.5
# is as a rule read correctly; 0.3 mostly is not. Immich keeps lines above 0.8: so 0.5 must land
# above it and 0.3 below, with room on both sides for a stricter or a more lenient setting.
LINE_KNOTS: Knots = ((0.0, 0.0), (0.3, 0.6), (0.5, 0.85), (1.0, 1.0))

# That a line is there is surer than what it says: Immich's box threshold of 0.5 keeps all three.
LINE_BOX_KNOTS: Knots = ((0.0, 0.0), (0.3, 0.55), (0.5, 0.8), (1.0, 1.0))


@dataclass(frozen=True, slots=True)
class Calibration:
    """A rising line through knots, the first at 0 and the last at 1 of the engine's scale."""

    knots: Knots

    def __post_init__(self) -> None:
        theirs, ours = zip(*self.knots, strict=True) if self.knots else ((), ())
        if len(theirs) < 2 or theirs[0] != 0 or theirs[-1] != 1:
            raise ValueError(f"calibration {self.knots} must run from 0 to 1")
        if not all(0 <= score <= 1 for score in ours):
            raise ValueError(f"calibration {self.knots} must stay in 0..1")
        if any(b <= a for scale in (theirs, ours) for a, b in pairwise(scale)):
            raise ValueError(f"calibration {self.knots} must rise all the way")

    def __call__(self, confidence: float) -> float:
        """Translate a confidence; out of range counts as the nearest end."""
        theirs, ours = zip(*self.knots, strict=True)
        return float(np.interp(confidence, theirs, ours))
