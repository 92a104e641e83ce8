from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import NewGELUActivation

from lora_hf.core.config.schema import LoraConfig, ModelConfig, RunConfig
from lora_hf.data.tasks.registry import get_task
from lora_hf.lora.inject import inject
from lora_hf.models.load import load_base
from tests.support.small_models import small_model, token_ids
from tests.tolerances import PARITY_FP32
from tools.benchmark import flops
from tools.benchmark.flops import FrozenProducts, Weights, matrix_weights, step_flops
from tools.benchmark.job import PEAK, PRODUCTS, Job
from tools.benchmark.peers import PEER_SIDES, with_loralib
from tools.benchmark.rows import spread_batches
from tools.benchmark.train_sides import SIDES, Setup
from tools.benchmark.worker import run
from tools.benchmark.worker_process import Channel

BATCH, STEPS = 2, 2


def make_job(side: str, model: str = "tiny-roberta", task: str = "rule-sentiment", fastest: str = "bf16") -> Job:
    """Four rows of different lengths, two rounds of two steps."""
    sections: dict[str, Any] = {
        "model": {"name": model, "precision": "bf16", "dropout": 0.0},
        "task": {"name": task},
        "lora": {"r": 4, "targets": "all"},
        "train": {"batch_size": BATCH},
    }
    rows = []
    for length in (3, 9, 4, 6):
        ids = list(range(5, 5 + length))
        labels = [-100, *ids[1:]] if model == "tiny-gpt2" else length % 2
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    return Job(side, RunConfig.from_dict(sections).to_dict(), rows, rounds=2, fastest=fastest)


def messages(job: Job) -> list[dict[str, Any]]:
    """The messages of a worker that runs this job, two rounds long, in this process."""
    out = io.StringIO()
    run(Channel(io.StringIO(job.to_line() + "\ngo\ngo\n"), out))
    return [json.loads(line) for line in out.getvalue().splitlines()]


@pytest.mark.full
@pytest.mark.parametrize(
    ("model", "task", "side"),
    [
        *(("tiny-roberta", "rule-sentiment", side) for side in (*SIDES, *PEER_SIDES)),
        *(("tiny-gpt2", "rule-restaurants", side) for side in (*SIDES, *PEER_SIDES) if side != "head"),
    ],
)
def test_every_side_follows_the_protocol(model: str, task: str, side: str) -> None:
    ready, first, second, done = messages(make_job(side, model, task))
    trained, setting = ready["ready"]["trained_parameters"], ready["ready"]["setting"]
    assert first["round"]["seconds"] > 0
    assert second["round"]["seconds"] > 0
    memory = done["done"]["memory"]
    # AdamW keeps two numbers for each parameter, in its precision, and a step count for each tensor.
    assert memory["gradients"] == memory["trained_weights"]
    assert memory["optimizer"] >= 2 * memory["trained_weights"]
    assert (memory["trained_weights"] > 0.99 * memory["weights"]) == (side == "full")
    assert memory["peak"] >= memory["above_base"] >= memory["activations"] >= 0
    assert (trained == 0) == (side == "frozen" and model == "tiny-gpt2")
    if side in ("lora", "without-dropout", "frozen", "head", "peft-best"):
        assert setting["weights"] == "bfloat16"
    else:
        assert setting["weights"] == "float32"
    assert (setting["autocast"] is not None) == (side in ("full", "peft-best"))
    assert (setting["rows"] == "group_by_length") == (side in ("full", "peft-best"))


@pytest.mark.parametrize("side", ["full", "peft-best"])
def test_a_peer_runs_in_the_precision_that_is_fastest(side: str) -> None:
    setting = messages(make_job(side, fastest="fp32"))[0]["ready"]["setting"]
    assert (setting["weights"], setting["autocast"]) == ("float32", None)


def test_peers_get_the_model_that_transformers_builds(tmp_path: Path) -> None:
    plain = Setup.from_job(make_job("full", "tiny-gpt2", "rule-restaurants"), tmp_path).plain_base("fp32")
    assert isinstance(plain.get_submodule("transformer.h.0.mlp.act"), NewGELUActivation)
    ours = load_base(ModelConfig("tiny-gpt2", precision="fp32", dropout=0.0), get_task("rule-restaurants")).eval()
    assert torch.allclose(plain.eval()(token_ids()).logits, ours(token_ids()).logits, atol=PARITY_FP32)


