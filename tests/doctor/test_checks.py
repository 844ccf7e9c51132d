from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from immich_ml_metal.doctor.checks import CHECKS, Finding, examine, first_cause
from immich_ml_metal.doctor.facts import (
    EngineChoice,
    EngineTest,
    Facts,
    Machine,
    ModelFact,
    Outcome,
    Port,
)
from immich_ml_metal.immich.advice import Advice
from immich_ml_metal.index_guard.guard import IndexFinding
from immich_ml_metal.settings import Settings

GB = 10**9
MAC = Machine("Darwin", "arm64", False, "15.2", (3, 12, 4), 24 * GB, 12 * GB, sleep_min=0)
MODELS = tuple(ModelFact(name, True) for name in ("ViT-B-32__openai", "buffalo_l"))
HEALTHY = Facts(
    version="0.1.0",
    machine=MAC,
    settings=Settings(
        models_dir=Path("/Users/me/.cache/immich_ml"),
        immich_url="http://nas:2283",
        immich_api_key=SecretStr("k"),
    ),
    port=Port(3003, "ours", version="0.1.0", health={"guard": {"why_off": ""}, "troubles": []}),
    packages={"mlx": "0.32.4", "onnxruntime": "1.32.0"},
    disk_free_bytes=100 * GB,
    models=MODELS,
    tests=(EngineTest("clip", "mlx", "ViT-B-32__openai"),),
    addresses=("192.168.1.20",),
    service="running",
    immich=(),
    clock_skew_s=0.4,
    index=(IndexFinding("clip/ViT-B-32__openai", "same", "as set", "made as they were"),),
)


def with_machine(**changes: Any) -> Facts:
    return replace(HEALTHY, machine=replace(MAC, **changes))


ENGINE_DOWN = (EngineTest("clip", "mlx", "ViT-B-32__openai", error="no answer"),)
MISSING = (ModelFact("ViT-B-32__openai", False), ModelFact("buffalo_l", True))
UNKNOWN = (ModelFact("my-clip", False, "no official model is called my-clip"), *MODELS[1:])
PAUSED = {
    "guard": {"why_off": "", "paused": {"smartSearch": {"reason": "not here", "since": "10:00"}}}
}
CORRUPT = (ModelFact("buffalo_l", True, "detection/model.onnx is damaged"),)

