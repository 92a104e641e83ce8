"""Adapters that PEFT wrote for every class of every model type: the same outputs here, on a base with another head.

Each of the pairs of `tests/adapters/test_model_classes.py` gets the settings of `peft_settings` that depend on the
head, and one class of each type gets all six.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers

from lora_hf.adapters.save_load import load_adapter
from lora_hf.core.errors import AdapterError
from lora_hf.lora.heads import new_parameters
from tests.support.left_out import LEFT_OUT, left_out
from tests.support.model_classes import AUTO_CLASSES, from_base, has_class, outputs_of
from tests.support.peft_settings import SETTINGS, peft_settings, save_random_adapter
from tests.support.small_models import SHAPES, UNKNOWN_SHAPES, small_config
from tests.tolerances import PEFT_LOGITS

pytestmark = pytest.mark.minutes

KINDS = tuple({**SHAPES, **UNKNOWN_SHAPES})
PAIRS = [
    pytest.param(kind, auto, id=f"{kind}-{auto}") for kind in KINDS for auto in AUTO_CLASSES if has_class(kind, auto)
]
WITH_HEAD_FIRST = (*AUTO_CLASSES[1:], "AutoModel")
FIRST_CLASS = {kind: next(auto for auto in WITH_HEAD_FIRST if has_class(kind, auto)) for kind in KINDS}
OF_THE_HEAD = ("all-linear", "modules_to_save")  # the others name projections in the layers


def difference(
    fields: dict[str, object], theirs: transformers.PreTrainedModel, ours: transformers.PreTrainedModel, folder: Path
) -> tuple[float, float]:
    """How far our outputs are from those of PEFT, and those of the base alone, relative to the largest."""
    expected = save_random_adapter(copy.deepcopy(theirs), copy.deepcopy(fields), folder)
    with torch.no_grad():
        found = outputs_of(load_adapter(copy.deepcopy(ours), folder))
        plain = outputs_of(ours)
    scale = float(expected.abs().max())
    return float((found - expected).abs().max()) / scale, float((plain - expected).abs().max()) / scale


@pytest.mark.full
@pytest.mark.parametrize(("kind", "auto"), PAIRS)
def test_we_compute_what_peft_does_in_every_setting(kind: str, auto: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.AutoModel.from_config(small_config(kind)).save_pretrained(tmp_path / "base")
    theirs, ours = (from_base(auto, tmp_path / "base", seed) for seed in (1, 2))
    new_parameters(ours)  # which its copies remember
    settings = peft_settings(theirs)
    assert tuple(settings) == SETTINGS
    problems = {}
    for setting in SETTINGS if auto == FIRST_CLASS[kind] else OF_THE_HEAD:
        fields = settings[setting]
        if refused := left_out(kind, setting):
            with pytest.raises(AdapterError, match=refused.error):
                difference(fields, theirs, ours, tmp_path / setting)
            continue
        apart, moved = difference(fields, theirs, ours, tmp_path / setting)
        if apart > PEFT_LOGITS:
            problems[setting] = f"differs by {apart:.2g}"
        elif moved < 10 * PEFT_LOGITS:
            problems[setting] = "changes nothing: this test could not fail"
    assert not problems


def test_only_pairs_that_exist_are_left_out() -> None:
    for each in LEFT_OUT:
        assert set(each.model_types) <= set(KINDS)
        assert each.setting in SETTINGS
