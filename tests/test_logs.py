import asyncio
import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immich_ml_metal.logs import (
    FILE_BYTES,
    cap_file,
    configure_logging,
    file_of,
    redact,
    request_scope,
    split_facts,
)
from immich_ml_metal.settings import Settings

log = logging.getLogger("immich_ml_metal.test")


@contextmanager
def logged(
    stream: io.StringIO, *, file_bytes: int = FILE_BYTES, **settings: object
) -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    chosen = Settings(**settings)  # type: ignore[arg-type]
    configure_logging(chosen, "gateway", stream=stream, file_bytes=file_bytes)
    try:
        yield stream
    finally:
        for handler in list(root.handlers):
            root.removeHandler(handler)
            handler.close()
        root.setLevel(level)
        for handler in before:
            root.addHandler(handler)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_json_lines_carry_typed_facts_and_the_request_id() -> None:
    with logged(io.StringIO(), log_format="json") as out, request_scope("abc123"):
        log.info("loaded %s model=%s ms=%d", "at last", "ViT B", 51)
    line = json.loads(out.getvalue())
    assert line["event"] == "loaded at last"
    assert (line["model"], line["ms"], line["request_id"]) == ("ViT B", 51, "abc123")
    assert (line["level"], line["process"], line["logger"]) == ("info", "gateway", log.name)


def test_text_lines_are_one_line_and_plain_off_a_terminal() -> None:
    with logged(io.StringIO()) as out:
        log.warning("engine died code=%d reason=%s", 6, "two\nlines")
    assert out.getvalue().endswith("warning gateway engine died code=6 reason=two\\nlines\n")
    assert "\x1b" not in out.getvalue()


def test_a_terminal_gets_colour_unless_told_not_to() -> None:
    with logged(Terminal()) as coloured:
        log.info("started")
    with logged(Terminal(), no_color=True) as plain:
        log.info("started")
    assert "\x1b[32m" in coloured.getvalue()
    assert "\x1b" not in plain.getvalue()


def test_the_level_is_obeyed() -> None:
    with logged(io.StringIO(), log_level="warning") as out:
        log.info("quiet")
        log.error("loud")
    assert "quiet" not in out.getvalue()
    assert "loud" in out.getvalue()


def test_a_traceback_follows_its_event_and_is_one_json_line() -> None:
    with logged(io.StringIO(), log_format="json") as out:
        try:
            raise ValueError("broken")
        except ValueError:
            log.exception("request failed")
    assert out.getvalue().count("\n") == 1
    assert "ValueError: broken" in json.loads(out.getvalue())["traceback"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("key is s3cret-key", "key is ***"),
        ("token hf_abcdefghijkl", "token ***"),
        ("get http://user:pw@nas:2283/api", "get http://***@nas:2283/api"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("GET /predict?text=my+secret+query 200", "GET /predict?*** 200"),
        ("what now? a=b", "what now? a=b"),
    ],
)
def test_secrets_and_queries_are_blotted_out(text: str, shown: str) -> None:
    assert redact(text, ["s3cret-key"]) == shown


def test_the_immich_key_is_never_written() -> None:
    with logged(io.StringIO(), immich_api_key="tell-nobody", log_format="json") as out:
        log.info("asked with key=%s and %s", "tell-nobody", "tell-nobody")
    assert "tell-nobody" not in out.getvalue()
    assert out.getvalue().count("***") == 2


def test_clients_do_not_log_addresses_at_info() -> None:
    with logged(io.StringIO()) as out:
        logging.getLogger("httpx").info("HTTP Request: GET http://x/?text=private")
    assert out.getvalue() == ""


def test_a_log_file_is_rotated_and_capped(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "service.log"
    with logged(io.StringIO(), log_file=path, file_bytes=2000) as out:
        for number in range(200):
            log.info("event number=%d", number)
    files = sorted(path.parent.iterdir())
    assert [file.name for file in files] == [
        "service.log",
        *(f"service.log.{n}" for n in (1, 2, 3)),
    ]
    assert all(file.stat().st_size <= 2000 for file in files)
    assert "number=199" in path.read_text()
    assert out.getvalue() == ""


def test_the_captured_standard_error_is_emptied_at_the_start_when_large(tmp_path: Path) -> None:
    captured = tmp_path / "x.stderr"
    captured.write_bytes(b"x" * (2**20 + 1))
    with logged(io.StringIO(), log_file=tmp_path / "x.log"):
        assert captured.stat().st_size == 0


def test_with_a_file_a_terminal_still_sees_the_lines(tmp_path: Path) -> None:
    with logged(Terminal(), log_file=tmp_path / "x.log") as out:
        log.info("both")
    assert "both" in out.getvalue()
    assert "both" in (tmp_path / "x.log").read_text()


def test_the_engine_has_a_file_of_its_own() -> None:
    assert file_of(Path("/var/log/x.log"), "gateway") == Path("/var/log/x.log")
    assert file_of(Path("/var/log/x.log"), "worker") == Path("/var/log/x.worker.log")


def test_a_held_file_is_emptied_in_place_when_over_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "stderr"
    with path.open("ab") as holder:
        holder.write(b"x" * 100)
        holder.flush()
        cap_file(path, 200)
        assert path.stat().st_size == 100
        cap_file(path, 50)
        holder.write(b"y")
        holder.flush()
    assert path.read_bytes() == b"y"


def test_a_foreign_request_id_is_taken_only_when_it_is_sane() -> None:
    with request_scope("caller-7") as kept:
        assert kept == "caller-7"
    for bad in ("x\nforged line", "", "a" * 65, None):
        with request_scope(bad) as made:
            assert made != bad
            assert len(made) == 12


async def test_requests_at_the_same_time_keep_their_own_ids() -> None:
    out = io.StringIO()

    async def work(name: str) -> None:
        with request_scope(name):
            await asyncio.sleep(0)
            await asyncio.to_thread(log.info, "worked name=%s", name)

    with logged(out, log_format="json"):
        await asyncio.gather(*(work(f"r{i}") for i in range(8)))
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert len(lines) == 8
    assert all(line["request_id"] == line["name"] for line in lines)


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=8), max_size=4))
def test_facts_come_back_as_they_were_given(values: list[str]) -> None:
    message = "happened" + "".join(f" k{i}=%s" for i in range(len(values)))
    assert split_facts(message, tuple(values)) == (
        "happened",
        {f"k{i}": value for i, value in enumerate(values)},
    )


@given(st.text(max_size=20), st.floats(allow_nan=False, allow_subnormal=False), st.integers())
def test_the_words_agree_with_plain_formatting_when_there_are_no_facts(
    name: str, number: float, count: int
) -> None:
    message = "at 100%% of %s: %.3f, %d"
    words, facts = split_facts(message, (name, number, count))
    assert facts == {}
    assert words == (message % (name, number, count)).strip(" ,")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is full")
def test_a_full_disk_under_the_log_file_is_one_line_and_no_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with logged(io.StringIO(), log_file=Path("/dev/full")):
        for _ in range(3):
            log.info("lost")
    told = "the log file /dev/full lacks lines from here: No space left on device\n"
    assert capsys.readouterr().err == told
