"""Writes `scripts/apple_facts.json`: what Apple and PyObjC declare of the names we use.

Two public sources, fetched with `pip download` and `npm pack` into a temporary folder: the metadata
inside the macOS PyObjC wheels (out-parameters, BOOL results, pointers without length, functions,
constants), and the SDK declarations in an MIT-licensed npm package (classes, methods, properties).
Only facts of interfaces are recorded. Run it after a new name enters `backends/vision/bridge.py`:

    python scripts/apple_metadata.py
"""

import argparse
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import types
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from objc_names import Facts, Follower, Member

ROOT = Path(__file__).parent.parent
BRIDGE = ROOT / "src/immich_ml_metal/backends/vision/bridge.py"
FACTS = Path(__file__).with_name("apple_facts.json")
FRAMEWORKS = {"vision", "quartz", "foundation", "objc"}

PYOBJC = ("pyobjc-framework-Vision", "pyobjc-framework-Quartz", "pyobjc-framework-Cocoa")
PYOBJC_VERSION = ">=12,<13"
METADATA = ("Vision", "Quartz/CoreGraphics", "Foundation")
SDK_PACKAGE = "@nativescript/macos-node-api@0.4.0"
DECLARATIONS = ("Vision", "Foundation", "CoreFoundation", "CoreGraphics", "Runtime")
SELF_SLOTS = 2  # PyObjC counts self and _cmd as arguments 0 and 1 of a method


class Recorder(types.ModuleType):
    """Stands for `objc` while a wheel's metadata runs, and writes down what it registers."""

    _C_NSBOOL = b"Z"
    _C_BOOL = b"B"

    def __init__(self) -> None:
        super().__init__("objc")
        self.arch = "arm64"
        self.selectors: dict[tuple[str, str], dict[str, Any]] = {}

    def registerMetaDataForSelector(self, owner: bytes, selector: bytes, facts: Any) -> None:  # noqa: N802 - PyObjC's name
        """Record a selector whose call differs from the default."""
        self.selectors[owner.decode(), selector.decode()] = facts

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: (name, args)


def run_metadata(wheels: Path, package: str) -> tuple[Recorder, dict[str, Any]]:
    """Execute the `_metadata.py` of `package` from whichever wheel holds it."""
    path = f"{package}/_metadata.py"
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            if path not in archive.namelist():
                continue
            source = archive.read(path).decode()
        recorder, namespace = Recorder(), {"__name__": f"{package}._metadata"}
        sys.modules["objc"] = recorder
        try:
            exec(compile(source, path, "exec"), namespace)
        finally:
            del sys.modules["objc"]
        return recorder, namespace
    raise SystemExit(f"no wheel in {wheels} holds {path}")


def pyobjc_facts(wheels: Path) -> tuple[dict[tuple[str, str], dict[str, Any]], Facts]:
    """Selectors with unusual conventions, and a table of functions and constants."""
    selectors: dict[tuple[str, str], dict[str, Any]] = {}
    facts = Facts()
    for package in METADATA:
        recorder, namespace = run_metadata(wheels, package)
        selectors |= recorder.selectors
        for entry in namespace.get("enums", "").split("$"):
            name, separator, value = entry.partition("@")
            if separator and re.fullmatch(r"-?\d+", value):
                facts.constants[name] = int(value)
        for name, signature in namespace.get("functions", {}).items():
            facts.functions[name] = Member(arity=len(_encoded_types(signature[0])) - 1)
    return selectors, facts


def _encoded_types(signature: bytes) -> list[str]:
    """Split a type encoding: `^{CGImage=}QB` → [`^{CGImage=}`, `Q`, `B`]."""
    text, parts, start, depth = signature.decode(), [], 0, 0
    for index, char in enumerate(text):
        depth += (char in "{([") - (char in "})]")
        if depth == 0 and char not in "^rnNoORV":
            parts.append(text[start : index + 1])
            start = index + 1
    return parts


CLASS = re.compile(r"declare class (\w+)(?: extends (\w+))?")
MEMBER = re.compile(
    r"^\s+(?P<static>static )?(?:readonly |get |set )*(?P<name>\w+)(?:<.*?>)?"
    r"(?:\((?P<arguments>.*)\))?: (?P<returns>[^;]+);$"
)


def sdk_facts(package: Path) -> Facts:
    """Read classes, methods and properties from the SDK's TypeScript declarations."""
    facts = Facts()
    with tarfile.open(package) as archive:
        for framework in DECLARATIONS:
            member = archive.extractfile(f"package/types/{framework}.d.ts")
            if member is None:
                raise SystemExit(f"{package} does not declare {framework}")
            for owner, base, name, found in _declared(member.read().decode()):
                facts.bases[owner] = base
                known = facts.members.setdefault(owner, {})
                if name and (name not in known or known[name].returns == "void"):
                    known[name] = found
    return facts


def _declared(text: str) -> Iterator[tuple[str, str, str, Member]]:
    """Yield (class, base, member name in TypeScript, member) line by line."""
    owner = base = ""
    for line in text.splitlines():
        if head := CLASS.match(line):
            owner, base = head[1], head[2] or ""
            yield owner, base, "", Member(None)
        elif line.startswith("}"):
            owner = ""
        elif owner and (found := MEMBER.match(line)):
            yield owner, base, found["name"], _member(found)


def _member(found: re.Match[str]) -> Member:
    returns = found["returns"].strip()
    if found["arguments"] is None:
        arity = 0
    else:
        arity = len([name for name in _arguments(found["arguments"]) if name != "this"])
    is_self = returns == "this" or returns.startswith("InstanceType<")
    return Member(
        arity=arity, returns="this" if is_self else returns, is_static=found["static"] is not None
    )


