"""Pauses between tries."""

import pytest

from immich_ml_metal.models.remote import Retry


@pytest.mark.parametrize(("failures", "most_s"), [(1, 1.0), (2, 2.0), (5, 16.0), (9, 30.0)])
def test_pauses_double_up_to_their_limit_and_are_spread(failures: int, most_s: float) -> None:
    pauses = [Retry().wait_s(failures) for _ in range(200)]
    assert 0.75 * most_s <= min(pauses) < 0.85 * most_s
    assert 0.9 * most_s < max(pauses) <= most_s
