"""What a person can do about a failure: one table, for `doctor`, `/health` and the page."""

import re

DISK = "free some space, or point models_dir (ML_MODELS_DIR) at another disk"
SPOOL = "free some space there, or point TMPDIR at another disk"
FILES = "allow more open files (ulimit -n), and look for who keeps connections open"
OFFLINE = "unset offline (ML_OFFLINE, HF_HUB_OFFLINE), or copy a model folder here"
NETWORK = "check the network, or name a mirror or proxy (HF_ENDPOINT, HTTPS_PROXY)"
NAME = "choose another model in Immich's settings; immich-ml-metal models list has them all"
MEMORY = (
    "likely too little memory: take a smaller model; immich-ml-metal models recommend names one"
)
ENGINE = "immich-ml-metal qualify --again measures every engine anew"
REPORT = "immich-ml-metal doctor --share, and attach the bundle to an issue"

# By words of our own errors; the first that fits.
_BY_CAUSE = (
    (r"downloads are switched off", OFFLINE),
    (r"Too many open files", FILES),
    (r"an upload waits for the disk", SPOOL),
    (r"disk (is (full|read-only)|quota)|not enough disk space|No space left", DISK),
    (r"unknown model|is a (search|face|text) model", NAME),
    (r"cannot connect|no list of files|the line was cut|no data for too long|web page", NETWORK),
    (r"SIGKILL|out of memory|bad_alloc|MemoryError|[Ii]nsufficient [Mm]emory", MEMORY),
    (r"no progress for", ENGINE),
    (r"SIG(ABRT|SEGV|BUS|ILL|TRAP)", REPORT),
)


def remedy_of(cause: str) -> str:
    """What `doctor` advises about a failure with this cause; empty when there is nothing to do."""
    return next((remedy for words, remedy in _BY_CAUSE if re.search(words, cause)), "")
