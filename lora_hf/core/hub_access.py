"""Whether the Hugging Face hub can be reached, decided in seconds.

Out of reach of the hub its client asks for every file six times with growing pauses (23 s measured for the first file
of a data set), so whoever is about to download asks here first and reads the local cache instead.
"""

from __future__ import annotations

import functools
import os
import threading


@functools.cache
def hub_is_reachable(timeout: float = 3.0) -> bool:
    """Returns whether the hub answers within `timeout` seconds; asked once per process.

    False without asking where `HF_HUB_OFFLINE`, `TRANSFORMERS_OFFLINE` or `HF_DATASETS_OFFLINE` is set. The request
    goes through huggingface_hub's own client, so `HF_ENDPOINT` and the proxy variables mean what they mean there.
    """
    from huggingface_hub import constants, get_session

    datasets_offline = os.environ.get("HF_DATASETS_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES
    if constants.is_offline_mode() or datasets_offline:
        return False
    answered = threading.Event()

    def ask() -> None:
        try:
            response = get_session().head(constants.ENDPOINT, timeout=timeout, follow_redirects=False)
        except Exception:  # noqa: BLE001 - no name, no route, a proxy's refusal, a bad endpoint: all mean "not from here"
            return
        if response.status_code < 500:  # a 5xx is a gateway speaking for a hub that it cannot reach
            answered.set()

    # A thread, because no timeout of the client covers the look-up of the host name: that alone can take half a minute.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(timeout)
    return answered.is_set()
