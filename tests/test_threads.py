import ctypes
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from immich_ml_metal import threads


class Sysctl:
    """A Mac's C library: answers what it is told, and `-1` for every other name."""

    def __init__(self, told: dict[str, int]) -> None:
        self.told = told

    def sysctlbyname(self, name: bytes, value: Any, size: Any, new: None, length: int) -> int:
        assert size._obj.value == ctypes.sizeof(ctypes.c_int)
        if name.decode() not in self.told:
            return -1
        value._obj.value = self.told[name.decode()]
        return 0


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    threads._read_sysctl.cache_clear()
    yield
    threads._read_sysctl.cache_clear()


def on_a_mac(patch: pytest.MonkeyPatch, **told: int) -> None:
    patch.setattr(sys, "platform", "darwin")
    patch.setattr(os, "cpu_count", lambda: 10)
    library = Sysctl({f"hw.perflevel{name[-1]}.logicalcpu": n for name, n in told.items()})
    patch.setattr(ctypes, "CDLL", lambda _: library)


def test_an_inference_shares_the_performance_cores_only(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_mac(monkeypatch, level0=4, level1=6)
    assert threads.inference_cores() == 4
    assert threads.core_count() == 10


def test_a_mac_with_one_kind_of_core_uses_all(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_mac(monkeypatch)
    assert threads.inference_cores() == 10


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has sysctlbyname")
def test_other_systems_have_no_such_number_and_use_what_they_may() -> None:
    assert threads._read_sysctl("hw.perflevel0.logicalcpu") == 0
    assert threads.inference_cores() == threads.core_count()
