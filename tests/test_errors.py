"""The error tree, its drawing and its HTTP statuses must say the same."""

import errno
import inspect
import os
import re

import pytest

from immich_ml_metal import errors


def tree() -> list[type[errors.ServiceError]]:
    return [
        member
        for _, member in inspect.getmembers(errors, inspect.isclass)
        if issubclass(member, errors.ServiceError)
    ]


def leaves() -> set[type[errors.ServiceError]]:
    return {member for member in tree() if not member.__subclasses__()}


def drawn() -> dict[str, str]:
    """Child → parent, read off the branches of the drawing."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"^((?:[│ ]   )*(?:[├└]── )?)([A-Z]\w+)(?:  |$)", line):
            depth = len(match[1]) // 4
            path[depth:] = [match[2]]
            if depth:
                parents[match[2]] = path[depth - 1]
    return parents


def test_the_drawing_in_the_docstring_is_the_tree() -> None:
    actual = {
        member.__name__: base.__name__
        for member in tree()
        for base in member.__bases__
        if issubclass(base, errors.ServiceError)
    }
    assert len(actual) > 10
    assert drawn() == actual


def test_every_leaf_has_one_status_and_nothing_else_has() -> None:
    assert set(errors.STATUS) == leaves() - {errors.ConfigError}


def test_the_drawing_shows_each_status() -> None:
    shown = re.findall(r"([A-Z]\w+) +(\d{3})  ", errors.__doc__ or "")
    table = {leaf.__name__: str(status) for leaf, status in errors.STATUS.items()}
    assert dict(shown) == table
    assert len(shown) == len(table)


def test_what_was_not_raised_on_purpose_is_500() -> None:
    assert errors.status_of(ValueError("x")) == 500
    assert errors.status_of(errors.UploadStalled("x")) == 408


def test_only_what_may_pass_by_itself_asks_to_be_tried_again() -> None:
    assert all(errors.STATUS[leaf] == 503 for leaf in errors.RETRY_AFTER_S)


def test_a_request_error_is_a_4xx_and_no_other_error_is() -> None:
    for leaf, status in errors.STATUS.items():
        assert (400 <= status < 500) == issubclass(leaf, errors.RequestError), leaf


def test_every_class_says_what_happened() -> None:
    for member in tree():
        assert (inspect.getdoc(member) or "").endswith("."), member
        assert (
            not member.__name__.endswith("Error")
            or member.__subclasses__()
            or (member in (errors.InferenceError, errors.ConfigError))
        )


def caused_by(cause: BaseException) -> Exception:
    """What a layer between makes of a failure."""
    failure = errors.LoadFailed("the file is damaged")
    failure.__cause__ = cause
    return failure


@pytest.mark.parametrize(
    ("exc", "kind"),
    [
        (MemoryError(), errors.OutOfMemory),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), errors.OutOfMemory),
        (OSError("out of memory error when reading image file"), errors.OutOfMemory),
        (
            RuntimeError(
                "Non-zero status code returned while running Conv node. Name:'288_nchwc' Status "
                "Message: std::bad_alloc"
            ),
            errors.OutOfMemory,
        ),
        (RuntimeError("Load model from m.onnx failed:std::bad_alloc"), errors.OutOfMemory),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), errors.Busy),
        (OSError(errno.ENFILE, os.strerror(errno.ENFILE)), errors.Busy),
        (RuntimeError("Load model from m.onnx failed:system error number 24"), errors.Busy),
    ],
)
def test_what_the_machine_had_no_more_of_is_told_from_what_it_led_to(
    exc: Exception, kind: type[Exception]
) -> None:
    for told in (exc, caused_by(exc), caused_by(caused_by(exc))):
        assert type(errors.what_ran_out(told)) is kind
        with pytest.raises(kind), errors.naming_what_ran_out():
            raise told


@pytest.mark.parametrize(
    "exc",
    [
        ValueError("torn"),
        OSError(errno.ENOENT, os.strerror(errno.ENOENT)),
        RuntimeError("Load model from m.onnx failed:system error number 2"),
        RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory"),
    ],
)
def test_another_failure_stays_what_it_is(exc: Exception) -> None:
    assert errors.what_ran_out(caused_by(exc)) is None
    with pytest.raises(type(exc)), errors.naming_what_ran_out():
        raise exc
