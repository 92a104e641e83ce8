from __future__ import annotations

import copy
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from lora_hf.adapters.push import _read, push_adapter
from lora_hf.adapters.resolve import fetch_adapter, find_saved_model
from lora_hf.adapters.save_load import load_adapter, save_adapter
from lora_hf.core.config.schema import LoraConfig, ModelConfig
from lora_hf.core.errors import AdapterError, HubError
from lora_hf.data.tasks.registry import get_task
from lora_hf.lora.inject import inject
from lora_hf.models.load import BUNDLED_FOLDER, load_base
from tests.support.adapters_on_disk import run_folder
from tests.support.command_lines import ask
from tests.support.hub_server import USER, WEIGHTS, Hub, Repository
from tests.support.small_models import small_model
from tests.tolerances import FILE_ROUNDTRIP

NAME = f"{USER}/a-lora"
TEXT = ["--text", "A moving, funny and wise film.", "--json"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def pushed(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    server = Hub()
    server.ask(tmp_path_factory.mktemp("pusher"), "push", "--adapter", adapter, "--repo-id", NAME)
    server.close()
    return server.repositories[NAME]


@pytest.fixture
def hub(pushed: Repository) -> Iterator[Hub]:
    """A hub that holds the adapter."""
    server = Hub()
    server.repositories[NAME] = copy.deepcopy(pushed)
    yield server
    server.close()


def snapshots(home: Path) -> list[str]:
    """The files that whoever pulled may read."""
    return sorted(file.name for file in home.glob("hub/*/snapshots/*/*"))


def weights_request(hub: Hub) -> str:
    """How the weights are asked for."""
    return f"GET /{NAME}/resolve/{hub.repositories[NAME].commits[-1][0]}/{WEIGHTS}"


def pulled(hub: Hub, home: Path, offline: bool = False) -> Path:
    """Where another process put the adapter."""
    code = "import sys; from lora_hf.adapters.resolve import fetch_adapter; print(fetch_adapter(sys.argv[1]))"
    return Path(hub.ask(home, "-c", code, NAME, offline=offline).stdout.strip())


@pytest.mark.full
def test_logits_are_those_of_the_local_adapter_and_the_cards_code_works(
    hub: Hub, adapter: Path, tmp_path: Path
) -> None:
    hub.repositories[NAME].commit({"adapter_model.bin": b"a pickle", "training_args.bin": b"another"})
    card = hub.repositories[NAME].files["README.md"].decode()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 3
    code = f"""
import json, sys, torch
from lora_hf.models.load import BUNDLED_FOLDER
from transformers import AutoModelForSequenceClassification
from lora_hf import load_adapter
ids = torch.tensor([[0, 5, 6, 7, 2]])
base = BUNDLED_FOLDER / "tiny-roberta"
plain = AutoModelForSequenceClassification.from_pretrained(base, dtype="float32", num_labels=2)
expected = load_adapter(plain, {str(adapter)!r}).eval()(ids).logits
differences = []
for block in {blocks!r}:
    names = {{}}
    exec(block, names)
    differences.append((names["model"](ids).logits - expected).abs().max().item())
print(json.dumps([expected.abs().max().item(), *differences]))
"""
    size, *differences = json.loads(hub.ask(tmp_path, "-c", code).stdout.splitlines()[-1])
    assert size > 0.05
    assert differences[0] == 0
    assert max(differences) < FILE_ROUNDTRIP
    # peft and transformers look for more files than we do; none of them is a pickle.
    assert "config.yaml" in snapshots(tmp_path)
    assert not [name for name in snapshots(tmp_path) if name.endswith(".bin")]


@pytest.mark.full
def test_a_verb_takes_a_hub_id_a_revision_and_works_offline_afterwards(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    first = hub.repositories[NAME].commits[1][0]
    other = run_folder(tmp_path / "other", seed=8)
    hub.ask(tmp_path / "pusher", "push", "--adapter", other, "--repo-id", NAME)

    by_id = hub.ask(tmp_path / "home", "predict", "--adapter", NAME, "--revision", first, *TEXT)
    assert by_id.stdout == ask("predict", "--adapter", adapter, *TEXT).stdout
    folder = pulled(hub, tmp_path / "home")
    assert (folder / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes() != (adapter / WEIGHTS).read_bytes()
    hub.requests.clear()
    assert pulled(hub, tmp_path / "home", offline=True) == folder
    assert not hub.requests
    assert snapshots(tmp_path / "home") == sorted(2 * ["adapter_config.json", WEIGHTS, "config.yaml"])


MISTAKES = {
    "no such repository": (
        f"{USER}/nothing",
        [],
        {},
        "no such folder here; as a hub id: no such repository on the hub",
    ),
    "no such revision": (NAME, ["--revision", "v9"], {}, "the hub's repository has no branch, tag or commit 'v9'"),
    "bad token": (
        NAME,
        [],
        {"token": "hf_wrong"},
        "the hub refused the token (401); log in again with `hf auth login`",
    ),
    "private": (
        f"{USER}/private",
        [],
        {"token": None},
        "or no access to it. Check the name; for a private or gated repository log in",
    ),
    "no adapter": (f"{USER}/pickled", [], {}, f"has no adapter_config.json and no {WEIGHTS}; expected a LoRA adapter"),
    "offline": (
        NAME,
        [],
        {"offline": True},
        ") is out of reach or switched off (HF_HUB_OFFLINE, HF_DATASETS_OFFLINE), and the local",
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_pulled_is_one_quick_message(mistake: str, hub: Hub, tmp_path: Path) -> None:
    hub.repositories |= {f"{USER}/private": Repository(private=True), f"{USER}/pickled": Repository()}
    hub.repositories[f"{USER}/pickled"].commit({"adapter_model.bin": b"a pickle"})
    name, words, more, message = MISTAKES[mistake]
    done = hub.ask(tmp_path / "home", "predict", "--adapter", name, *TEXT, *words, code=2, **more)
    assert message in done.stderr
    assert not done.stdout
    assert not [request for request, count in Counter(hub.requests).items() if count > 2], "it asks again and again"
    assert not snapshots(tmp_path / "home")


@pytest.mark.full
def test_a_download_that_breaks_once_becomes_whole(hub: Hub, tmp_path: Path) -> None:
    left = [50_000]
    hub.breaks = lambda request: left.pop() if request == weights_request(hub) and left else None
    # Newer clients go on by themselves where they were; older ones tell, and go on when they are run again.
    code = """
import sys
from lora_hf.core.errors import HubError
from lora_hf.adapters.resolve import fetch_adapter
try:
    print(fetch_adapter(sys.argv[1]))
except HubError:
    print(fetch_adapter(sys.argv[1]))
"""
    folder = Path(hub.ask(tmp_path / "home", "-c", code, NAME).stdout.strip())
    assert not left, "it was broken"
    assert (folder / WEIGHTS).read_bytes() == hub.repositories[NAME].files[WEIGHTS]


@pytest.mark.full
def test_a_download_that_breaks_off_leaves_nothing_that_is_used(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    cuts = iter([50_000] + [0] * 99)
    hub.breaks = lambda request: next(cuts) if request == weights_request(hub) else None
    words = ("predict", "--adapter", NAME, *TEXT)
    done = hub.ask(tmp_path / "home", *words, code=2)
    assert "broke" in done.stderr
    assert "try again" in done.stderr
    assert WEIGHTS not in snapshots(tmp_path / "home")
    assert "out of reach" in hub.ask(tmp_path / "home", *words, code=2, offline=True).stderr
    hub.breaks = lambda request: None
    assert (pulled(hub, tmp_path / "home") / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()


def test_a_folder_is_taken_as_it_is(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch_adapter(adapter) == adapter
    monkeypatch.chdir(adapter.parents[1])
    relative = f"{adapter.parent.name}/adapter"  # it looks like a hub id, and is there
    assert fetch_adapter(relative) == Path(relative)
    assert find_saved_model(relative).model.name == "tiny-roberta"
    with pytest.raises(AdapterError, match="a local path has no revision 'main'"):
        find_saved_model(relative, "main")


def test_out_of_reach_load_adapter_leaves_the_model_alone() -> None:
    model = small_model("roberta", 2)
    before = dict(model.named_modules()).keys()
    with pytest.raises(HubError, match=r"a-lora: no such folder here; as a hub id: the hub \(.*\) is out of reach"):
        load_adapter(model, NAME)
    assert dict(model.named_modules()).keys() == before


@pytest.mark.full
def test_what_was_pulled_can_be_pushed_again(hub: Hub, tmp_path: Path) -> None:
    push = push_adapter(pulled(hub, tmp_path / "home"), NAME, dry_run=True)
    assert "config.yaml" in push.files
    assert "## Recipe" in push.card
    assert "**Not known:**" in push.card, "the record did not come with it"


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """An adapter whose base is no longer where it was trained, but in `new`."""
    shutil.copytree(BUNDLED_FOLDER / "tiny-roberta", tmp_path / "old")
    adapter = run_folder(tmp_path / "run", base=str(tmp_path / "old"))
    (tmp_path / "old").rename(tmp_path / "new")
    return adapter


def edit_base(file: Path) -> None:
    file.write_text(file.read_text().replace("/old", "/new"))


@pytest.mark.parametrize("edited", [["adapter_config.json"], ["adapter_config.json", "../config.yaml"], []])
def test_the_base_is_where_the_user_says(moved: Path, edited: list[str], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"old: no such folder.*model=NAME_OR_FOLDER.*adapter_config\.json"):
        find_saved_model(moved)
    for name in edited:
        edit_base(moved / name)
    saved = find_saved_model(moved, model=None if edited else str(tmp_path / "new"))
    assert saved.model.name == str(tmp_path / "new")
    assert (saved.model.precision, saved.max_length) == ("fp32", 64), "those of its run"


def test_every_verb_takes_the_new_place_of_the_base(moved: Path, tmp_path: Path) -> None:
    new, out = tmp_path / "new", tmp_path / "out"
    assert "--model NAME_OR_FOLDER" in ask("predict", "--adapter", moved, *TEXT, code=2).stderr
    assert ask("predict", "--adapter", moved, "--model", new, *TEXT).stdout
    assert ask("eval", "--adapter", moved, "--model", new, "--json").stdout
    ask("merge", "--adapter", moved, "--model", new, "--output", out / "merged")
    ask("combine", "--adapter", f"{moved}=1", "--model", new, "--output", out / "combined")
    assert find_saved_model(out / "combined").model.name == str(new)
    ask("convert", "--to", "loralib", "--adapter", moved, "--model", new, "--output", tmp_path / "a.bin")
    pushed = ask("push", "--adapter", moved, "--model", "FacebookAI/x", "--repo-id", NAME, "--dry-run").stdout
    assert "FacebookAI/x" in pushed
    assert "/old" not in pushed
    assert "leave it out" in ask("predict", "--adapter", out / "merged", "--model", new, *TEXT, code=2).stderr


def test_a_pushed_adapter_names_the_edited_base_everywhere(moved: Path) -> None:
    edit_base(moved / "adapter_config.json")
    facts, contents = _read(moved, "FacebookAI/x")
    assert facts.base == "FacebookAI/x"
    assert facts.run is not None
    assert facts.run.model.name == "FacebookAI/x"
    assert facts.record is not None
    assert all(b"/old" not in content and b"/new" not in content for content in contents.values())


def test_a_missing_output_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("outputs/typo", "mine/typo"):
        (tmp_path / "mine").mkdir(exist_ok=True)
        with pytest.raises(AdapterError, match=f"{name}: not an adapter folder.*no such folder"):
            fetch_adapter(name) and find_saved_model(name)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "pytorch_model.bin"])
def test_pickled_weights_alone_are_refused_with_a_way(name: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"a pickle")
    with pytest.raises(AdapterError, match=rf"{name} are not read.*safetensors: peft\."):
        find_saved_model(tmp_path)


def test_weights_in_parts_are_refused_with_a_way(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    for name in (*(f"adapter_model-0000{part}-of-00002.safetensors" for part in (1, 2)), f"{WEIGHTS}.index.json"):
        (tmp_path / name).touch()
    with pytest.raises(AdapterError, match=rf"in parts, which are not read.*save them as one {WEIGHTS}"):
        find_saved_model(tmp_path)


def test_a_task_of_another_kind_is_refused(tmp_path: Path) -> None:
    """The run's config is edited to a kind that reads the same head in another way."""
    model = load_base(ModelConfig(name="tiny-roberta", precision="fp32"), get_task("rule-sentiment"))
    folder = save_adapter(inject(model, LoraConfig(r=2, targets=("q",))), tmp_path / "adapter", task="mine")
    task = {"name": "mine", "kind": "multi_label", "label_names": ["negative", "positive"]}
    for kind, said in (("multi_label", "is multi_label_classification.*task.kind"), ("classification", "")):
        config = {"model": {"name": "tiny-roberta"}, "task": {**task, "kind": kind}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        if said:
            with pytest.raises(AdapterError, match=f"trained for single_label_classification; task mine {said}"):
                find_saved_model(folder)
        else:
            assert find_saved_model(folder).task.label_names == ("negative", "positive")


def test_files_as_an_editor_leaves_them(adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A byte-order mark is none of JSON's business; of two configs in a run, one counts."""
    shutil.copytree(adapter.parent, tmp_path / "run")
    run, folder = tmp_path / "run", tmp_path / "run" / "adapter"
    for file in (run / "config.yaml", folder / "adapter_config.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert find_saved_model(folder).max_length == 64
    assert "counts" not in caplog.text
    (folder / "config.yaml").write_text((run / "config.yaml").read_text("utf-8-sig").replace("64", "32"))
    assert find_saved_model(folder).max_length == 64
    assert f"{folder}/config.yaml differs from {run}/config.yaml, which takes precedence" in caplog.text
    with pytest.raises(AdapterError, match=rf"a file \(did you mean '{folder}'\?\)"):
        find_saved_model(folder / "adapter_model.safetensors")
