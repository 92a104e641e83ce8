from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from lora_hf.adapters import push as push_module
from lora_hf.adapters.format import read_adapter
from lora_hf.adapters.push import push_adapter
from lora_hf.adapters.save_load import save_adapter
from lora_hf.core.config.loader import load_config
from lora_hf.core.config.schema import LoraConfig, ModelConfig
from lora_hf.core.errors import AdapterError, HubError
from lora_hf.core.records import RECORD_FILE, RunRecord
from lora_hf.lora.inject import inject
from lora_hf.models.load import load_tokenizer
from lora_hf.models.model_ids import base_name
from tests.support.adapters_on_disk import TASK, run_folder
from tests.support.hub_server import TOKEN, USER, WEIGHTS, Hub, Repository
from tests.support.small_models import small_model

FILES = ["README.md", "adapter_config.json", WEIGHTS, "config.yaml"]
NAME = f"{USER}/a-lora"


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.close()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder(tmp_path_factory.mktemp("run"))


def test_a_dry_run_shows_the_files_and_the_card_and_touches_no_network(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_module, "hub_is_reachable", lambda: pytest.fail("a dry run asks nobody"))
    push = push_adapter(adapter, NAME, dry_run=True)
    assert sorted(push.files) == FILES
    assert push.files[WEIGHTS] == (adapter / WEIGHTS).stat().st_size
    assert push.files["README.md"] == len(push.card.encode())
    assert push.url == ""


def test_an_adapter_without_its_run_is_pushed_too(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "alone")
    push = push_adapter(tmp_path / "alone", NAME, dry_run=True)
    assert sorted(push.files) == FILES[:3]
    assert "**Not known:** no record of a run came with this adapter." in push.card


def test_the_record_of_another_run_is_not_taken_for_its_own(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter.parent, tmp_path / "run")
    record = RunRecord.load(tmp_path / "run" / RECORD_FILE)
    for other in (replace(record, task="sst2"), replace(record, model="roberta-base")):
        other.save(tmp_path / "run")
        assert "**Not known:**" in push_adapter(tmp_path / "run" / "adapter", NAME, dry_run=True).card