# name: facts, the check that must be named first, words of its finding, words of its fix
BROKEN: dict[str, tuple[Facts, str, str, str]] = {
    "rosetta": (
        replace(
            with_machine(is_translated=True, arch="x86_64"),
            packages={"mlx": None},
            tests=ENGINE_DOWN,
        ),
        "architecture",
        "Rosetta",
        "arch -arm64",
    ),
    "old macOS": (
        replace(with_machine(release="13.6"), packages={"mlx": None}, tests=ENGINE_DOWN),
        "system",
        "13.6, needs 14",
        "update macOS",
    ),
    "old Python": (with_machine(python=(3, 10, 2)), "python", "3.10.2", "--python 3.12"),
    "missing wheel": (
        replace(HEALTHY, packages={"mlx": None}, tests=ENGINE_DOWN),
        "packages",
        "mlx",
        "--force",
    ),
    "bad setting": (
        replace(HEALTHY, config_error="ML_PORT = '70000': too large", service="stopped"),
        "settings",
        "70000",
        "config check",
    ),
    "no memory": (
        replace(with_machine(memory_free_bytes=GB // 2), tests=ENGINE_DOWN),
        "memory",
        "500 MB of 24.0 GB",
        "smaller models",
    ),
    "disk full": (
        replace(HEALTHY, disk_free_bytes=GB // 4, models=MISSING, models_dir_error="disk full"),
        "disk",
        "250 MB",
        "models_dir",
    ),
    "read-only model folder": (
        replace(HEALTHY, models=MISSING, models_dir_error="permission denied", hub=""),
        "model folder",
        "permission denied",
        "chown",
    ),
    "hub blocked": (
        replace(HEALTHY, models=MISSING, hub="connection refused", tests=ENGINE_DOWN),
        "hub",
        "connection refused",
        "HF_ENDPOINT",
    ),
    "a model that no hub has": (
        replace(HEALTHY, models=UNKNOWN, hub="offline", tests=ENGINE_DOWN),
        "model names",
        "my-clip",
        "Immich's settings",
    ),
    "a queue is paused": (
        replace(HEALTHY, port=replace(HEALTHY.port, health=PAUSED)),
        "queues",
        "smartSearch is paused by us: not here",
        "immich status",
    ),
    "offline without models": (
        replace(HEALTHY, models=MISSING, hub="offline", tests=ENGINE_DOWN),
        "hub",
        "offline by setting",
        "ML_OFFLINE",
    ),
    "model corrupt": (
        replace(HEALTHY, models=CORRUPT, tests=ENGINE_DOWN),
        "models",
        "detection/model.onnx",
        "models pull buffalo_l",
    ),
    "clock wrong": (
        replace(HEALTHY, clock_skew_s=-86400, hub="certificate not yet valid", models=MISSING),
        "clock",
        "-86400 s",
        "automatic time",
    ),
    "port taken": (
        replace(HEALTHY, port=Port(3003, "taken", holder="node, process 812"), service="stopped"),
        "port",
        "node, process 812",
        "ML_PORT",
    ),
    "the container has the port": (
        replace(HEALTHY, port=Port(3003, "other_ml"), tests=ENGINE_DOWN),
        "port",
        "another machine-learning service",
        "published port",
    ),
    "old process serving": (
        replace(HEALTHY, port=Port(3003, "ours", version="0.0.9"), tests=ENGINE_DOWN),
        "version",
        "0.0.9 is still serving",
        "service restart",
    ),
    "engine broken": (replace(HEALTHY, tests=ENGINE_DOWN), "engines", "no answer", "--share"),
    "service stopped": (
        replace(HEALTHY, service="stopped", port=Port(3003, "free")),
        "start at boot",
        "not running",
        "service logs",
    ),
    "immich refuses": (
        replace(HEALTHY, immich=None, immich_error="refuses the API key"),
        "immich",
        "refuses the API key",
        "immich status",
    ),
    "immich asks elsewhere": (
        replace(HEALTHY, immich=(Advice("none of Immich's URLs", is_fault=True),)),
        "immich",
        "none of Immich's URLs",
        "immich status",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_set_up_is_told_by_its_cause(name: str) -> None:
    facts, check, finding, fix = BROKEN[name]
    cause = first_cause(examine(CHECKS, facts))
    assert cause is not None
    assert cause.name == check
    assert finding in cause.text
    assert fix in cause.fix


@pytest.mark.parametrize("name", BROKEN)
def test_what_follows_from_the_cause_is_no_second_failure(name: str) -> None:
    facts, check, _, _ = BROKEN[name]
    findings = examine(CHECKS, facts)
    assert [r.name for r in findings if r.level is Outcome.FAIL] == [check]
    following = [r for r in findings if r.follows]
    assert {(r.follows, r.level) for r in following} <= {(check, Outcome.WARN)}
    if check == "hub":
        assert "models" in [r.name for r in following]


def result_of(facts: Facts, name: str) -> Finding:
    return next(r for r in examine(CHECKS, facts) if r.name == name)


def test_an_index_that_was_made_otherwise_is_a_warning_with_the_way_out() -> None:
    said = "vectors of ViT-B-32__openai were made with erf GELU"
    changed = IndexFinding("clip/ViT-B-32__openai", "changed", "as before", said)
    found = result_of(replace(HEALTHY, index=(changed,)), "index")
    assert (found.level, found.text) == (Outcome.WARN, said)
    assert "models accept" in found.fix


def test_an_intel_mac_is_refused_with_the_reason() -> None:
    found = result_of(with_machine(arch="x86_64"), "architecture")
    assert found.level is Outcome.FAIL
    assert "ONNX Runtime has no package" in found.text


def test_folders_that_macos_keeps_from_jobs_are_named() -> None:
    kept = replace(HEALTHY, closed=(Path("/Users/me/Documents/models"),))
    found = result_of(kept, "privacy")
    assert found.level is Outcome.WARN
    assert "/Users/me/Documents/models" in found.text
    assert "Full Disk Access" in found.text


def test_the_permission_for_the_local_network_is_told() -> None:
    settings = Settings(immich_url="http://192.168.1.5:2283")
    assert "Local Network" in result_of(replace(HEALTHY, settings=settings), "privacy").text


def test_without_a_history_the_index_is_not_called_the_same() -> None:
    found = result_of(replace(HEALTHY, index=()), "index")
    assert found.level is Outcome.SKIP
    assert "not known" in found.text


def test_a_healthy_set_up_has_nothing_to_fix() -> None:
    results = examine(CHECKS, HEALTHY)
    assert [r for r in results if r.level is not Outcome.OK] == []
    assert first_cause(results) is None
    assert len(results) >= 18


@pytest.mark.parametrize(
    ("facts", "check", "words"),
    [
        (
            replace(HEALTHY, settings=Settings(host="127.0.0.1")),
            "address",
            "host.docker.internal:3003",
        ),
        (replace(HEALTHY, addresses=()), "address", "no network address"),
        (replace(HEALTHY, hub="timed out"), "hub", "all configured models are here"),
        (replace(HEALTHY, models=MISSING), "models", "fetched at first use: ViT-B-32__openai"),
        (replace(HEALTHY, state_dir_error="read-only file system"), "state folder", "read-only"),
        (with_machine(sleep_min=10), "sleep", "sleeps after 10 min"),
        (with_machine(memory_free_bytes=2 * GB), "memory", "2.0 GB of 24"),
        (replace(HEALTHY, disk_free_bytes=3 * GB), "disk", "3.0 GB"),
        (replace(HEALTHY, clock_skew_s=90), "clock", "+90 s"),
        (replace(HEALTHY, service="none"), "start at boot", "does not start"),
        (replace(HEALTHY, service_error="/u: closed"), "start at boot", "not known: /u: closed"),
        (replace(HEALTHY, logs_bytes=2**30), "logs", "1.1 GB"),
        (replace(HEALTHY, immich=(Advice("raise it to 8"),)), "immich", "raise it to 8"),
    ],
)
def test_what_works_but_could_be_better_is_a_warning(facts: Facts, check: str, words: str) -> None:
    result = result_of(facts, check)
    assert result.level is Outcome.WARN
    assert words in result.text


def test_the_address_to_type_is_given_for_both_families() -> None:
    facts = replace(HEALTHY, addresses=("192.168.1.20", "fd00::7"))
    text = result_of(facts, "address").text
    assert "http://192.168.1.20:3003 or http://[fd00::7]:3003" in text


def test_a_full_disk_does_not_matter_once_the_models_are_here() -> None:
    assert result_of(replace(HEALTHY, disk_free_bytes=GB), "disk").level is Outcome.WARN


def test_skipped_self_tests_say_why() -> None:
    tests = (EngineTest("ocr", "cpu", "PP-OCRv6_small", skipped="(not downloaded)"),)
    assert "ocr on cpu (not downloaded)" in result_of(replace(HEALTHY, tests=tests), "engines").text


def test_verdicts_are_told_with_their_figures_and_what_speaks_against_an_engine() -> None:
    fine = EngineChoice("ViT-B-32__openai/visual on mlx float16, cosine 0.9999988, 9 ms")
    told = result_of(replace(HEALTHY, choices=(fine,)), "verdicts")
    assert (told.level, told.text) == (Outcome.OK, fine.told)
    waiting = EngineChoice("buffalo_l/detection on cpu float32", is_pending=True)
    told = result_of(replace(HEALTHY, choices=(fine, waiting)), "verdicts")
    assert told.level is Outcome.OK
    assert "checks what is not known by itself" in told.text
    bad = replace(waiting, warning="mlx float16 is not used: crashed: SIGABRT")
    told = result_of(replace(HEALTHY, choices=(fine, bad, bad)), "verdicts")
    assert (told.level, told.text) == (Outcome.WARN, bad.warning)
    assert "qualify --again" in told.fix
    assert result_of(HEALTHY, "verdicts").text == "nothing to measure"
