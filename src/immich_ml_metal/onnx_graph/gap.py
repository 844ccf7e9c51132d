"""How far two arrays are apart: one measure for the service and for the developers' tool. Pure."""

from dataclasses import dataclass

import numpy as np

from immich_ml_metal.types import Tensor


@dataclass(frozen=True, slots=True)
class Gap:
    """How one array differs from another of the same shape.

    Attributes:
        cosine: of the two as vectors; 1 when both are zero, 0 when one alone is.
        largest: largest absolute difference.
        relative: the same, divided by the largest magnitude of the other.
        not_finite: values of the first that are not finite where the other's are.
    """

    cosine: float
    largest: float
    relative: float
    not_finite: int


def gap(ours: Tensor, theirs: Tensor) -> Gap:
    """Measure an array against another of the same shape; equal infinities count as equal."""
    a, b = ours.astype(np.float64).ravel(), theirs.astype(np.float64).ravel()
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    finite = np.isfinite(a) & np.isfinite(b)
    not_finite = int(np.count_nonzero(np.isfinite(b) & ~np.isfinite(a)))
    largest = float(np.abs(np.where(same, 0, a) - np.where(same, 0, b)).max(initial=0))
    a, b = a[finite], b[finite]
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / norms if norms else float(np.array_equal(a, b))
    scale = float(np.abs(b).max(initial=0)) or 1.0
    return Gap(cosine, largest, largest / scale, not_finite)
