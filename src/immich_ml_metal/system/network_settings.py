"""The variables by which people tell programs of proxies, certificates and tokens, and their slips.

The libraries that read them fail in words of their own, far from the variable; here it is named.
"""

import os
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_PROXY_SCHEMES = frozenset({"http", "https", "socks5", "socks5h"})
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# Hugging Face's library reads these as whole numbers while it is imported.
_WHOLE_NUMBERS = ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT")
# What a program needs of its owner's environment to reach the network as he does.
CARRIED = (*_PROXIES, "NO_PROXY", *_CERTIFICATES, *TOKENS, "HF_TOKEN_PATH", "HF_HOME")
_TOKEN = re.compile(r"[\x21-\x7e]*")


def network_troubles(environ: Mapping[str, str] | None = None) -> list[str]:
    """A sentence for each variable that keeps programs from the network; never its password."""
    env = os.environ if environ is None else environ
    return [*_proxies(env), *_certificates(env), *_tokens(env), *_numbers(env)]


def carried(environ: Mapping[str, str]) -> dict[str, str]:
    """Those that tell of proxies, certificates and tokens; a proxy in small letters goes first."""
    found = {name: environ.get(name.lower()) or environ.get(name, "") for name in CARRIED}
    return {name: value for name, value in found.items() if value}


def explain(exc: BaseException) -> str:
    """A failure that a library met before or while it connected, with the variable to blame."""
    found = "; ".join(network_troubles())
    return found or f"cannot connect: {type(exc).__name__}: {exc}"


def proxy_for(url: str) -> str:
    """The variable whose proxy an address is asked through; empty when none is."""
    parts = urlsplit(url)
    if not (found := getproxies_environment()) or proxy_bypass(parts.netloc):
        return ""
    scheme = parts.scheme if parts.scheme in found else "all"
    return f"{scheme.upper()}_PROXY" if scheme in found else ""


def _proxies(env: Mapping[str, str]) -> Iterator[str]:
    for name in (*_PROXIES, *(name.lower() for name in _PROXIES)):
        text = env.get(name, "")
        if not text:
            continue
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            is_right = parts.scheme in _PROXY_SCHEMES and bool(parts.hostname)
            is_right = is_right and text == text.strip() and parts.port != 0
        except ValueError:
            is_right, parts = False, urlsplit("")
        if not is_right:
            yield f"{name} is not the address of a proxy such as http://127.0.0.1:3128"
        elif parts.scheme.startswith("socks") and find_spec("socksio") is None:
            yield f"{name} names a SOCKS proxy, which is not supported: name an HTTP one"


def _certificates(env: Mapping[str, str]) -> Iterator[str]:
    for name in _CERTIFICATES:
        if not (text := env.get(name, "")):
            continue
        path = Path(text)
        if not (path.is_dir() if name.endswith("_DIR") else path.exists()):
            yield f"{name}={text} does not exist"
        elif not os.access(path, os.R_OK):
            yield f"{name}={text} cannot be read"
        elif path.is_file() and b"-----BEGIN" not in path.read_bytes():
            yield f"{name}={text} holds no certificates"


def _tokens(env: Mapping[str, str]) -> Iterator[str]:
    for name in TOKENS:
        if not _TOKEN.fullmatch(env.get(name, "").strip()):
            yield f"{name} is not a token: it has characters that none has"


def _numbers(env: Mapping[str, str]) -> Iterator[str]:
    for name in _WHOLE_NUMBERS:
        if (text := env.get(name, "")) and not text.strip().isdigit():
            yield f"{name}={text} is not a whole number of seconds"
