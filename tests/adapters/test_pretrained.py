"""What people call on any transformers model works on an adapted one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from lora_hf import LoraConfig, eject, inject, load_adapter, merge, save_adapter, set_adapter
from lora_hf.core.errors import AdapterError, ConfigError, ModelError
from lora_hf.lora.inject import lora_layers
from tests.support.small_models import randomize_lora_b, small_model, token_ids
from tests.tolerances import FILE_ROUNDTRIP, PARITY_FP32

KINDS = {
    "bert": AutoModelForSequenceClassification,
    "gpt2": AutoModelForCausalLM,
    "llama": AutoModelForCausalLM,
}


@pytest.fixture(params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    kind = request.param
    small_model(kind, 3 if kind == "bert" else None).save_pretrained(tmp_path / "base")
    return KINDS[kind], tmp_path / "base"


def fresh(base: tuple[Any, Path]) -> PreTrainedModel:
    auto, folder = base
    return auto.from_pretrained(folder).eval()


def adapted(base: tuple[Any, Path]) -> PreTrainedModel:
    model = inject(fresh(base), LoraConfig(r=2, targets=("all",)))
    randomize_lora_b(model)
    return model


def batch(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    labels = torch.tensor([0, 1, 2]) if "Classification" in type(model).__name__ else token_ids()
    return {"input_ids": token_ids(), "labels": labels}


def rows(model: PreTrainedModel) -> list[dict[str, Any]]:
    each = batch(model)
    return [{key: value[row].tolist() for key, value in each.items()} for row in range(3)]


def arguments(folder: Path, **named: Any) -> TrainingArguments:
    return TrainingArguments(str(folder), max_steps=2, save_steps=1, report_to="none", use_cpu=True, **named)


def test_save_pretrained_writes_an_adapter_that_all_read(base: tuple[Any, Path], tmp_path: Path) -> None:
    model = adapted(base)
    logits = model(token_ids()).logits
    model.save_pretrained(tmp_path / "saved")
    for read in (
        load_adapter(fresh(base), tmp_path / "saved"),
        PeftModel.from_pretrained(fresh(base), str(tmp_path / "saved")),
        base[0].from_pretrained(tmp_path / "saved").eval(),  # through PEFT, onto the base that the config names
    ):
        assert torch.allclose(read(token_ids()).logits, logits, atol=FILE_ROUNDTRIP, rtol=0)
    eject(model).save_pretrained(tmp_path / "plain")
    assert (tmp_path / "plain/config.json").is_file(), "an ejected model saves itself again"


def test_a_trainer_saves_and_resumes_adapters(base: tuple[Any, Path], tmp_path: Path) -> None:
    model = adapted(base)
    trainer = Trainer(model, arguments(tmp_path / "out", learning_rate=1e-2), train_dataset=rows(model))
    trainer.train()
    logits = model.eval()(token_ids()).logits
    trainer.save_model(str(tmp_path / "final"))
    for folder in ("final", "out/checkpoint-2"):
        read = load_adapter(fresh(base), tmp_path / folder)
        assert torch.allclose(read(token_ids()).logits, logits, atol=FILE_ROUNDTRIP, rtol=0)
    again = adapted(base)
    resumed = Trainer(again, arguments(tmp_path / "out", learning_rate=1e-2), train_dataset=rows(again))
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"))
    assert torch.allclose(again.eval()(token_ids()).logits, logits, atol=PARITY_FP32, rtol=0)


def test_an_accelerate_loop_trains_and_saves(base: tuple[Any, Path], tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = adapted(base)
    before = model(token_ids()).logits.detach()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-2))
    for _ in range(2):
        accelerator.backward(wrapped(**batch(model)).loss)
        optimizer.step()
        optimizer.zero_grad()
    after = model(token_ids()).logits
    assert not torch.allclose(after, before, atol=1e-3)
    accelerator.unwrap_model(wrapped).save_pretrained(tmp_path / "saved", save_function=accelerator.save)
    read = load_adapter(fresh(base), tmp_path / "saved")
    assert torch.allclose(read(token_ids()).logits, after, atol=FILE_ROUNDTRIP, rtol=0)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_state_dict_copies_casts_and_checkpointing(base: tuple[Any, Path], tmp_path: Path) -> None:
    model = adapted(base)
    logits = model(token_ids()).logits
    torch.save(model, tmp_path / "model.pt")
    other = inject(fresh(base), LoraConfig(r=2, targets=("all",)))
    other.load_state_dict(model.state_dict())
    for same in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(model), other):
        assert torch.equal(same(token_ids()).logits, logits)
        same.save_pretrained(tmp_path / "again")
        assert torch.allclose(
            load_adapter(fresh(base), tmp_path / "again")(token_ids()).logits, logits, atol=FILE_ROUNDTRIP, rtol=0
        )
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(token_ids()).logits.isfinite().all()
    assert all(weights.lora_A.dtype == torch.float32 for weights in
               (layer.adapters["default"] for layer in lora_layers(half).values()))  # fmt: skip
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()(**batch(model)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


class Compiled(nn.Module):
    """As torch.compile wraps a module, without its seconds of imports."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self._orig_mod(*inputs, **named)


