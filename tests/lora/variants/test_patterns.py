from __future__ import annotations

from typing import Any

import pytest
import yaml

from lora_hf.core.config.schema import LoraConfig, RunConfig
from lora_hf.core.errors import ConfigError
from lora_hf.lora.inject import inject, lora_layers
from lora_hf.lora.target_modules import plan
from tests.support.small_models import small_model

QUERY = "roberta.encoder.layer.{}.attention.self.query"


def ranks(kind: str = "roberta", **lora: Any) -> dict[str, tuple[int, float]]:
    model = inject(small_model(kind), LoraConfig(**{"r": 4, **lora}))
    return {
        path: (layer.adapters["default"].r, layer.adapters["default"].lora_alpha)
        for path, layer in lora_layers(model).items()
    }


def test_the_first_pattern_that_matches_decides() -> None:
    first, second = QUERY.format(0), QUERY.format(1)
    found = ranks(
        targets=("q", "ffn"),
        rank_pattern={"encoder.layer.1.attention.self.query": 2, "q": 3, "ffn": 5},
        alpha_pattern={first: 1.5, "*.encoder.layer.*.output.dense": 7},
    )
    assert (found[first], found[second]) == ((3, 1.5), (2, 8))
    assert found["roberta.encoder.layer.0.intermediate.dense"] == (5, 8)
    assert found["roberta.encoder.layer.0.output.dense"] == (5, 7)


def test_chosen_layers_count_from_either_end() -> None:
    assert list(ranks(targets=("q",), layers=(-1,))) == [QUERY.format(1)]
    assert len(ranks(targets=("q",), layers=(0, -1, 1))) == 2
    assert list(ranks("gpt2", targets=("ffn_up",), layers=(0,))) == ["transformer.h.0.mlp.c_fc"]


@pytest.mark.parametrize(
    ("kind", "lora", "message"),
    [
        ("roberta", {"layers": (0, 2, -3)}, "this model has 2 layers, 0 to 1; found 2, -3"),
        ("bert", {"layers": (0,), "targets": ("q", "pooler.dense")}, "'pooler.dense' has no module in the layers 0"),
        ("roberta", {"targets": ("q",), "rank_pattern": {"k": 2}}, "lora.rank_pattern: 'k' matches no adapted module"),
        ("roberta", {"alpha_pattern": {"encoder.layer.9.x": 2}}, "'encoder.layer.9.x' matches no adapted module"),
        ("roberta", {"alpha_pattern": {"(query": 2}}, "lora.alpha_pattern: '(query'"),
        ("roberta", {"rank_pattern": {"(query": 2}}, "lora.rank_pattern: '(query'"),
        ("gpt2", {"rank_pattern": {"q": 2}}, "one projection for several roles, which share r and lora_alpha"),
        ("roberta", {"rank_pattern": {"q": 33}}, "expected a rank of at most 32, found 33"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(kind: str, lora: dict[str, Any], message: str) -> None:
    model = small_model(kind, num_labels=2)
    with pytest.raises(ConfigError) as error:
        inject(model, LoraConfig(**lora))
    assert message in str(error.value)
    assert not lora_layers(model)


def test_a_config_of_them_goes_through_yaml() -> None:
    text = "{layers: [0, -1], rank_pattern: {q: 4}, alpha_pattern: {ffn: 2e0}, init_lora_weights: pissa_niter_4}"
    config = RunConfig.from_dict({"lora": yaml.safe_load(text)})
    assert config.lora.layers == (0, -1)
    assert config.lora.alpha_pattern == {"ffn": 2.0}
    assert RunConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    assert RunConfig.from_dict({"lora": {"layers": 3}}).lora.layers == (3,)
    assert [site.path for site in plan(small_model("roberta"), LoraConfig(targets=("q",), layers=(1,)))] == [
        QUERY.format(1)
    ]


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank_pattern": {"q": 0}}, "rank_pattern: q: expected a whole number >= 1, found 0"),
        ({"rank_pattern": {"q": 1.5}}, "rank_pattern: q: expected a whole number >= 1, found 1.5"),
        ({"alpha_pattern": {"q": 0}}, "alpha_pattern: q: expected a number > 0, found 0"),
        ({"rank_pattern": 4}, "rank_pattern: expected keys and values, found 4"),
        ({"layers": ["0"]}, "layers: expected a whole number or a list of whole numbers"),
        ({"layers": True}, "layers: expected a whole number or a list of whole numbers"),
        ({"init_lora_weights": "pisa"}, "found 'pisa' (did you mean 'pissa'?)"),
        ({"init_lora_weights": "pissa_niter_0"}, "expected one of default, gaussian, pissa, olora, pissa_niter_[n]"),
        ({"use_rslor": True}, "use_rslor: unknown key (did you mean 'use_rslora'?)"),
        ({"use_dora": "yes"}, "use_dora: expected true or false, found 'yes'"),
    ],
)
def test_mistakes_are_told_when_the_config_is_read(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        RunConfig.from_dict({"lora": lora})
    assert message in str(error.value)
