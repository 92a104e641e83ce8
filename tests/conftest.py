"""What every test gets: no network, one thread a process, an empty Hugging Face cache, and the data if present.

The environment is set when this file is imported, before torch and the Hugging Face libraries read it; the workers of
pytest-xdist and the commands that tests start inherit it.
"""

from __future__ import annotations

import gc
import ipaddress
import os
import re
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parent.parent
CACHE_PREFIX = "lora_hf_tests_"
ALL_LONG = re.compile(r"^pytestmark = .*\bpytest\.mark\.full\b", re.MULTILINE)
DISCARD = "http://127.0.0.1:9"  # nothing listens there: a command that tries the network fails at once

_cache: tempfile.TemporaryDirectory[str] | None = None


def _set_environment() -> None:
    global _cache
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # inherited from the process that started it
    _cache = tempfile.TemporaryDirectory(prefix=CACHE_PREFIX)
    os.environ |= {
        "HF_HOME": _cache.name,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_EVALUATE_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "Agg",
        # Two workers of one thread each beat one of two, and sums come in the same order on every machine.
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HTTP_PROXY": DISCARD,
        "HTTPS_PROXY": DISCARD,
        "http_proxy": DISCARD,
        "https_proxy": DISCARD,
        "NO_PROXY": "127.0.0.1,localhost,::1",
        "no_proxy": "127.0.0.1,localhost,::1",
    }
    for name in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        os.environ.pop(name, None)


def _is_loopback(host: str | bytes | None) -> bool:
    if host is None:
        return True
    name = host.decode() if isinstance(host, bytes) else host
    if name in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(name.split("%")[0]).is_loopback
    except ValueError:
        return False


def _refuse(host: object) -> OSError:
    return OSError(
        f"this test tried to reach {host}: the suite runs with the network cut. Use a tiny base and local files"
    )


def _cut_network() -> None:
    """Every connection and look-up of a name beyond this machine raises, for the whole life of the process."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(sock: socket.socket, address: Any) -> None:
        if sock.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
            raise _refuse(address[0])

    def guarded_connect(self: socket.socket, address: Any) -> None:
        check(self, address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        check(self, address)
        return connect_ex(self, address)

    def guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_loopback(host):
            raise _refuse(host)
        return getaddrinfo(host, *args, **kwargs)

    socket.socket.connect = guarded_connect
    socket.socket.connect_ex = guarded_connect_ex
    socket.getaddrinfo = guarded_getaddrinfo


def _receive_sigint() -> None:
    """Also where a shell has started the suite in the background, which ignores SIGINT, and so would its children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


gc.disable()  # until all test modules are imported: collecting among millions of new objects takes a third of that
_set_environment()
_cut_network()
_receive_sigint()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`make test` does not import the files whose tests are all long."""
    if config.option.markexpr != "not full" or collection_path.suffix != ".py":
        return None
    return ALL_LONG.search(collection_path.read_text(encoding="utf-8")) is not None or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes go first, so that no worker ends long before the other."""
    items.sort(key=lambda item: item.get_closest_marker("minutes") is None)


def pytest_collection_finish() -> None:
    gc.enable()


def pytest_unconfigure() -> None:
    if _cache is not None:
        _cache.cleanup()


@pytest.fixture(scope="module", autouse=True)
def _what_is_loaded_stays() -> None:
    """The Trainer looks for garbage after each run, among all objects of torch and transformers; not from here on."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _a_file_leaves_no_trace() -> Iterator[None]:
    from tests.support.process_state import restored_process_state

    with restored_process_state():
        yield


@pytest.fixture(scope="session", autouse=True)
def _auto_precision_is_fp32() -> Iterator[None]:
    """With `auto`, the numbers of a test would depend on whether its machine has bf16 units."""
    from lora_hf.lora import precision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "bf16_gain", lambda: 1.0)
        yield


@pytest.fixture(autouse=True)
def _a_test_leaves_no_trace() -> Iterator[None]:
    from tests.support.process_state import restored_process_state

    with restored_process_state():
        yield


@pytest.fixture
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scorers that Java runs take seconds to start, and are null like this."""
    monkeypatch.setenv("PATH", "")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data: `$LORA_HF_DATA_DIR`, else `../shared/data` beside the repository."""
    folder = Path(os.environ.get("LORA_HF_DATA_DIR") or REPO.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}: set LORA_HF_DATA_DIR to a folder with glue/<task>/<split>.parquet")
    return folder.resolve()


@pytest.fixture(scope="session")
def models_dir(data_dir: Path) -> Path:
    """The folder of real models beside the data."""
    folder = data_dir.parent / "models"
    if not folder.is_dir():
        pytest.skip(f"no models in {folder}: put Hugging Face model folders there")
    return folder


@pytest.fixture(scope="session")
def real_models() -> Path:
    """The folder with the real pretrained models `minilm` and `smollm2`, from $LORA_HF_MODELS."""
    folder = Path(os.environ.get("LORA_HF_MODELS", ""))
    if not all((folder / name / "config.json").is_file() for name in ("minilm", "smollm2")):
        pytest.skip("set LORA_HF_MODELS to a folder that holds the models minilm and smollm2")
    return folder


@pytest.fixture(scope="session")
def short_smollm2(real_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with 6 of its 30 layers: real tokens and weights in a fifth of the time, and texts without sense."""
    from transformers import AutoModelForCausalLM

    whole, folder = real_models / "smollm2", tmp_path_factory.mktemp("models") / "smollm2"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(whole, num_hidden_layers=6).save_pretrained(folder)
    return folder
