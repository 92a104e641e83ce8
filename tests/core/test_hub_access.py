from __future__ import annotations

import pytest
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lora_hf.core.hub_access import explain_hub_error, is_hub_error


class Response:
    """As much of an HTTP response as an error carries."""

    def __init__(self, status_code: int) -> None:
        self.status_code = status_code


def http_error(status: int, kind: type = HfHubHTTPError, server_message: str | None = None) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, f"{status} Client Error")
    error.response, error.server_message = Response(status), server_message
    return error


def wrapped(error: Exception) -> OSError:
    """As transformers raises it."""
    outer = OSError("cannot load")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(404, RevisionNotFoundError), "no branch, tag or commit 'v9'"),
        (http_error(401, RepositoryNotFoundError), "no such repository on the hub"),
        (http_error(401), "refused the token (401)"),
        (http_error(503), "answered with status 503; try again later"),
        (http_error(400, server_message="bad card"), "answered with status 400: bad card"),
        (LocalEntryNotFoundError("x"), "broke (LocalEntryNotFoundError); try again"),
        (ConnectionResetError("x"), "broke (ConnectionResetError); try again"),
        (OSError("file should be of size 3 but has size 2"), "broke (OSError); try again"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError("license: not known"), "license: not known"),
    ],
)
def test_an_error_is_explained_also_if_another_library_wraps_it(error: Exception, message: str) -> None:
    assert message in explain_hub_error(error, "v9")
    if is_hub_error(error):
        assert message in explain_hub_error(wrapped(error), "v9")


def test_an_upload_without_write_access_is_explained() -> None:
    for status in (403, 404):
        assert f"may not write there ({status})" in explain_hub_error(http_error(status), upload=True)


def test_only_answers_of_the_hub_are_hub_errors() -> None:
    assert is_hub_error(wrapped(http_error(401)))
    assert not is_hub_error(OSError("no config.json"))
    assert not is_hub_error(wrapped(EntryNotFoundError("no config.json in the repository")))