def _arguments(text: str) -> list[str]:
    """Names of the arguments of a TypeScript signature, at the outer level only."""
    flat = re.sub(r"=>", "", text)
    while (shorter := re.sub(r"<[^<>]*>|\([^()]*\)|\{[^{}]*\}", "", flat)) != flat:
        flat = shorter
    return [part.split(":")[0].strip() for part in flat.split(",") if part.strip()]


def typescript_name(selector: str) -> str:
    """`initWithCGImage_options_` → `initWithCGImageOptions`."""
    head, *rest = selector.split("_")
    return head + "".join(part[:1].upper() + part[1:] for part in rest)


class Merged(Facts):
    """Both sources at once, asked by PyObjC name: the follower runs on this to find what we use."""

    def __init__(self, sdk: Facts, selectors: dict[tuple[str, str], dict[str, Any]]) -> None:
        super().__init__(bases=sdk.bases, members=sdk.members)
        self._selectors = selectors

    def find(self, name: str, member: str) -> tuple[str, Member] | None:
        """Look up by PyObjC name; a struct's field or a method of the right arity, else None."""
        found = super().find(name, typescript_name(member))
        if found is None or found[1].arity != member.count("_"):
            return None
        owner, declared = found
        if owner in ("CGRect", "CGPoint", "CGSize"):
            return owner, replace(declared, arity=None)
        selector = member.replace("_", ":")
        unusual = self._unusual(name, selector)
        outs = [
            index - SELF_SLOTS
            for index, argument in unusual.get("arguments", {}).items()
            if isinstance(index, int) and argument.get("type_modifier") == b"o"
        ]
        result = unusual.get("retval", {})
        return owner, replace(
            declared,
            out=outs[0] if outs else None,
            is_bool=result.get("type") in ("Z", b"Z"),
            is_pointer=bool(result.get("c_array_of_variable_length")),
        )

    def _unusual(self, name: str, selector: str) -> dict[str, Any]:
        while name:
            if (name, selector) in self._selectors:
                return self._selectors[name, selector]
            name = self.bases.get(name, "")
        return {}


def used_facts(merged: Merged, functions: Facts, source: str) -> Facts:
    """Keep what `source` uses; stop at the first name that Apple does not declare."""
    merged.functions, merged.constants = functions.functions, functions.constants
    follower = Follower(merged, FRAMEWORKS).follow(source)
    if follower.problems:
        raise SystemExit("\n".join(follower.problems))
    used = Facts()
    for use in follower.uses:
        if use.owner:
            found = merged.find(use.owner, use.name)
            assert found is not None
            used.members.setdefault(use.owner, {})[use.name] = found[1]
        elif use.name in merged.functions:
            used.functions[use.name] = merged.functions[use.name]
        elif use.name in merged.constants:
            used.constants[use.name] = merged.constants[use.name]
        else:
            used.members.setdefault(use.name, {})
    annotated = set(re.findall(r"^(\w+) = Any$", source, re.MULTILINE)) & set(merged.members)
    for name in [*used.members, *sorted(annotated)]:
        _keep_bases(used, merged, name)
    return used


def _keep_bases(used: Facts, merged: Facts, name: str) -> None:
    while name and name in merged.members:
        used.members.setdefault(name, {})
        used.bases[name] = merged.bases[name]
        name = merged.bases[name]


def fetch(folder: Path) -> tuple[Path, Path]:
    """Download the wheels and the package with the registries' own clients."""
    names = [f"{name}{PYOBJC_VERSION}" for name in PYOBJC]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    for_mac = ["--platform", "macosx_14_0_arm64", "--python-version", "312", "--dest", str(folder)]
    subprocess.run([*pip, *for_mac, *names], check=True)
    packed = ["npm", "pack", "--silent", "--pack-destination", str(folder), SDK_PACKAGE]
    subprocess.run(packed, check=True, stdout=subprocess.DEVNULL)
    return folder, next(folder.glob("*.tgz"))


def as_json(facts: Facts, wheels: Path) -> str:
    """Render the table, sorted, with where it comes from."""

    def short(member: Member) -> dict[str, Any]:
        defaults = asdict(Member(arity=-1))
        return {key: value for key, value in asdict(member).items() if value != defaults[key]}

    sources = [*sorted(wheel.name.split("-cp")[0] for wheel in wheels.glob("*.whl")), SDK_PACKAGE]
    table = {
        "sources": sources,
        "bases": dict(sorted(facts.bases.items())),
        "members": {
            owner: {name: short(member) for name, member in sorted(members.items())}
            for owner, members in sorted(facts.members.items())
        },
        "functions": {name: short(one) for name, one in sorted(facts.functions.items())},
        "constants": dict(sorted(facts.constants.items())),
    }
    return json.dumps(table, indent=1) + "\n"


def main() -> None:
    """Fetch, read, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=Path, help="folder with the wheels and the .tgz already")
    given = parser.parse_args().sources
    with tempfile.TemporaryDirectory() as temporary:
        wheels, package = (given, next(given.glob("*.tgz"))) if given else fetch(Path(temporary))
        selectors, functions = pyobjc_facts(wheels)
        merged = Merged(sdk_facts(package), selectors)
        facts = used_facts(merged, functions, BRIDGE.read_text(encoding="utf-8"))
        FACTS.write_text(as_json(facts, wheels), encoding="utf-8")
    print(f"{sum(map(len, facts.members.values()))} members of {len(facts.members)} classes")


if __name__ == "__main__":
    main()
