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
from lora_hf.core.errors import AdapterError, ConfigError
from lora_hf.training.validation import check_run

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


@pytest.mark.full
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
        (["train.start_from=nowhere", "train.method=full"], ConfigError, "train.method=full takes no LoRA weights"),
    ],
)
def test_settings_that_do_not_go_together(words: list[str], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        check_run(load_config("rule_sentiment.yaml", words))


def test_what_is_fine_passes() -> None:
    check_run(load_config("rule_sentiment.yaml", ["train.loraplus_lr_ratio=4"]))
