"""A bundle for an issue: what doctor found, with nothing private in it.

Left out or replaced: the user, the machine, the network, folders, keys, model folders' location.
"""

import getpass
import io
import ipaddress
import json
import re
import socket
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from urllib.parse import unquote, urlsplit

from immich_ml_metal.doctor.checks import Finding
from immich_ml_metal.doctor.facts import Facts
from immich_ml_metal.logs import redact
from immich_ml_metal.settings import SECRET, Settings
from immich_ml_metal.system.owner import write_whole

LOG_LINES = 500
_README = """Made by `immich-ml-metal doctor --share`.
Names, addresses, folders and keys were replaced.
"""
_URL = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)(\[[0-9a-f:.]+\]|[^\s/:\"']+)(:\d+)?(/[^\s\"']*)?")
_IPV4 = re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b")
_COLONS = re.compile(r"(?i)(?<![\w.:])[0-9a-f]*:[0-9a-f:.]*:[0-9a-f.]*(?![\w:])")
_LOCAL_NAME = re.compile(
    r"(?i)\b[\w-]+(?:\.[\w-]+)*\.(?:lan|local|home(?:\.arpa)?|internal|localdomain|ts\.net|fritz\.box)\b"
)
# The same, as part of another address; and one without a scheme.
_ENCODED_URL = re.compile(r"(?i)\b[a-z][a-z0-9+.-]*%3a%2f%2f[^\s\"']*")
_LOGIN = re.compile(r"[^\s/:@\"']+:[^\s/@\"']+@[\w.-]+")
# What is called a secret is one, whatever it looks like; `set` tells that a setting has a value.
_NAMED_SECRET = re.compile(
    r"(?i)((?:api[_-]?key|token|secret|password|passwd|pwd)[\"']?\s*[=:]\s*[\"']?)"
    r"(?!set\b|null\b)[^\s\"',;&}]+"
)
_MAC = re.compile(r"(?i)\b(?:[0-9a-f]{2}:){5}[0-9a-f]{2}\b")
_MAIL = re.compile(r"\b[\w.+-]+@[\w-]+\.[\w.]+\b")
_FOLDERS = (
    r"/(?:Users|home|Volumes|mnt|media|private|root|srv|data|storage|nas|tank|volume\d+|opt/photos)"
)
# One that is quoted ends at its quote, else a name with blanks in it ends at its slash.
_PATH = re.compile(
    rf"(?<=[\"']){_FOLDERS}/[^\"':\n]+"
    rf"|{_FOLDERS}(?:/[^\s\"',:;)/]+(?:(?: [^\s\"',:;)/]+)+(?=/))?)+/?"
)
_PUBLIC = frozenset({"127.0.0.1", "0.0.0.0", "::1", "::", "localhost", "host.docker.internal"})


def write_bundle(
    path: Path, facts: Facts, findings: Iterable[Finding], logs: Iterable[Path]
) -> None:
    """Write the zip file; look into it before you attach it, it is plain text."""
    settings = facts.settings
    known = known_private(settings)
    versions = frozenset(version for version in facts.packages.values() if version)
    told = {name: fact for name, fact in asdict(facts).items() if name != "settings"}
    members = {
        "doctor.json": _json([asdict(finding) for finding in findings]),
        "facts.json": _json(told),
        "settings.json": _json(_settings(settings)),
        "README.txt": _README,
    }
    for log in logs:
        if log.is_file():
            text = log.read_text(encoding="utf-8", errors="replace")
            members[f"logs/{log.name}"] = "\n".join(text.splitlines()[-LOG_LINES:]) + "\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, text in members.items():
            bundle.writestr(name, anonymise(text, known, versions))
    write_whole(path, buffer.getvalue())


def known_private(settings: Settings) -> dict[str, str]:
    """Words of this machine that must not leave it → what stands for them."""
    host = socket.gethostname()
    words = {
        str(Path.home()): "~",
        host: "HOST",
        host.partition(".")[0]: "HOST",
        _user(): "USER",
        str(settings.models_dir.expanduser()): "MODELS",
        str(settings.state_folder): "STATE",
    }
    for url in (settings.immich_url, settings.hub_endpoint):
        if url is not None:
            words |= _words_of(url)
    if settings.immich_api_key is not None:
        words[settings.immich_api_key.get_secret_value()] = "***"
    return {word: stand_in for word, stand_in in words.items() if len(word) > 1}


def _words_of(url: str) -> dict[str, str]:
    """What an address tells of its owner, as it is written and as it is meant."""
    parts = urlsplit(url)
    told = {parts.hostname: "ADDRESS", parts.username: "USER", parts.password: "***"}
    words = {word: stand_in for word, stand_in in told.items() if word}
    return words | {unquote(word): stand_in for word, stand_in in words.items()}


def _user() -> str:
    """Who runs this; a container may run as a number that has no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""


def anonymise(text: str, known: Mapping[str, str], keep: frozenset[str] = frozenset()) -> str:
    """Replace everything private in `text`; longer known words first.

    Args:
        text: what is to be shared.
        known: private words, and what stands for each.
        keep: versions of four numbers (opencv 5.0.0.93), which look like addresses.
    """
    keep = keep | _PUBLIC
    for word in sorted(known, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", known[word], text)
    text = _NAMED_SECRET.sub(r"\1***", redact(text, []))
    text = _ENCODED_URL.sub("ADDRESS", _URL.sub(_hide_host, text))
    text = _LOGIN.sub("ADDRESS", text)
    text = _MAIL.sub("MAIL", text)
    text = _MAC.sub("MAC", text)
    text = _IPV4.sub(lambda found: found[0] if found[0] in keep else "IP", text)
    text = _COLONS.sub(_hide_ipv6, text)
    text = _LOCAL_NAME.sub(lambda found: found[0] if found[0] in _PUBLIC else "HOST", text)
    return _PATH.sub("PATH", text)


def _hide_host(found: "re.Match[str]") -> str:
    scheme, host, port, _ = found.groups(default="")
    return f"{scheme}{host if host in _PUBLIC else 'ADDRESS'}{port}"


def _hide_ipv6(found: "re.Match[str]") -> str:
    """A clock time has colons too, so the address is really parsed."""
    try:
        ipaddress.IPv6Address(found[0])
    except ValueError:
        return found[0]
    return found[0] if found[0] in _PUBLIC else "IP"


def _settings(settings: Settings) -> dict[str, object]:
    """The values that differ from the defaults; of a secret only that it is set."""
    default = Settings()
    changed = {
        name: getattr(settings, name)
        for name in Settings.model_fields
        if getattr(settings, name) != getattr(default, name)
    }
    return {name: "set" if name in SECRET else str(value) for name, value in changed.items()}


def _json(value: object) -> str:
    return json.dumps(value, indent=1, default=str, ensure_ascii=False)
