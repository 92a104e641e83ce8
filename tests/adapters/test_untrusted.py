"""Files and names from somebody else: no code in them runs, and nothing is written outside the given folders."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_hf.adapters.format import WEIGHTS_FILE, read_adapter
from lora_hf.adapters.resolve import find_saved_model
from lora_hf.adapters.save_load import load_adapter
from lora_hf.core.config.loader import load_config
from lora_hf.core.config.schema import ModelConfig, RunConfig
from lora_hf.core.errors import AdapterError, ConfigError, ModelError, UserError
from lora_hf.data.tasks.registry import get_task
from lora_hf.lora.inject import inject
from lora_hf.models.load import BUNDLED_FOLDER, load_base, load_tokenizer
from lora_hf.training.checkpoints import MANIFEST_FILE, sha256
from lora_hf.training.run import train
from lora_hf.training.run_dir import begin_run, find_run_folder, run_lock
from tests.support.adapters_on_disk import TASK, run_folder
from tests.support.kills import small_config, small_rows
from tests.support.small_models import small_model

NAMES = ("../x", "..", ".", "", "a/b", "a\\b", "a\n", "a\0b")


class Malicious:
    """Unpickling it makes the folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def proof(tmp_path: Path) -> Iterator[Path]:
    """The folder that hostile code would make; there is none after the test."""
    yield tmp_path / "it ran"
    assert not (tmp_path / "it ran").exists()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("name", ["adapter_model.bin", WEIGHTS_FILE])
def test_a_pickled_adapter_is_refused_and_not_run(name: str, adapter: Path, proof: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / WEIGHTS_FILE).unlink()
    torch.save({"base_model.model.x.lora_A.weight": Malicious(proof)}, tmp_path / "adapter" / name)
    message = "damaged adapter" if name == WEIGHTS_FILE else f"expected {WEIGHTS_FILE}, found .*{name}"
    for read in (find_saved_model, lambda folder: load_adapter(small_model("roberta", 2), folder)):
        with pytest.raises(AdapterError, match=message):
            read(tmp_path / "adapter")


def test_a_pickled_base_is_refused_and_not_run(proof: Path, tmp_path: Path) -> None:
    small_model("roberta", 2).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save({"roberta.embeddings.word_embeddings.weight": Malicious(proof)}, tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"base: refused: its pickled weights contain more than tensors\. None of their code was run"
    ):
        load_base(ModelConfig(name=str(tmp_path / "base"), precision="fp32"), TASK)


def base_with_code(folder: Path, proof: Path, part: str, more: dict[str, Any]) -> ModelConfig:
    """A base whose config asks for the code beside it."""
    shutil.copytree(BUNDLED_FOLDER / "tiny-roberta", folder)
    config = json.loads((folder / part).read_text())
    (folder / part).write_text(json.dumps(config | more))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(proof)!r})\nclass Evil: pass\n")
    return ModelConfig(name=str(folder), precision="fp32")


