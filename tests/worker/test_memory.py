from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from immich_ml_metal.types import ModelKey, Part, Task
from immich_ml_metal.worker.memory import Backoff, MemoryRules

VISUAL = ModelKey(Task.CLIP, Part.VISUAL, "ViT-B-32__openai")
TEXTUAL = ModelKey(Task.CLIP, Part.TEXTUAL, "ViT-B-32__openai")
FACES = ModelKey(Task.FACES, Part.DETECTION, "buffalo_l")


@dataclass
class Model:
    key: ModelKey
    size_bytes: int
    last_used: float
    users: int = 0


def test_the_least_recently_used_go_first_and_no_more_than_needed() -> None:
    old, older, new = Model(VISUAL, 10, 2.0), Model(FACES, 10, 1.0), Model(VISUAL, 10, 3.0)
    assert MemoryRules(limit_bytes=35).choose_evictions([old, older, new], 10) == [older]
    assert MemoryRules(limit_bytes=25).choose_evictions([old, older, new], 10) == [older, old]
    assert MemoryRules(limit_bytes=40).choose_evictions([old, older, new], 10) == []


def test_a_model_in_use_stays_even_when_the_limit_is_passed() -> None:
    busy = Model(VISUAL, 10, 1.0, users=1)
    idle = Model(FACES, 10, 2.0)
    assert MemoryRules(limit_bytes=5).choose_evictions([busy, idle], 10) == [idle]


def test_without_a_limit_nobody_goes() -> None:
    assert MemoryRules().choose_evictions([Model(VISUAL, 10**12, 1.0)], 10**12) == []


residents = st.lists(
    st.builds(
        Model,
        st.sampled_from([VISUAL, TEXTUAL, FACES]),
        st.integers(0, 100),
        st.floats(0, 9),
        st.integers(0, 1),
    ),
    max_size=8,
)


@given(residents, st.integers(0, 100), st.integers(1, 300))
def test_either_it_fits_or_everything_that_may_go_goes(
    everyone: list[Model], incoming: int, limit: int
) -> None:
    chosen = MemoryRules(limit).choose_evictions(everyone, incoming)
    left = [one for one in everyone if not any(one is gone for gone in chosen)]
    fits = incoming + sum(one.size_bytes for one in left) <= limit
    assert fits or all(one.users for one in left)
    assert all(not one.users for one in chosen)


def test_pauses_double_up_to_a_limit_and_end_with_success() -> None:
    backoff = Backoff(first_s=1.0, max_s=30.0)
    pauses = []
    for _ in range(7):
        backoff.failed(VISUAL, now=100.0)
        pauses.append(backoff.wait_s(VISUAL, now=100.0))
    assert pauses == [1, 2, 4, 8, 16, 30, 30]
    assert backoff.wait_s(VISUAL, now=129.0) == 1
    assert backoff.wait_s(VISUAL, now=500.0) == 0
    assert backoff.wait_s(FACES, now=100.0) == 0
    backoff.succeeded(VISUAL)
    assert backoff.wait_s(VISUAL, now=100.0) == 0
