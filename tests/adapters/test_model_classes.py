"""An adapter on any class of any model type: trained, saved, loaded in a new process onto a fresh base with a new head.

Each pair of type and class starts from a checkpoint of the bare base, so that its head is random in every process. If
any random part stayed out of the adapter, the reloaded model would give other outputs.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from lora_hf.adapters.save_load import load_adapter, save_adapter
from lora_hf.core.config.schema import LoraConfig
from lora_hf.lora.inject import eject, inject, merge
from tests.support import fork_server, model_classes
from tests.support.model_classes import AUTO_CLASSES, from_base, has_class, outputs_of, train
from tests.support.small_models import SHAPES, UNKNOWN_SHAPES, small_config
from tests.tolerances import MERGE_FP32, PEFT_LOGITS

pytestmark = [pytest.mark.full, pytest.mark.minutes]

KINDS = tuple({**SHAPES, **UNKNOWN_SHAPES})
PAIRS = [
    pytest.param(kind, auto, id=f"{kind}-{auto}") for kind in KINDS for auto in AUTO_CLASSES if has_class(kind, auto)
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder with `<type>/base` and `<type>/<class>`: the adapters of all selected pairs, reloaded elsewhere."""
    folder = tmp_path_factory.mktemp("classes")
    selected = {item.callspec.id for item in request.session.items if item.module is request.module}
    for kind in KINDS:
        autos = [auto for auto in AUTO_CLASSES if f"{kind}-{auto}" in selected]
        if autos:
            torch.manual_seed(0)
            transformers.AutoModel.from_config(small_config(kind)).save_pretrained(folder / kind / "base")
        for auto in autos:
            (folder / kind / auto).mkdir()
            try:
                _train_one(folder / kind, auto)
            except Exception as error:  # noqa: BLE001 - belongs to one test, not to all
                (folder / kind / auto / "error.txt").write_text(f"{type(error).__name__}: {error}")
    fork_server.run(model_classes.reload, folder)
    return folder


def _train_one(folder: Path, auto: str) -> None:
    model = from_base(auto, folder / "base", seed=1)
    with torch.no_grad():
        torch.save(outputs_of(model), folder / auto / "plain.pt")
    inject(model, LoraConfig(r=2, targets=("all",)))
    train(model)
    save_adapter(model, folder / auto)
    with torch.no_grad():
        torch.save(outputs_of(model), folder / auto / "outputs.pt")


@pytest.mark.parametrize(("kind", "auto"), PAIRS)
def test_a_saved_adapter_gives_the_same_outputs_in_a_new_process(kind: str, auto: str, trained: Path) -> None:
    folder = trained / kind / auto
    assert not (folder / "error.txt").exists(), (folder / "error.txt").read_text()
    plain, outputs, reloaded = (torch.load(folder / f"{name}.pt") for name in ("plain", "outputs", "reloaded"))
    assert torch.equal(reloaded, outputs)
    assert not torch.allclose(plain, outputs, atol=1e-3), "the adapter changes nothing: this test could not fail"


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # a decoder alone trains its own embeddings
@pytest.mark.parametrize(("kind", "auto"), PAIRS)
def test_peft_reads_the_adapter_and_merging_keeps_its_outputs(kind: str, auto: str, trained: Path) -> None:
    folder = trained / kind / auto
    outputs = torch.load(folder / "outputs.pt")
    scale = float(outputs.abs().max())
    model = from_base(auto, trained / kind / "base", seed=6)
    theirs: Any = PeftModel.from_pretrained(copy.deepcopy(model), folder)
    assert torch.allclose(outputs_of(theirs.get_base_model().eval()), outputs, rtol=0, atol=PEFT_LOGITS * scale)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_adapter(model, folder)
    after = eject(model).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    merged = eject(merge(load_adapter(model, folder)))
    assert torch.allclose(outputs_of(merged.eval()), outputs, rtol=0, atol=MERGE_FP32 * max(scale, 1))
