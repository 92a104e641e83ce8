"""Whether the Hugging Face hub can be reached, and what its errors mean.

Offline, the hub's client requests every file six times with growing pauses (23 s for the first file of a data set).
Code that is about to download calls `hub_is_reachable` first, and reads the local cache if the answer is no.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator


@functools.cache
def hub_is_reachable(timeout: float = 3.0) -> bool:
    """Returns whether the hub answers within `timeout` seconds. The answer is cached for the process.

    Sends no request if `HF_HUB_OFFLINE`, `TRANSFORMERS_OFFLINE` or `HF_DATASETS_OFFLINE` is set. The request goes
    through huggingface_hub's own client, so that it honors `HF_ENDPOINT` and the proxy variables.
    """
    from huggingface_hub import constants, get_session

    datasets_offline = os.environ.get("HF_DATASETS_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES
    if constants.is_offline_mode() or datasets_offline:
        return False
    answered = threading.Event()

    def request() -> None:
        try:
            response = get_session().head(constants.ENDPOINT, timeout=timeout, follow_redirects=False)
        except Exception:  # noqa: BLE001 - no DNS, no route, a proxy's refusal, a bad endpoint: all mean "unreachable"
            return
        if response.status_code < 500:  # a 5xx comes from a gateway that cannot reach the hub
            answered.set()

    # A thread, because the client's timeout does not cover the DNS lookup, which alone can take half a minute.
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(timeout)
    return answered.is_set()


def hub_unreachable() -> str:
    """The clause that messages use where `hub_is_reachable` is false."""
    from huggingface_hub import constants

    return f"the hub ({constants.ENDPOINT}) is out of reach or switched off (HF_HUB_OFFLINE, HF_DATASETS_OFFLINE)"


def explain_hub_error(error: BaseException, revision: str | None = None, upload: bool = False) -> str:
    """Explains an error of huggingface_hub, transformers or datasets: what went wrong, then the next step.

    The text completes a message that begins with the name of the repository and a colon.

    Args:
        revision: the branch, tag or commit that was requested.
        upload: the request was to write; then 403 and 404 mean a token without write access.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]: the base class of its HTTP client's errors
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    chain = list(_causes(error))
    status = next((status for cause in chain if (status := _status(cause)) is not None), None)
    server_message = next((text for cause in chain if (text := getattr(cause, "server_message", None))), None)
    if any(isinstance(cause, RevisionNotFoundError) for cause in chain):
        return f"the hub's repository has no branch, tag or commit {revision!r}"
    if upload and status in (403, 404):
        return (
            f"this token may not write there ({status}); choose a repository of your own, or log in as its owner with "
            "`hf auth login`, or set HF_TOKEN to a token with write access"
        )
    if not upload and any(isinstance(cause, RepositoryNotFoundError) for cause in chain):
        return (
            f"no such repository on the hub ({constants.ENDPOINT}), or no access to it. Check the name; for a private "
            "or gated repository log in with `hf auth login`, or set HF_TOKEN"
        )
    if status == 401:
        return "the hub refused the token (401); log in again with `hf auth login`, or set HF_TOKEN"
    if status is not None:
        reason = f": {server_message}" if server_message else ""
        return f"the hub answered with status {status}{reason}{'; try again later' if status >= 500 else ''}"
    connection_errors = (HTTPError, LocalEntryNotFoundError, ConnectionError, TimeoutError)
    # A plain OSError is the client's report of a file that is shorter than announced.
    if (type(error) is OSError and error.errno is None) or any(isinstance(cause, connection_errors) for cause in chain):
        reason = type(chain[-1]).__name__
        return f"the connection to the hub ({constants.ENDPOINT}) broke ({reason}); try again"
    return str(error).strip() or type(error).__name__


def is_hub_error(error: BaseException) -> bool:
    """Whether the hub refused a request or lacks the repository or revision, also if another library wraps the error.

    False for a repository without the wanted file: the library that wanted the file explains that better.
    """
    from huggingface_hub.errors import EntryNotFoundError

    chain = list(_causes(error))
    missing_file = any(isinstance(cause, EntryNotFoundError) for cause in chain)
    return not missing_file and any(_status(cause) is not None for cause in chain)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
