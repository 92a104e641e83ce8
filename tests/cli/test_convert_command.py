"""`convert` on the bundled bases: both ways, and every error in one message with nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from torch import nn

from lora_hf.adapters.convert.loralib import load_loralib
from lora_hf.adapters.save_load import load_adapter, save_adapter
from lora_hf.cli.main import main
from lora_hf.core.config.schema import LoraConfig, ModelConfig, TaskConfig
from lora_hf.core.parsing import parse_yaml
from lora_hf.data.tasks.custom import custom_task
from lora_hf.data.tasks.registry import get_task
from lora_hf.lora.inject import inject
from lora_hf.models.load import load_base
from tests.support.command_lines import ask
from tests.support.small_models import randomize_lora_b, token_ids
from tests.tolerances import PRETRAINED_LOGITS_RTOL
from tools.benchmark.peers import with_loralib

TASKS = {"tiny-roberta": "sst2", "tiny-gpt2": "e2e_nlg"}


def trained_loralib(name: str) -> nn.Module:
    """A bundled base with loralib's layers on q and v, and random values in them and in the head."""
    base = load_base(ModelConfig(name=name, precision="fp32", dropout=0), get_task(TASKS[name]))
    model = with_loralib(base, LoraConfig(r=4, lora_alpha=32, targets=("q", "v"))).train()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints as the paper's code writes them: NLU's with the head, NLG's nested and from DataParallel."""
    folder = tmp_path_factory.mktemp("checkpoints")
    roberta, gpt2 = (trained_loralib(name) for name in TASKS)
    head = {f"classifier.{key}": value for key, value in roberta.classifier.state_dict().items()}
    torch.save(loralib.lora_state_dict(roberta) | head, folder / "roberta_lora_sst2.bin")
    tensors = {f"module.{key}": value for key, value in loralib.lora_state_dict(gpt2).items()}
    torch.save({"model_state_dict": tensors}, folder / "gpt2_lora_e2e.pt")
    return {"tiny-roberta": folder / "roberta_lora_sst2.bin", "tiny-gpt2": folder / "gpt2_lora_e2e.pt"}


