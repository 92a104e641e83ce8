"""Mistakes that a config or a folder alone tells end a command before torch is loaded, and nothing is written."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lora_hf.core.config.loader import load_config
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import AdapterError, ConfigError
from lora_hf.training.validation import check_run, check_together

REPO = Path(__file__).parents[2]
TRAIN = ["train", "--config", "rule_sentiment.yaml", "output.dir=."]
SWEEP = ["sweep", "--config", "rule_sentiment.yaml", "--output", ".", "train.lr=1e-4..1e-2"]
MISTAKES = [
    ([*TRAIN, "output.name=finished"], "holds a finished run"),
    ([*TRAIN, "output.name=unfinished"], "continue it with --resume auto"),
    (
        [*TRAIN, "output.name=unfinished", "train.epochs=2"],
        "of another config: train.epochs is 5.0 there and 2.0 here;",
    ),
    (
        [*TRAIN, "output.name=unfinished", "train.epochs=2", "--resume", "auto"],
        "of another config: train.epochs is 5.0 there and 2.0 here; choose another output.name, or set",
    ),
    ([*TRAIN, "output.name=unread"], "without a readable config.yaml"),
    ([*TRAIN, "--resume", "nowhere"], "--resume nowhere: expected a checkpoint folder"),
    ([*TRAIN, "train.start_from=nowhere"], "nowhere: not an adapter folder"),
    ([*TRAIN, "--config", "rule_sentiment.yaml", "output.name=both"], "output.name: expected a different one for each"),
    ([*SWEEP, "--trials", "0"], "trials: expected a whole number >= 1, found 0"),
    ([*SWEEP, "--trials", "1", "--study", "a/b"], "study 'a/b': expected a name for a folder"),
    ([*SWEEP, "--trials", "1", "--storage", "here"], "storage: expected a URL"),
    ([*TRAIN, "model.name=tiny-bert"], "tiny-bert: no such model or folder (did you mean 'tiny-roberta'?)"),
    ([*TRAIN, "model.name=./nowhere"], "./nowhere: no such folder"),
    (["serve", "--adapter", "a=nowhere"], "nowhere: not an adapter folder"),
    (["serve", "--adapter", "a=someone/x", "--port", "PORT"], "--port 0 for a free one"),
]
# All in one process, which has read torch's libraries in none of them.
ALL = """
import json, sys
from lora_hf.cli.main import main
codes = []
for words in json.load(sys.stdin):
    codes.append(main(words))
    print("--", file=sys.stderr)
print(json.dumps({"codes": codes, "loaded": sorted({"torch", "transformers"} & set(sys.modules))}))
"""


def test_no_mistake_waits_for_torch(tmp_path: Path) -> None:
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "record.json").write_text("{}")
    for name in ("unfinished", "unread"):
        (tmp_path / name / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    config = load_config("rule_sentiment.yaml", ["output.dir=.", "output.name=unfinished", "model.precision=bf16"])
    (tmp_path / "unfinished" / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "configs").symlink_to(REPO / "configs")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        asked = json.dumps([[word.replace("PORT", port) for word in words] for words, _ in MISTAKES])
        done = subprocess.run([sys.executable, "-c", ALL], input=asked, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"codes": [2] * len(MISTAKES), "loaded": []}
    told = done.stderr.split("--\n")
    for (_, said), message in zip(MISTAKES, told, strict=False):
        assert said in message
    (tmp_path / "configs").unlink()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        (["train.group_by_prompt=true"], ConfigError, "rule-sentiment has no prompts"),
        (["train.loraplus_lr_ratio=4", "train.method=head"], ConfigError, "train.method=head trains no lora_B"),
        (["train.start_from=nowhere"], AdapterError, "not an adapter folder"),
    ],
)
def test_settings_that_do_not_go_together(words: list[str], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        check_run(load_config("rule_sentiment.yaml", words))


def test_what_is_fine_passes() -> None:
    check_run(load_config("rule_sentiment.yaml", ["train.loraplus_lr_ratio=4"]))
    check_together([named("a"), named("b", "train.hf={optim: sgd, eval_steps: 5}", "train.seed=1", "lora.r=2")])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train.method=head", "run 2: train.method=head"),
        ("lora.init_lora_weights=pissa", "run 2: lora.init_lora_weights=pissa"),
        ("lora.bias=all", "run 2: lora.bias=all"),
        ("train.label_smoothing=0.1", "run 2: train.label_smoothing: expected 0"),
        ("train.hf={neftune_noise_alpha: 5}", "run 2: train.hf: joint training does not support neftune_noise_alpha"),
        ("model.precision=bf16", "the same model section"),
        ("task.name=rule-restaurants", "tasks of one kind"),
        ("task.data_dir=elsewhere", "the same task section"),
        ("output.name=a", "output.name: expected a different one"),
    ],
)
def test_runs_that_cannot_train_together(word: str, said: str) -> None:
    with pytest.raises(ConfigError, match="cannot train together") as refusal:
        check_together([named("a"), named("b", word)])
    assert said in str(refusal.value)


def test_one_run_random_bases_and_resuming_cannot_train_together() -> None:
    with pytest.raises(ConfigError, match="at least 2 runs, found 1"):
        check_together([named("a")])
    with pytest.raises(ConfigError, match="another base for each"):
        check_together([named(name, "model.init=random", f"train.seed={seed}") for seed, name in enumerate("ab")])
    with pytest.raises(ConfigError, match="resume=auto: runs that train together save no checkpoints"):
        check_together([named("a"), named("b")], "auto")


def named(name: str, *words: str) -> RunConfig:
    return load_config("rule_sentiment.yaml", [f"output.name={name}", *words])
