"""The file itself: only tensors come out of it, and code in it is never run."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_hf.adapters.convert.checkpoint import read_loralib
from lora_hf.core.errors import AdapterError

GOOD = {"a.lora_A": torch.ones(2, 3), "a.lora_B": torch.zeros(4, 2)}


class Malicious:
    """Unpickling it makes the folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {**GOOD, "b": evil}], ids=["alone", "among tensors"])
@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "bare pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(wrap: Callable[[Any], Any], zipped: bool, tmp_path: Path) -> None:
    proof, file = tmp_path / "it ran", tmp_path / "lora.bin"
    torch.save(wrap(Malicious(proof)), file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(AdapterError, match=r"lora.bin: refused: it asks for posix.mkdir. None of its code was run"):
        read_loralib(file)
    assert not proof.exists()
    torch.load(file, weights_only=False)
    assert proof.exists(), "the file must be one that runs code where somebody lets it"


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_a_plain_pickle_is_refused(protocol: int, tmp_path: Path) -> None:
    file = tmp_path / "lora.bin"
    file.write_bytes(pickle.dumps(Malicious(tmp_path / "it ran"), protocol))
    with pytest.raises(AdapterError, match=r"lora.bin: (refused: it asks for posix.mkdir|expected a file of torch)"):
        read_loralib(file)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "bare pickle"])
@pytest.mark.parametrize(
    "wrapped", [GOOD, {"model_state_dict": GOOD}, {"state_dict": {f"module.{k}": GOOD[k] for k in GOOD}}]
)
def test_tensors_are_read_from_every_wrapping(wrapped: dict[str, Any], zipped: bool, tmp_path: Path) -> None:
    torch.save(wrapped, tmp_path / "lora.bin", _use_new_zipfile_serialization=zipped)
    found = read_loralib(tmp_path / "lora.bin")
    assert found.keys() == GOOD.keys()
    assert all(torch.equal(found[key], GOOD[key]) for key in GOOD)


BAD: dict[str, tuple[Any, str]] = {
    "text": (b"not a checkpoint\n", "expected a file of torch.save, found one that begins with b'not '"),
    "empty": (b"", "found one that begins with b''"),
    "an archive of nothing": (b"PK\x03\x04" + b"\0" * 40, "damaged checkpoint"),
    "a pickle cut short": (b"\x80\x02}q", "lora.bin: "),
    "a list": ([1, 2], "expected a dict of tensors by name, found list"),
    "numbers for names": ({1: torch.ones(2)}, "expected a dict of tensors by name, found dict"),
    "a number for a tensor": ({**GOOD, "epoch": 3}, "epoch: expected a tensor, found int"),
    "no number": ({**GOOD, "a.lora_B": torch.full((4, 2), float("nan"))}, "a.lora_B holds NaN or infinity"),
    "no LoRA": ({"classifier.weight": torch.ones(2)}, "holds no <path>.lora_A"),
    "nothing": (
        {},
        "holds no <path>.lora_A: expected what torch.save(lora.lora_state_dict(model)) writes, found nothing",
    ),
    "PEFT's": ({"base_model.model.a.lora_A.weight": torch.ones(2, 3)}, "is a checkpoint of PEFT, not of loralib"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_file_is_one_message(bad: str, tmp_path: Path) -> None:
    content, message = BAD[bad]
    file = tmp_path / "lora.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(AdapterError) as error:
        read_loralib(file)
    assert message in str(error.value)
    assert str(file) in str(error.value)


def test_a_truncated_file_a_missing_one_and_a_folder(tmp_path: Path) -> None:
    torch.save(GOOD, tmp_path / "lora.bin")
    (tmp_path / "lora.bin").write_bytes((tmp_path / "lora.bin").read_bytes()[:-100])
    with pytest.raises(AdapterError, match="damaged checkpoint"):
        read_loralib(tmp_path / "lora.bin")
    with pytest.raises(AdapterError, match=r"nowhere.bin: cannot be read: No such file"):
        read_loralib(tmp_path / "nowhere.bin")
    with pytest.raises(AdapterError, match="cannot be read: Is a directory"):
        read_loralib(tmp_path)