@pytest.mark.parametrize("base", ["tiny-roberta", "./my-base"])
@pytest.mark.parametrize("writer", ["lora_hf", "peft"])
def test_an_adapter_without_a_recorded_tokenizer_reads_back(
    writer: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = inject(small_model("roberta", 2), LoraConfig(r=2, targets=("q",)))
    model.name_or_path = base
    folder = save_adapter(model, tmp_path / "adapter", task=TASK.name)
    saved = read_adapter(folder)
    if writer == "peft":
        save_file(saved.tensors, folder / WEIGHTS)  # without the header
        saved = read_adapter(folder)
    uploaded = push_module._read(folder, None)[1]
    for name, content in uploaded.items():
        (tmp_path / name).write_bytes(content)
    pushed = read_adapter(tmp_path)
    assert pushed.metadata == replace(saved.metadata, base=base_name(base))
    assert pushed.tensors.keys() == saved.tensors.keys()
    assert all(torch.equal(tensor, saved.tensors[key]) for key, tensor in pushed.tensors.items())


@pytest.mark.parametrize("name", ["a-lora", "a/b/c", "a b/c", "/c", "a/", "a/--b", "", "a/b.git", "ä/b"])
def test_a_bad_repository_id_is_told_before_anything_else(name: str, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="expected USER/NAME"):
        push_adapter(tmp_path / "nowhere", name)


def test_a_missing_adapter_is_told_before_the_token(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="not an adapter folder"):
        push_adapter(tmp_path / "nowhere", NAME)


def test_push_makes_the_repository_with_one_commit(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    done = hub.ask(tmp_path, "push", "--adapter", adapter, "--repo-id", NAME, "--json")
    pushed = json.loads(done.stdout)
    assert pushed["url"] == f"{hub.endpoint}/{NAME}"
    repository = hub.repositories[NAME]
    assert len(repository.commits) == 2, "the one that the hub makes, and one push"
    assert not repository.private
    assert {path: len(content) for path, content in repository.files.items()} == pushed["files"]
    assert repository.files["README.md"].decode() == pushed["card"]
    assert repository.files[WEIGHTS] == (adapter / WEIGHTS).read_bytes()
    (tmp_path / "config.yaml").write_bytes(repository.files["config.yaml"])
    assert load_config(tmp_path / "config.yaml").model.name == "tiny-roberta"
    assert str(adapter.parents[1]) not in repository.files["config.yaml"].decode()


def test_a_second_push_leaves_nothing_of_the_first(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    hub.ask(tmp_path, "push", "--adapter", adapter, "--repo-id", NAME, "--private")
    assert hub.repositories[NAME].private
    shutil.copytree(adapter, tmp_path / "alone")
    hub.ask(tmp_path, "push", "--adapter", tmp_path / "alone", "--repo-id", NAME, "--private")
    repository = hub.repositories[NAME]
    assert len(repository.commits) == 3
    assert "config.yaml" not in repository.files, "the config of another run would be read with this adapter"


@pytest.mark.full
def test_nothing_of_this_machine_is_pushed(hub: Hub, tmp_path: Path) -> None:
    base = tmp_path / "the-users-name" / "my-base"
    small_model("roberta", 2).save_pretrained(base)
    load_tokenizer(ModelConfig(name="tiny-roberta")).save_pretrained(base)
    adapter = run_folder(tmp_path / "the-users-name" / "run", base=str(base))
    config = yaml.safe_load((adapter.parent / "config.yaml").read_text())
    config["train"]["start_from"] = str(adapter)
    config["train"]["hf"] = {"deepspeed": str(tmp_path / "zero.json")}
    (adapter.parent / "config.yaml").write_text(yaml.safe_dump(config))
    done = hub.ask(tmp_path / "home", "push", "--adapter", adapter, "--repo-id", NAME)
    files = hub.repositories[NAME].files
    assert sorted(files) == FILES
    for name, content in {**files, "what it said": (done.stdout + done.stderr).encode()}.items():
        for secret in (str(tmp_path), "the-users-name", TOKEN):
            assert secret.encode() not in content, name
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "my-base"
    assert "base_model" not in ModelCard(files["README.md"].decode()).data.to_dict(), "it is not on the hub"
    pushed = yaml.safe_load(files["config.yaml"])
    assert (pushed["model"]["name"], pushed["task"]["data_dir"]) == ("my-base", "data")
    assert (pushed["train"]["start_from"], pushed["train"]["hf"]["deepspeed"]) == ("adapter", "zero.json")


REFUSALS = {
    "no token": (NAME, None, "no token for the hub: log in with `hf auth login`, or set HF_TOKEN"),
    "bad token": (
        NAME,
        "hf_wrong",
        "the hub refused the token (401); log in again with `hf auth login`, or set HF_TOKEN",
    ),
    "name of somebody else": ("somebody-else/x", TOKEN, "this token may not write there (403); choose a repository"),
    "repository of somebody else": ("somebody-else/theirs", TOKEN, "this token may not write there (403)"),
    "public, to be private": (f"{USER}/public", TOKEN, "exists and is public"),
}


@pytest.mark.full
@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_is_one_message_and_nothing_is_pushed(refusal: str, hub: Hub, adapter: Path, tmp_path: Path) -> None:
    hub.repositories |= {"somebody-else/theirs": Repository(), f"{USER}/public": Repository()}
    name, token, message = REFUSALS[refusal]
    words = ["--private"] if "private" in refusal else []
    done = hub.ask(tmp_path, "push", "--adapter", adapter, "--repo-id", name, *words, code=2, token=token)
    assert message in done.stderr
    assert not done.stdout
    assert not any(repository.files for repository in hub.repositories.values())


@pytest.mark.full
def test_a_connection_that_breaks_leaves_no_half_push(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    hub.breaks = lambda request: 0 if "/commit/" in request else None
    done = hub.ask(tmp_path, "push", "--adapter", adapter, "--repo-id", NAME, code=2)
    assert ") broke (" in done.stderr
    assert not hub.repositories[NAME].files
    hub.breaks = lambda request: None
    hub.ask(tmp_path, "push", "--adapter", adapter, "--repo-id", NAME)
    assert sorted(hub.repositories[NAME].files) == FILES


def test_offline_is_told_at_once(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    done = hub.ask(tmp_path, "push", "--adapter", adapter, "--repo-id", NAME, code=2, offline=True)
    assert "out of reach or switched off (HF_HUB_OFFLINE, HF_DATASETS_OFFLINE); nothing was sent" in done.stderr
    assert not hub.requests