def test_a_compiled_part_is_saved_under_its_plain_paths(base: tuple[Any, Path], tmp_path: Path) -> None:
    model = adapted(base)
    logits = model(token_ids()).logits
    path = next(path for path, module in model.named_modules() if path.endswith(".1"))
    model.set_submodule(path, part := Compiled(model.get_submodule(path)))
    save_adapter(model, tmp_path)
    assert model.get_submodule(path) is part
    assert torch.allclose(load_adapter(fresh(base), tmp_path)(token_ids()).logits, logits, atol=FILE_ROUNDTRIP, rtol=0)
    for change in (lambda: inject(model, LoraConfig(r=2), "other"), lambda: load_adapter(model, tmp_path, "other")):
        with pytest.raises(ModelError, match=rf"torch\.compile has wrapped {path}; change the plain model first"):
            change()


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # torch.compile has many of its own
def test_a_compiled_or_parallel_model_is_seen_through(base: tuple[Any, Path], tmp_path: Path) -> None:
    model = adapted(base)
    logits = model(token_ids()).logits
    for number, wrapper in enumerate((torch.compile(model, backend="eager"), nn.DataParallel(model))):
        assert torch.allclose(wrapper(input_ids=token_ids()).logits, logits, atol=FILE_ROUNDTRIP, rtol=0)
        save_adapter(wrapper, tmp_path / str(number))  # type: ignore[arg-type]
        read = load_adapter(fresh(base), tmp_path / str(number))
        assert torch.allclose(read(token_ids()).logits, logits, atol=FILE_ROUNDTRIP, rtol=0)
        for change in (lambda: merge(wrapper), lambda: inject(wrapper, LoraConfig(), "other")):  # noqa: B023
            with pytest.raises(ModelError, match="has wrapped this model; change the plain model first"):
                change()
        assert set_adapter(wrapper, None) is wrapper  # type: ignore[arg-type]
        set_adapter(wrapper, "default")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_other_wrappers_are_refused_by_name(base: tuple[Any, Path]) -> None:
    theirs = get_peft_model(fresh(base), PeftConfig(target_modules="all-linear"))
    with pytest.raises(ModelError, match=r"is a model of PEFT: save its adapter"):
        inject(theirs, LoraConfig())  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"\.0\..* is adapted by PEFT already\. Load the plain base"):
        inject(theirs.get_base_model(), LoraConfig())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"expected a lora_hf\.LoraConfig, found peft\.LoraConfig"):
        inject(fresh(base), PeftConfig())  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"Linear: expected a transformers model, .* found none"):
        inject(nn.Linear(2, 2), LoraConfig())  # type: ignore[arg-type]
    two = nn.ModuleList([fresh(base), fresh(base)])
    with pytest.raises(ModelError, match=r"found 2 of them \(0, 1\)"):
        inject(two, LoraConfig())  # type: ignore[arg-type]


def test_a_module_that_holds_a_model_is_adapted_in_place(base: tuple[Any, Path], tmp_path: Path) -> None:
    class Regressor(nn.Module):
        def __init__(self, encoder: PreTrainedModel) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.encoder(ids).logits.mean()

    holder: Any = Regressor(fresh(base))
    assert inject(holder, LoraConfig(r=2)) is holder
    randomize_lora_b(holder.encoder)
    save_adapter(holder, tmp_path / "saved")
    read = load_adapter(fresh(base), tmp_path / "saved")
    assert torch.equal(read(token_ids()).logits, holder.encoder(token_ids()).logits)
    assert not lora_layers(eject(holder))


def test_save_pretrained_without_an_active_adapter_is_an_error(base: tuple[Any, Path], tmp_path: Path) -> None:
    model = set_adapter(adapted(base), None)
    with pytest.raises(AdapterError, match="no adapter is active"):
        model.save_pretrained(tmp_path / "saved")


def test_the_file_for_trainers_resume_holds_the_start_of_a_randomized_pissa(tmp_path: Path) -> None:
    lora, ids = LoraConfig(r=2, init_lora_weights="pissa_niter_1"), token_ids()
    models = [small_model("llama").eval() for _ in range(2)]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        inject(model, lora)
    trained, resumed = models
    for layer in lora_layers(trained).values():
        layer.adapters["default"].lora_B.data += 0.1
    trained.save_pretrained(tmp_path)
    resumed.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    torch.testing.assert_close(resumed(input_ids=ids).logits, trained(input_ids=ids).logits)
