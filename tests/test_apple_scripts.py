"""The scripts that stand for a Mac: reading Apple's declarations, resolving macOS packages."""

import pytest
from apple_metadata import (
    Merged,
    _arguments,
    _declared,
    _encoded_types,
    typescript_name,
)
from check_python import problem
from objc_names import Facts, Member
from resolve_macos import problems, supported

DECLARATIONS = """\
declare class VNThing extends NSObject {
  readonly uuid: NSUUID;

  static make<This extends abstract new () => any>(this: This, n: number): InstanceType<This>;

  runItemsError(items: NSArray<interop.Object> | Array<NSString>, error: interop.Pointer): boolean;

  each(handler: (p1: VNThing, p2: NSError) => void | null, last: boolean): void;
}
"""


def declared() -> dict[str, Member]:
    return {name: member for _, _, name, member in _declared(DECLARATIONS) if name}


def test_methods_and_properties_are_read_with_their_arity() -> None:
    members = declared()
    assert {name: member.arity for name, member in members.items()} == {
        "uuid": 0,
        "make": 1,
        "runItemsError": 2,
        "each": 2,
    }
    assert members["make"].is_static
    assert members["make"].returns == "this"


def test_arguments_are_counted_at_the_outer_level_only() -> None:
    assert _arguments("a: Record<X, Y>, b: (p: Q, r: S) => void, c: number") == ["a", "b", "c"]


def test_a_type_encoding_is_split_into_its_values() -> None:
    signature = b"^{CGImage=}QQ^{CGColorSpace=}I^dBi"
    assert len(_encoded_types(signature)) == 8
    assert _encoded_types(b"{CGRect={CGPoint=dd}{CGSize=dd}}Q") == [
        "{CGRect={CGPoint=dd}{CGSize=dd}}",
        "Q",
    ]


@pytest.mark.parametrize(
    ("selector", "name"),
    [
        ("initWithCGImage_options_", "initWithCGImageOptions"),
        ("results", "results"),
        ("performRequests_error_", "performRequestsError"),
    ],
)
def test_a_selector_has_a_mechanical_typescript_name(selector: str, name: str) -> None:
    assert typescript_name(selector) == name


def test_both_sources_are_merged_under_the_selectors_name() -> None:
    sdk = Facts(bases={"VNThing": "", "VNSub": "VNThing"}, members={"VNThing": declared()})
    sdk.members["VNSub"] = {}
    unusual = {"retval": {"type": "Z"}, "arguments": {3: {"type_modifier": b"o"}}}
    merged = Merged(sdk, {("VNThing", "runItems:error:"): unusual})
    found = merged.find("VNSub", "runItems_error_")
    assert found is not None
    assert (found[0], found[1].out, found[1].is_bool) == ("VNThing", 1, True)
    assert merged.find("VNThing", "runItems_error") is None  # one argument too few in the name
    assert merged.find("VNThing", "stopItems_error_") is None


SOUND = {
    "mlx": "0.32.4",
    "mlx-metal": "0.32.4",
    "onnxruntime": "1.32.0",
    "pyobjc-core": "12.2.2",
    "pyobjc-framework-quartz": "12.2.2",
    "pyobjc-framework-vision": "12.2.2",
}


def test_a_sound_set_has_no_problems() -> None:
    assert problems("3.12", SOUND) == []


def test_a_mix_of_pyobjc_versions_is_found() -> None:
    assert "mixed" in problems("3.12", {**SOUND, "pyobjc-core": "13.0"})[0]


def test_a_missing_engine_is_found() -> None:
    without = {name: version for name, version in SOUND.items() if name != "mlx-metal"}
    assert problems("3.14", without) == ["Python 3.14: mlx-metal is missing"]


def test_every_promised_python_is_resolved() -> None:
    assert supported() == ("3.11", "3.12", "3.13", "3.14")


@pytest.mark.parametrize(
    ("system", "machine", "apple", "said"),
    [
        ("Darwin", "arm64", True, ""),
        ("Darwin", "x86_64", True, "arch -arm64"),
        ("Darwin", "x86_64", False, "Intel Macs are not supported"),
        ("Linux", "x86_64", False, ""),
        ("Linux", "aarch64", False, ""),
    ],
)
def test_make_refuses_a_python_that_nothing_could_be_installed_for(
    system: str, machine: str, apple: bool, said: str
) -> None:
    found = problem(system, machine, on_apple_silicon=apple)
    assert said in found
    assert bool(found) == bool(said)
