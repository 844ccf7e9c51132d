"""The error tree, its drawing and its HTTP statuses must say the same."""

import inspect
import re

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
