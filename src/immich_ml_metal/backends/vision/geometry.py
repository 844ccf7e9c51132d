"""From Vision's frames to ours, and from its landmark regions to ArcFace's five points. Pure.

Vision counts in 0..1 from the bottom-left corner, landmarks in 0..1 of the face's own box. We count
in pixels from the top-left corner of the picture. The conversion happens here and nowhere else.
"""

import numpy as np
from numpy.typing import NDArray

from immich_ml_metal.backends.vision.bridge import Points, SeenFace, SeenLandmarks
from immich_ml_metal.tasks.text_boxes import order_corners
from immich_ml_metal.types import Floats

Size = tuple[int, int]  # (width, height) of the picture in pixels

# Two eyes or two mouth corners closer than this share of the face box are not two points: a
# similarity fitted to them would be noise. A full profile still keeps its eyes about 0.1 apart.
MIN_SPREAD = 0.02


def to_pixels(points: Points, size: Size) -> Points:
    """Turn (N, 2) xy in 0..1, origin bottom-left, into pixels, origin top-left."""
    width, height = size
    return np.stack([points[:, 0] * width, (1.0 - points[:, 1]) * height], axis=1)


def box_pixels(box: Points, size: Size) -> Floats:
    """Turn (4,) x, y, width, height in 0..1, origin bottom-left, into (4,) xyxy whole pixels.

    Rounded half to even and not clipped, as the official service does.
    """
    x, y, w, h = box
    corners = to_pixels(np.array([[x, y + h], [x + w, y]]), size)  # top-left, bottom-right
    return np.rint(corners).reshape(4).astype(np.float32)


def region_pixels(landmarks: SeenLandmarks, name: str, size: Size) -> Points:
    """Give a landmark region as (N, 2) xy pixels: face-box frame → picture frame → pixels."""
    x, y, w, h = landmarks.box
    return to_pixels(landmarks.regions[name] * (w, h) + (x, y), size)


def five_points(face: SeenFace, size: Size) -> Floats | None:
    """Place ArcFace's five points: (5, 2) xy pixels; None where Vision's landmarks do not suffice.

    Order: eye, eye, nose, mouth corner, mouth corner, the left one first as a viewer sees an
    upright face. Left and right come from the face's own axis (mouth → eyes), not from Vision's
    names, so that a face turned by any angle keeps its sides.
    """
    landmarks = face.landmarks
    if landmarks is None:
        return None
    found = [_eye(landmarks, side, size) for side in ("left", "right")]
    eyes = [eye for eye in found if eye is not None]
    lips = region_pixels(landmarks, "outer_lips", size)
    if len(eyes) < len(found) or len(lips) == 0:
        return None
    up = _unit((eyes[0] + eyes[1]) / 2 - lips.mean(axis=0))
    if up is None:
        return None
    to_the_right = np.array([-up[1], up[0]])  # a quarter turn clockwise as seen, y pointing down
    left_eye, right_eye = sorted(eyes, key=lambda eye: float(eye @ to_the_right))
    along = _unit(right_eye - left_eye)
    nose = _nose_tip(landmarks, up, size)
    if along is None or nose is None:
        return None
    reach = lips @ along
    points = np.stack([left_eye, right_eye, nose, lips[reach.argmin()], lips[reach.argmax()]])
    return points.astype(np.float32) if _is_spread(points, face, size) else None


def _eye(landmarks: SeenLandmarks, side: str, size: Size) -> Points | None:
    """The pupil, or the middle of the eye's outline where Vision saw no pupil."""
    for name in (f"{side}_pupil", f"{side}_eye"):
        points = region_pixels(landmarks, name, size)
        if len(points):
            middle: Points = points.mean(axis=0)
            return middle
    return None


def _nose_tip(landmarks: SeenLandmarks, up: Points, size: Size) -> Points | None:
    """The end of the ridge farthest from the eyes; without a ridge, the outline's lower half."""
    ridge = region_pixels(landmarks, "nose_crest", size)
    if len(ridge):
        tip: Points = ridge[(ridge @ up).argmin()]
        return tip
    outline = region_pixels(landmarks, "nose", size)
    if len(outline) == 0:
        return None
    heights = outline @ up
    lower: Points = outline[heights <= np.median(heights)].mean(axis=0)
    return lower


def _unit(vector: Points) -> Points | None:
    length = float(np.hypot(*vector))
    return vector / length if length > 0 else None


def _is_spread(points: NDArray[np.float64], face: SeenFace, size: Size) -> bool:
    """Whether eyes and mouth corners are apart, and everything is a number."""
    if not np.isfinite(points).all():
        return False
    box_px = max(face.box[2] * size[0], face.box[3] * size[1])
    eyes_px = np.hypot(*(points[1] - points[0]))
    mouth_px = np.hypot(*(points[4] - points[3]))
    return bool(min(eyes_px, mouth_px) >= MIN_SPREAD * box_px)


def quad_pixels(corners: Points, size: Size) -> Floats:
    """Turn Vision's (4, 2) corners into our (4, 2) xy pixels, clipped to the picture, clockwise."""
    return order_corners(np.clip(to_pixels(corners, size), 0, size).astype(np.float32))
