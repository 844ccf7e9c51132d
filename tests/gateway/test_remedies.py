"""What is advised about failures, in the words in which they are really told."""

import pytest

from immich_ml_metal.gateway import remedies
from immich_ml_metal.gateway.process import describe
from immich_ml_metal.gateway.remedies import remedy_of


@pytest.mark.parametrize(
    ("cause", "remedy"),
    [
        ("answered 503: model x is not on disk and downloads are switched off", remedies.OFFLINE),
        ("the disk is full while writing /m; free some space", remedies.DISK),
        ("answered 422: unknown model 'ViT'; near names: ViT-B-32__openai", remedies.NAME),
        ("no list of files for x: the server answered 503", remedies.NETWORK),
        (
            "an upload waits for the disk: cannot write to /t: No space left on device",
            remedies.SPOOL,
        ),
        ("an upload waits for the disk: cannot write to /t: Too many open files", remedies.FILES),
        (f"worker ended: {describe(-9)}", remedies.MEMORY),
        ("worker ended: out of memory", remedies.MEMORY),
        (f"worker ended: {describe(-6)}", remedies.REPORT),
        ("worker ended: no progress for 120 s", remedies.ENGINE),
        ("something that nobody has met yet", ""),
    ],
)
def test_a_cause_has_its_remedy(cause: str, remedy: str) -> None:
    assert remedy_of(cause) == remedy
