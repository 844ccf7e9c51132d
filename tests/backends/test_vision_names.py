"""Every Objective-C name and call shape in the bridge, against what Apple declares."""

from pathlib import Path

import pytest
from objc_names import Follower, read_facts

import immich_ml_metal

ROOT = Path(__file__).parents[2]
PACKAGE = Path(immich_ml_metal.__file__).parent
BRIDGE = (PACKAGE / "backends/vision/bridge.py").read_text(encoding="utf-8")
FACTS = read_facts(ROOT / "scripts/apple_facts.json")
FRAMEWORKS = {"vision", "quartz", "foundation", "objc"}


def problems(source: str) -> list[str]:
    return Follower(FACTS, FRAMEWORKS).follow(source).problems


def test_every_name_and_call_of_the_bridge_is_apples() -> None:
    assert problems(BRIDGE) == []


def test_the_table_holds_what_the_bridge_uses_and_nothing_else() -> None:
    used = {(use.owner, use.name) for use in Follower(FACTS, FRAMEWORKS).follow(BRIDGE).uses}
    listed = {(owner, name) for owner, names in FACTS.members.items() for name in names}
    listed |= {("", name) for name in [*FACTS.functions, *FACTS.constants]}
    classes = {("", name) for name in FACTS.members}
    alloc = {("NSObject", "alloc")}
    assert used - classes - alloc == listed - alloc


@pytest.mark.parametrize(
    ("right", "wrong", "finding"),
    [
        ("initWithCGImage_options_", "initWithCGimage_options_", "has no initWithCGimage"),
        ("face.boundingBox()", "face.boundingbox()", "VNFaceObservation has no boundingbox"),
        ("landmarks.noseCrest()", "landmarks.noseTip()", "VNFaceLandmarks2D has no noseTip"),
        ("rect.origin.x", "rect.x", "CGRect has no x"),
        ("corner.x, corner.y", "corner.x, corner.z", "CGPoint has no z"),
        ("kCGImageAlphaNone", "kCGImageAlphaNon", "no class, function or constant"),
        ("VNRequestTextRecognitionLevelAccurate", "VNTextAccurate", "no class, function or"),
        ("error.localizedDescription()", "error.description_()", "NSError has no description_"),
        ("candidate.string()", "candidate.text()", "VNRecognizedText has no text"),
        ("line.topCandidates_(1)", "line.topCandidates_()", "takes 1 arguments, not 0"),
        ("performRequests_error_([request], None)", "performRequests_error_([request], 0)", "out"),
        (
            "supportedRecognitionLanguagesAndReturnError_(None)",
            "supportedRecognitionLanguagesAndReturnError_()",
            "takes 1 arguments, not 0",
        ),
        (".as_tuple(region.pointCount())", ".as_list()", "a C array has no as_list"),
        (".alloc().init()", ".init()", "init belongs to the instance"),
        ("request.results()", "unheard.results()", "cannot tell what unheard is"),
    ],
)
def test_a_misspelt_name_or_a_wrong_call_is_found(right: str, wrong: str, finding: str) -> None:
    assert right in BRIDGE
    found = problems(BRIDGE.replace(right, wrong))
    assert any(finding in problem for problem in found), found


def test_no_other_module_speaks_objective_c() -> None:
    speakers = {
        path.name
        for path in PACKAGE.rglob("*.py")
        if any(word in path.read_text(encoding="utf-8") for word in (".alloc()", "performRequests"))
    }
    assert speakers == {"bridge.py"}