def test_a_base_with_code_of_its_own_is_refused_and_not_run(
    proof: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is asked whether to trust it"))
    classes = {"AutoConfig": "evil.Evil", "AutoModelForSequenceClassification": "evil.Evil"}
    model = base_with_code(tmp_path / "base", proof, "config.json", {"model_type": "evil", "auto_map": classes})
    with pytest.raises(ModelError, match=r"base: cannot be loaded: .*custom code"):
        load_base(model, TASK)


def test_the_code_of_a_tokenizer_is_not_run(proof: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is asked whether to trust it"))
    more = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    model = base_with_code(tmp_path / "base", proof, "tokenizer_config.json", more)
    assert type(load_tokenizer(model)).__module__.startswith("transformers.")


def test_code_in_a_checkpoint_is_not_run(proof: Path, tmp_path: Path) -> None:
    rows = small_rows()
    run = train(small_config(tmp_path, max_steps=4), rows=rows)
    (run.folder / "record.json").unlink()
    checkpoint = run.folder / "checkpoints" / "checkpoint-2"
    torch.save(Malicious(proof), checkpoint / "optimizer.pt")
    listed = json.loads((checkpoint / MANIFEST_FILE).read_text())
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(listed | {"optimizer.pt": sha256(checkpoint / "optimizer.pt")}))
    # The manifest was forged to fit.
    shutil.rmtree(checkpoint.with_name("checkpoint-4"))
    with pytest.raises(ConfigError, match=r"checkpoint-2: refused: .*None of its code was run"):
        train(small_config(tmp_path, max_steps=4), resume=str(checkpoint), rows=rows)


def inside(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("name", NAMES)
def test_a_run_lies_in_its_folder(name: str, tmp_path: Path) -> None:
    before = inside(tmp_path)
    with pytest.raises(ConfigError, match=r"output\.name: expected the name of a folder in output\.dir"):
        RunConfig.from_dict({"output": {"dir": str(tmp_path / "outputs"), "name": name}})
    assert inside(tmp_path) == before


@pytest.mark.parametrize("base", ["../..", "x/..", ".", "a/../../b", "/", "..\\..\\x"])
def test_a_name_made_from_a_base_is_a_name(base: str, tmp_path: Path) -> None:
    config = RunConfig.from_dict({"model": {"name": base}, "output": {"dir": str(tmp_path / "outputs")}})
    folder, _ = find_run_folder(config, None)
    with run_lock(folder) as lock:
        begin_run(config, folder, None, lock)
    assert folder.resolve().parent == tmp_path / "outputs"


@pytest.mark.parametrize("name", NAMES)
def test_names_of_tasks_and_studies_are_no_paths(name: str, tmp_path: Path) -> None:
    study = pytest.importorskip("lora_hf.experiments.sweep.study", reason="the sweep extra is not installed")
    space = pytest.importorskip("lora_hf.experiments.sweep.space")
    before = inside(tmp_path)
    with pytest.raises(UserError, match="unknown task"):
        get_task(name)
    if "\0" not in name and name not in ("a\n", "a\\b"):  # which are names of folders here
        config, tried = space.read_sweep("rule_sentiment.yaml", ["lora.r=1..2"])
        config = replace(config, output=replace(config.output, dir=str(tmp_path / "outputs")))
        with pytest.raises(ConfigError, match="expected a name for a folder"):
            study.sweep(study.SweepSettings(config, tried, name, 1))
    assert inside(tmp_path) == before


@pytest.mark.parametrize("split", ["../x", "/x", "a/b"])
def test_the_name_of_a_split_is_no_path(split: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected the name of a split, without a path"):
        get_task("e2e_nlg").load(str(tmp_path), [split])


@pytest.mark.parametrize("name", ["..", "../x", "a.b", ""])
def test_an_adapter_name_with_dots_is_refused(name: str) -> None:
    with pytest.raises(AdapterError, match=r"adapter name .*: expected a word without dots"):
        inject(small_model("roberta", 2), load_config("rule_sentiment.yaml").lora, name)


def test_no_token_goes_into_a_config() -> None:
    with pytest.raises(ConfigError, match=r"train\.hf: hub_token: .*set HF_TOKEN") as error:
        RunConfig.from_dict({"train": {"hf": {"hub_token": "hf_aTokenOfNobody"}}})
    assert "aTokenOfNobody" not in str(error.value)


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_the_hostile_pickle_is_one(protocol: int, tmp_path: Path) -> None:
    """It runs code where somebody lets it; else the tests above would prove nothing."""
    pickle.loads(pickle.dumps(Malicious(tmp_path / "yes"), protocol))  # noqa: S301
    assert (tmp_path / "yes").exists()


def test_weights_larger_than_the_memory_are_refused(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **named: Any) -> Any:
        raise MemoryError

    for place in ("lora_hf.adapters.format.safe_open", "safetensors.torch.load_file"):
        with monkeypatch.context() as patched:
            patched.setattr(place, fail)
            with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: does not fit into the memory"):
                read_adapter(adapter)