@pytest.mark.parametrize(
    ("name", "more", "task", "layer"),
    [
        ("tiny-roberta", [], "sst2", "lora.Linear({h}, {h}, r=4, lora_alpha=32)"),
        ("tiny-roberta", [], None, "lora.Linear({h}, {h}, r=4, lora_alpha=32)"),
        (
            "tiny-gpt2",
            ["--enable-lora", "true,false,true"],
            None,
            "lora.MergedLinear({h}, {h3}, r=4, lora_alpha=32, enable_lora=[True, False, True], fan_in_fan_out=True)",
        ),
    ],
)
def test_from_loralib_and_back(
    name: str,
    more: list[str],
    task: str | None,
    layer: str,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["convert", "--from", "loralib", str(checkpoints[name]), "--model", name, "--lora-alpha", "32", *more]
    words += ["--task", task] if task else []
    assert main([*words, "--output", str(tmp_path / "adapter"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    base = load_base(ModelConfig(name=name, precision="fp32"), get_task(TASKS[name])).eval()
    layer = layer.format(h=base.config.hidden_size, h3=3 * base.config.hidden_size)
    assert set(result["layers"].values()) == {layer}
    assert result["output"] == str(tmp_path / "adapter")
    ours = load_adapter(base, tmp_path / "adapter")
    found, expected = ours(token_ids()).logits, trained_loralib(name)(token_ids()).logits
    assert (found - expected).abs().max() <= PRETRAINED_LOGITS_RTOL * expected.abs().max()

    back = ["convert", "--to", "loralib", "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "b.bin")]
    assert main(back) == 0
    assert layer in capsys.readouterr().out
    expected = torch.load(checkpoints[name], weights_only=True)
    expected = {key.removeprefix("module."): value for key, value in expected.get("model_state_dict", expected).items()}
    found = torch.load(tmp_path / "b.bin", weights_only=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_predict_reads_a_converted_adapter(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--from", "loralib", str(checkpoints["tiny-roberta"]), "--model", "tiny-roberta", "--task", "sst2"]
    assert main([*words, "--lora-alpha", "32", "--output", str(tmp_path / "adapter")], verb="convert") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"adapter: {tmp_path / 'adapter'}"
    assert main(["predict", "--adapter", str(tmp_path / "adapter"), "--text", "A funny film."]) == 0
    assert json.loads(capsys.readouterr().out)["label"] in ("negative", "positive")


def test_partial_uses_the_base_head_and_reports_it(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = {k: v for k, v in torch.load(checkpoints["tiny-roberta"], weights_only=True).items() if "lora_" in k}
    torch.save(lora, tmp_path / "lora.bin")
    words = ["--from", "loralib", str(tmp_path / "lora.bin"), "--model", "tiny-roberta", "--task", "sst2", "--partial"]
    assert main([*words, "--lora-alpha", "32", "--output", str(tmp_path / "adapter")], verb="convert") == 0
    assert "the file has no head" in capsys.readouterr().err


GOOD = ["--from", "loralib", "{roberta}", "--model", "tiny-roberta", "--lora-alpha", "16"]
ERRORS: dict[str, tuple[list[str], str]] = {
    "no alpha": (GOOD[:-2], "--lora-alpha: required, because a loralib file does not record it"),
    "an alpha of zero": ([*GOOD[:-1], "0"], "--lora-alpha: expected a number > 0, found 0"),
    "an alpha that is not a number": ([*GOOD[:-1], "nan"], "--lora-alpha: expected a number > 0, found nan"),
    "no model": (GOOD[:3], "expected a FILE and --model NAME"),
    "an unknown model": (
        [word.replace("tiny-roberta", "tiny-robert") for word in GOOD],
        "did you mean 'tiny-roberta'?",
    ),
    "another model": ([word.replace("tiny-roberta", "tiny-gpt2") for word in GOOD], "found no such module"),
    "another task": ([*GOOD, "--task", "mnli"], "classifier.out_proj.weight: expected (3, "),
    "a generation task": (
        [*GOOD, "--task", "e2e_nlg"],
        "roberta is an encoder, which a task of kind generation or chat cannot use",
    ),
    "an adapter to read": ([*GOOD, "--adapter", "x"], "--adapter cannot be used with --from loralib"),
    "enable_lora of nonsense": ([*GOOD, "--enable-lora", "q,v"], "true,false,true, found 'q,v'"),
    "no enable_lora": (
        ["--from", "loralib", "{gpt2}", "--model", "tiny-gpt2", "--lora-alpha", "32"],
        "2 of 3 slices",
    ),
    "text": (
        ["--from", "loralib", "{text}", *GOOD[3:]],
        "torch.save",
    ),
    "code": (["--from", "loralib", "{code}", *GOOD[3:]], "print"),
    "no head": (["--from", "loralib", "{headless}", *GOOD[3:]], "expected --task NAME"),
    "no head for the task": (
        ["--from", "loralib", "{headless}", *GOOD[3:], "--task", "sst2"],
        "missing: classifier.dense.weight (",
    ),
    "no adapter": (["--to", "loralib"], "--to loralib: expected --adapter DIR"),
    "an alpha to write": (
        ["--to", "loralib", "--adapter", "x", "--lora-alpha", "2"],
        "--lora-alpha cannot be used with --to",
    ),
    "no such adapter": (["--to", "loralib", "--adapter", "nowhere"], "nowhere: "),
}


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("it ran",)


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_is_one_message_and_nothing_is_written(
    error: str, checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name.removeprefix("tiny-"): file for name, file in checkpoints.items()}
    files |= {name: tmp_path / f"{name}.bin" for name in ("text", "code", "headless")}
    files["text"].write_text("no checkpoint\n")
    torch.save({"a.lora_A": Code()}, files["code"])
    lora = {key: value for key, value in torch.load(files["roberta"], weights_only=True).items() if "lora_" in key}
    torch.save(lora, files["headless"])
    words, message = ERRORS[error]
    words = ["convert", *(word.format(**files) for word in words), "--output", str(tmp_path / "out")]
    assert main(words) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("error:") == 1
    assert not output.out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["code.bin", "headless.bin", "text.bin"]


def test_an_unusable_output_is_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = [str(word).format(roberta=checkpoints["tiny-roberta"]) for word in GOOD]
    assert "expected a folder, found a file" in ask("convert", *words, "--output", tmp_path / "file", code=2).stderr
    words = ["--to", "loralib", "--adapter", tmp_path, "--output", tmp_path]
    assert "expected a file in an existing folder" in ask("convert", *words, code=2).stderr


@pytest.mark.parametrize(
    ("kind", "labels"),
    [("classification", "[poor, fair, good]"), ("multi_label", "[poor, fair, good]"), ("generation", None),
     ("tokens", "[PER, LOC]"), ("question_answering", None)],
)  # fmt: skip
def test_an_adapter_of_a_task_of_ones_own_becomes_a_checkpoint(kind: str, labels: str | None, tmp_path: Path) -> None:
    """Also where the config that describes the task is gone."""
    described = TaskConfig("own", kind=kind, label_names=parse_yaml(labels) if labels else None)  # type: ignore[arg-type]
    task, name = custom_task(described), "tiny-gpt2" if kind == "generation" else "tiny-roberta"
    config = ModelConfig(name=name, precision="fp32")
    model = inject(load_base(config, task), LoraConfig(r=2, targets=("q", "v")))
    randomize_lora_b(model)
    save_adapter(model, tmp_path / "adapter", task="own")
    ask("convert", "--to", "loralib", "--adapter", tmp_path / "adapter", "--output", tmp_path / "own.bin")
    ours = {key: value for key, value in model.eval()(token_ids()).items() if isinstance(value, torch.Tensor)}
    assert ours, "all but the cache of a decoder"
    back = load_base(config, task)
    load_loralib(back, tmp_path / "own.bin", 8, [True, False, True] if kind == "generation" else None)
    theirs = back.eval()(token_ids())
    assert all(
        torch.allclose(value, theirs[key], rtol=PRETRAINED_LOGITS_RTOL, atol=1e-5) for key, value in ours.items()
    )