@pytest.mark.parametrize(("model", "task"), [("tiny-roberta", "rule-sentiment"), ("tiny-gpt2", "rule-restaurants")])
def test_the_products_of_a_step_are_as_many_as_its_flops_say(model: str, task: str, tmp_path: Path) -> None:
    job = make_job(PRODUCTS, model, task)
    ready, first, second, done = messages(job)
    assert min(each["round"]["seconds"] for each in (first, second)) > 0
    assert done == {"done": {"memory": {"above_base": None}}}
    products = FrozenProducts(Setup.from_job(job, tmp_path).base(), job.rows, batch_size=3)
    assert len(products.counts) == -(-len(job.rows) // 3)
    with FlopCounterMode(display=False) as counter:
        products()
    assert counter.get_total_flops() == ready["ready"]["flops"]


@pytest.mark.full
def test_the_peak_side_measures_each_shape_in_each_round() -> None:
    ready, first, second, done = messages(make_job(PEAK))
    assert (ready, done) == ({"ready": {}}, {"done": {}})
    for measured in (first, second):
        rates = measured["round"]["rates"]
        for shape in ("768->768", "768->3072"):
            assert {f"1024x{shape} fp32", f"1024x{shape} bf16"} <= rates.keys()
            assert {f"4096x{shape} fp32", f"4096x{shape} bf16"} & rates.keys(), "at least the faster one"
        assert all(1e8 < rate < 1e16 for rate in rates.values())


def test_a_precision_that_is_hopeless_with_few_rows_is_not_measured_with_more(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {torch.float32: 1.0, torch.bfloat16: 3.0}
    monkeypatch.setattr(flops, "_fastest", lambda x, weight, limit: seconds[x.dtype])
    rates = flops.matmul_peak(torch.device("cpu"), 0.0, counts=(2, 4))
    wide = 2 * 768 * 3072
    assert rates["2x768->3072 fp32"] == 2 * wide
    assert rates["2x768->3072 bf16"] == 2 * wide / 3
    assert rates["4x768->3072 fp32"] == 4 * wide
    assert not [shape for shape in rates if shape.startswith("4x") and "bf16" in shape]
    seconds[torch.bfloat16] = 1.5
    assert "4x768->3072 bf16" in flops.matmul_peak(torch.device("cpu"), 0.0, counts=(2, 4))


def test_an_invalid_config_is_reported_through_the_pipe() -> None:
    job = make_job("lora")
    job.config["lora"]["r"] = 4096
    assert "lora.r" in messages(job)[0]["error"]


def test_a_worker_exits_when_its_parent_has_gone() -> None:
    with pytest.raises(SystemExit):
        run(Channel(io.StringIO(make_job("lora").to_line() + "\n"), io.StringIO()))


@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_loralib_adapts_the_same_modules(kind: str) -> None:
    labels = 2 if kind == "roberta" else None
    lora = LoraConfig(r=4, lora_alpha=8, targets=("all",))
    model, plain, own = (small_model(kind, labels) for _ in range(3))
    with_loralib(model, lora).eval()
    inject(own, lora)
    trained = [sum(p.numel() for p in each.parameters() if p.requires_grad) for each in (model, own)]
    assert trained[0] == trained[1]
    assert torch.allclose(model(token_ids()).logits, plain(token_ids()).logits, atol=PARITY_FP32)


def test_flops_equal_those_computed_by_hand() -> None:
    # Two layers of roberta at hidden 32, inner 48: q, k, v, o, up and down; the head reads one token per row.
    roberta = matrix_weights(small_model("roberta", num_labels=3))
    assert roberta == Weights(token=2 * (4 * 32 * 32 + 2 * 32 * 48), row=32 * 32 + 3 * 32, label=0)
    gpt2 = matrix_weights(small_model("gpt2"))
    assert gpt2 == Weights(token=2 * (4 * 32 * 32 + 2 * 32 * 48), row=0, label=32 * 100)
    # 3 + 2 real tokens, and labels on 2 + 1 tokens. Nothing predicts the first token of a row.
    rows = [
        {"attention_mask": [1, 1, 1], "labels": [8, 9, -100]},
        {"attention_mask": [1, 1], "labels": [-100, 7]},
    ]
    assert step_flops(gpt2, rows, 4) == 4 * (gpt2.token * 5 + gpt2.label * 2)
    classes = [{"attention_mask": [1, 1, 1], "labels": 0}, {"attention_mask": [1, 1], "labels": 1}]
    assert step_flops(roberta, classes, 6) == 6 * (roberta.token * 5 + roberta.row * 2)


def test_batches_are_evenly_spaced_over_the_lengths() -> None:
    lengths = list(range(100))
    chosen = spread_batches(list(reversed(lengths)), batch_size=5, steps=2)
    # Of 20 batches of 5, sorted from the longest to the shortest, the 6th and the 16th are taken.
    assert [lengths[index] for index in chosen] == [74, 73, 72, 71, 70, 24, 23, 22, 21, 20]
    assert sorted(spread_batches(lengths[:7], batch_size=5, steps=2)) == list(range(7))


def test_a_job_is_equal_after_the_pipe() -> None:
    job = make_job("lora")
    assert Job.from_line(job.to_line()) == job
