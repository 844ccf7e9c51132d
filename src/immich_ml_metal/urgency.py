"""The one place where order is decided: searches, then text recognition, then pictures and faces.

Somebody waits for a search. Text is the longest way of a photo through an import, and Immich asks
for one at a time: what delays it delays the import. A queue alone decides little, because text
would wait behind a 90 ms inference at each of its stages; so each class has threads of its own, and
the system's scheduler preempts by their priority. Its shares are proportional: nobody starves.
"""

import ctypes
import os
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from enum import IntEnum
from types import MappingProxyType

SEARCH_BYTES = 128 * 1024  # of a whole request: a longer one is no search
OVERTAKINGS = 4  # in a row, then comes who has waited longest
# Immich sends `entries` as they are, in a multipart form; curl and others may escape the quotes.
_ENTRY = re.compile(rb'(?:"|%22)(textual|visual|ocr)(?:"|%22)')


class Urgency(IntEnum):
    """The classes of work, the most urgent first."""

    SEARCH = 0
    TEXT = 1
    PICTURES = 2


# Steps of niceness: the scheduler gives a thread 1.25 times the share of one a step nicer.
_NICENESS: Mapping[Urgency, int] = MappingProxyType(
    {Urgency.SEARCH: 0, Urgency.TEXT: 4, Urgency.PICTURES: 10}
)
# <sys/qos.h>: user initiated, default, utility. Lower ones are kept to the efficiency cores.
_QOS: Mapping[Urgency, int] = MappingProxyType(
    {Urgency.SEARCH: 0x19, Urgency.TEXT: 0x15, Urgency.PICTURES: 0x11}
)


def urgency_of(task: str, part: str) -> Urgency:
    """The class of a model's half, by Immich's words for both."""
    if part == "textual":
        return Urgency.SEARCH
    return Urgency.TEXT if task == "ocr" else Urgency.PICTURES


def urgency_of_request(head: bytes, size_bytes: int) -> Urgency:
    """The class of a `/predict` body, by how it begins: Immich sends `entries` first."""
    words = set(_ENTRY.findall(head))
    if b"textual" in words and b"visual" not in words and size_bytes <= SEARCH_BYTES:
        return Urgency.SEARCH
    return Urgency.TEXT if b"ocr" in words else Urgency.PICTURES


def settle_thread(urgency: Urgency) -> None:
    """Give the calling thread, and the threads it starts, the priority of a class.

    Linux: niceness is a thread's own. macOS: a quality-of-service class (not run on a Mac yet).
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        niceness = min(19, os.getpriority(os.PRIO_PROCESS, os.getpid()) + _NICENESS[urgency])
        if os.getpriority(os.PRIO_PROCESS, thread) < niceness:  # only root may go back
            os.setpriority(os.PRIO_PROCESS, thread, niceness)
    elif sys.platform == "darwin":
        ctypes.CDLL(None).pthread_set_qos_class_self_np(_QOS[urgency], 0)


class Turns:
    """Says who comes next: the most urgent, but now and then the one that waits longest."""

    def __init__(self) -> None:
        self._overtakings = 0

    def choose(self, waiting: Sequence[Urgency]) -> int:
        """The place of the next among `waiting`, which stand in order of arrival."""
        first = waiting.index(min(waiting))
        self._overtakings = self._overtakings + 1 if first else 0
        if self._overtakings > OVERTAKINGS:
            first = self._overtakings = 0
        return first
