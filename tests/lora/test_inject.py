from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    IBertConfig,
    IBertForSequenceClassification,
)

from lora_hf.core.config.schema import ROLES, LoraConfig
from lora_hf.core.errors import AdapterError, ConfigError
from lora_hf.lora.architectures import ARCHITECTURES
from lora_hf.lora.fingerprint import fingerprint
from lora_hf.lora.inject import (
    adapter_state,
    count_parameters,
    eject,
    inject,
    lora_layers,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge,
    set_adapter,
)
from lora_hf.lora.slices import slice_columns, slice_width
from lora_hf.lora.target_modules import Site, layer_of, plan, projections
from lora_hf.models.load import SHAPES as PUBLISHED
from tests.support.small_models import CLASSIFIERS, randomize_lora_b, small_config, small_model, token_ids


def published(name: str, auto: type = AutoModelForSequenceClassification, **more: int) -> nn.Module:
    """The published shape without memory for its weights: counting needs none."""
    shape = dict(PUBLISHED[name])
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape, **more))


def test_plan_lists_the_exact_sites_of_roberta() -> None:
    sites = plan(small_model("roberta", num_labels=2), LoraConfig(targets=("ffn", "q")))
    assert sites == [
        Site(f"roberta.encoder.layer.{layer}.{path}", role, "linear")
        for layer in (0, 1)
        for path, role in (
            ("attention.self.query", "q"),
            ("intermediate.dense", "ffn_up"),
            ("output.dense", "ffn_down"),
        )
    ]


def test_a_router_is_no_projection() -> None:
    """Llama 4 derives it from nn.Linear, but it returns a pair."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"vocab_size": 100, "intermediate_size": 48, "intermediate_size_mlp": 48, "head_dim": 8, "pad_token_id": 1}
    config = AutoConfig.for_model("llama4_text", **shape, **sizes, num_local_experts=2)
    for target in ("all", "all-linear"):
        model = inject(AutoModelForCausalLM.from_config(config), LoraConfig(r=2, targets=(target,)))
        assert not [path for path in lora_layers(model) if "router" in path]
        model(token_ids(), labels=token_ids()).loss.backward()
    assert len(plan(small_model("falcon"), LoraConfig(targets=("o",)))) == 2, "computes what nn.Linear does"


def test_plan_lists_the_slices_of_the_fused_projection_of_gpt2() -> None:
    sites = plan(small_model("gpt2"), LoraConfig(targets=("v", "q", "o")))
    first = "transformer.h.0.attn"
    assert sites[:3] == [
        Site(f"{first}.c_attn", "q", "conv1d", (0, 32)),
        Site(f"{first}.c_attn", "v", "conv1d", (64, 96)),
        Site(f"{first}.c_proj", "o", "conv1d"),
    ]
    assert [site.path for site in sites[3:]] == [site.path.replace("h.0", "h.1") for site in sites[:3]]


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_every_role_of_every_architecture_finds_projections_in_all_layers(kind: str) -> None:
    model = AutoModel.from_config(small_config(kind))
    layers = {layer_of(path) for path in projections(model)} - {None}
    for role in {**ARCHITECTURES[kind].projections, **ARCHITECTURES[kind].refused}:
        assert role in ROLES
        if role in ARCHITECTURES[kind].refused:
            with pytest.raises(ConfigError, match=f"{kind} has no role '{role}' \\(its experts are one tensor"):
                plan(model, LoraConfig(targets=(role,)))
        elif (kind, role) != ("t5", "ffn_gate"):  # only T5 1.1 and later have it
            sites = plan(model, LoraConfig(targets=(role,)))
            assert {site.role for site in sites} == {role}
            assert {layer_of(site.path) for site in sites} == layers


FUSED = [(kind, role) for kind in ("modernbert", "deberta", "gpt2", "gpt_neox", "bloom", "phi3") for role in "qkv"]
FALCONS = [(f"falcon-{number}", role) for number in range(3) for role in "qkv"]


@pytest.mark.parametrize(("kind", "role"), [*FUSED, *FALCONS])
def test_the_columns_of_a_fused_projection_are_those_of_the_role(kind: str, role: str) -> None:
    """Noise in q of one token changes its own row of the attention alone, noise in k also other rows, in v none."""
    kind, _, number = kind.partition("-")
    layouts = [{"multi_query": True}, {"new_decoder_architecture": True}, {"multi_query": False, "num_kv_heads": 4}]
    more: dict[str, Any] = layouts[int(number)] if number else {}
    config = small_config(kind, **({"relative_attention": False} if kind == "deberta" else {}), **more)
    if kind == "phi3":
        config.num_key_value_heads = 2
    model = AutoModel.from_config(config, attn_implementation="eager").eval()
    (site, *_) = plan(model, LoraConfig(targets=(role,)))
    assert site.slice is not None

    def disturb(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, 2, slice_columns(site.slice)] += torch.randn(3, slice_width(site.slice))
        return output

    attentions = [model(token_ids(), output_attentions=True).attentions[0]]
    model.get_submodule(site.path).register_forward_hook(disturb)
    attentions.append(model(token_ids(), output_attentions=True).attentions[0])
    changed = (attentions[0] != attentions[1]).any(dim=-1).any(dim=1)  # (batch, length)
    rows = {"q": changed[:, 2], "k": changed[:, 3:]}
    assert bool(changed.any()) == (role != "v")
    if role != "v":
        assert rows[role].all()
        assert role == "k" or int(changed.sum()) == len(changed)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_injected_everywhere_changes_the_output_and_ejects_to_the_plain_model(kind: str) -> None:
    model, ids = small_model(kind, num_labels=3), token_ids()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = model(ids).logits
    inject(model, LoraConfig(r=4, targets=("all",)))
    assert torch.equal(model(ids).logits, plain), "B = 0: the adapter must change nothing yet"
    randomize_lora_b(model)
    assert not torch.allclose(model(ids).logits, plain, atol=1e-3)
    model.train()
    model(ids, labels=torch.tensor([0, 1, 2])).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name or ".modules_to_save." in name), name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name
    after = eject(model.eval()).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(ids).logits, plain)


def test_eject_after_merge_keeps_the_merged_weights_and_the_trained_head() -> None:
    model, ids = small_model("roberta", num_labels=2), token_ids()
    inject(model, LoraConfig(targets=("all",)))
    randomize_lora_b(model)
    nn.init.normal_(model.classifier.modules_to_save["default"].out_proj.weight)
    adapted = model(ids).logits
    eject(merge(model))
    assert not lora_layers(model)
    assert torch.allclose(model(ids).logits, adapted, atol=1e-5)


def test_parameter_counts_of_the_published_shapes() -> None:
    roberta = published("roberta-base")
    assert count_parameters(roberta).total == 124_647_170
    counts = count_parameters(inject(roberta, LoraConfig(r=8, targets=("q", "v"))))
    assert (counts.lora, counts.trainable, counts.total) == (294_912, 887_042, 124_647_170 + 294_912)
    own_head = sum(parameter.numel() for parameter in roberta.classifier.original_module.parameters())
    assert sum(parameter.numel() for parameter in roberta.parameters()) == counts.total + own_head
    for name, lora in (("gpt2", 147_456), ("gpt2-medium", 393_216)):
        counts = count_parameters(inject(published(name, AutoModelForCausalLM), LoraConfig(r=4, targets=("q", "v"))))
        assert (counts.lora, counts.trainable, counts.head) == (lora, lora, 0)


def test_a_second_adapter_leaves_the_counts_of_the_active_one_alone() -> None:
    model = inject(small_model("roberta", num_labels=2), LoraConfig(r=2))
    one = count_parameters(model)
    inject(model, LoraConfig(r=8, targets=("all",)), name="other")
    set_adapter(model, "default")
    two = count_parameters(model)
    assert (two.total, two.lora, two.head) == (one.total, one.lora, one.head)


def test_the_bare_base_has_the_counts_of_the_plain_model() -> None:
    model = small_model("roberta", num_labels=2)
    plain = count_parameters(model).total
    set_adapter(inject(model, LoraConfig(r=2)), None)
    counts = count_parameters(model)
    assert (counts.total, counts.lora, counts.head) == (plain, 0, 0)


def test_the_bases_own_head_is_neither_trained_nor_listed_nor_part_of_the_fingerprint() -> None:
    model = small_model("roberta", num_labels=2)
    before = fingerprint(model)
    inject(model, LoraConfig(r=2))
    assert fingerprint(model) == before
    for bias in ("none", "lora_only", "all"):
        mark_only_lora_as_trainable(model, bias)
        assert not any(parameter.requires_grad for parameter in model.classifier.original_module.parameters())
        assert not any("original_module" in name for name in lora_state_dict(model, bias))
    assert not any("original_module" in path for path in projections(model))
    head = model.classifier.original_module
    assert eject(model).classifier is head
    assert all(parameter.requires_grad for parameter in head.parameters())


def test_each_adapter_answers_for_itself() -> None:
    model, ids = small_model("roberta", num_labels=2), token_ids()
    plain = model(ids).logits
    inject(model, LoraConfig(r=2), name="a")
    inject(model, LoraConfig(r=4, targets=("ffn",)), name="b")
    randomize_lora_b(model)
    nn.init.normal_(model.classifier.modules_to_save["b"].out_proj.weight)
    answers = {name: set_adapter(model, name)(ids).logits for name in ("a", "b")}
    assert not torch.allclose(answers["a"], answers["b"], atol=1e-3)
    assert torch.equal(set_adapter(model, "a")(ids).logits, answers["a"])
    assert torch.equal(set_adapter(model, None)(ids).logits, plain)
    with pytest.raises(AdapterError, match=r"no adapter 'c' on this model.*it has: a, b"):
        set_adapter(model, "c")


def test_mark_only_lora_as_trainable_and_lora_state_dict_mean_what_they_mean_in_loralib() -> None:
    model = inject(small_model("gpt2"), LoraConfig(r=2, targets=("q", "o")))
    assert {name.rpartition(".")[2] for name in lora_state_dict(model)} == {"lora_A", "lora_B"}
    mark_only_lora_as_trainable(model, bias="lora_only")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if name.endswith("bias")} == {
        f"transformer.h.{layer}.attn.{path}.base_layer.bias" for layer in (0, 1) for path in ("c_attn", "c_proj")
    }
    biases = [name for name, _ in model.named_parameters() if name.endswith(".bias")]
    assert set(biases) < set(lora_state_dict(model, bias="all"))
    with pytest.raises(ConfigError, match="bias: expected one of none, all, lora_only, found 'some'"):
        mark_only_lora_as_trainable(model, bias="some")  # type: ignore[arg-type]


def test_tied_embeddings_stay_tied() -> None:
    model = inject(small_model("gpt2"), LoraConfig(targets=("all",)))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert eject(merge(model)).lm_head.weight is model.transformer.wte.weight


def test_a_path_adapts_what_has_no_role() -> None:
    sites = plan(
        small_model("bert", num_labels=2), LoraConfig(targets=("pooler.dense", "encoder.layer.*.output.dense"))
    )
    assert [site.path for site in sites] == [
        "bert.encoder.layer.0.output.dense",
        "bert.encoder.layer.1.output.dense",
        "bert.pooler.dense",
    ]


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        ("roberta", ("ffn_gate",), "roberta has no role 'ffn_gate'; it has: q, k, v, o, ffn_up, ffn_down"),
        ("roberta", ("encoder.layer.*.atention.self.query",), "did you mean 'encoder.layer.*.attention.self.query'"),
        ("roberta", ("querry",), "no nn.Linear, Conv1D or nn.Embedding of this roberta matches 'querry' (did you mean"),
        ("roberta", ("classifier.dense",), "of this roberta matches 'classifier.dense'"),
        ("roberta", (".*(query",), "'.*(query' is not a regular expression"),
        pytest.param(
            "roberta", (r"((?P<x>[a-z]|\w|\.)*)*(?P=x)[A-Z]",), "takes too long to match", marks=pytest.mark.full
        ),
        ("gemma", ("embeddings",), "its embeddings are a GemmaTextScaledWordEmbedding"),
        ("gpt2", ("q", "h.*.attn.c_attn"), "both adapt transformer.h.0.attn.c_attn"),
    ],
)
def test_targets_that_cannot_be_adapted_are_named(kind: str, targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan(small_model(kind, num_labels=2), LoraConfig(targets=targets))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("query", "value"), ["q", "v"]),
        (("self.query", "attention.self.value"), ["q", "v"]),
        ((r".*\.self\.(query|value)",), ["q", "v"]),
        (("all-linear",), ["q", "k", "v", "o", "ffn_up", "ffn_down"]),
    ],
)
def test_the_targets_of_peft_name_the_same_modules(targets: tuple[str, ...], expected: list[str]) -> None:
    model = small_model("roberta", num_labels=2)
    by_role = plan(model, LoraConfig(targets=tuple(expected)))
    assert [site.path for site in plan(model, LoraConfig(targets=targets))] == [site.path for site in by_role]


def test_all_linear_leaves_out_the_output_head_which_can_be_named() -> None:
    model = small_model("llama", tie_word_embeddings=False)
    paths = {site.path for site in plan(model, LoraConfig(targets=("all-linear",)))}
    assert paths == set(projections(model)) - {"lm_head"}
    assert [site.path for site in plan(model, LoraConfig(targets=("lm_head",)))] == ["lm_head"]


def test_the_roles_of_an_unknown_type_are_guessed_and_shown(caplog: pytest.LogCaptureFixture) -> None:
    model = small_model("megatron-bert", num_labels=2)
    sites = plan(model, LoraConfig(targets=("q", "ffn_down")))
    assert {site.path.rpartition("layer.")[2][2:] for site in sites} == {"attention.self.query", "output.dense"}
    assert "'megatron-bert' is not in the role table" in caplog.text
    assert "encoder.layer.*.attention.self.query  q (2 modules)" in caplog.text
    every = plan(model, LoraConfig(targets=("all",)))
    assert {site.path for site in every} == {path for path in projections(model) if layer_of(path) is not None}
    with pytest.raises(ConfigError, match=r"no module name matches the role 'ffn_gate'\. Set .*all-linear"):
        plan(model, LoraConfig(targets=("ffn_gate",)))
    with pytest.raises(ConfigError, match=r"no module name matches the role 'q'.*: c_attn, c_proj, c_fc, lm_head$"):
        plan(small_model("gpt_bigcode"), LoraConfig(targets=("q",)))  # c_attn fuses q, k and v


@pytest.mark.parametrize("target", ["q", "all", "all-linear", "query"])
def test_a_model_without_a_plain_projection_cannot_be_adapted(target: str) -> None:
    """I-BERT multiplies integers in layers of its own."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = IBertForSequenceClassification(IBertConfig(**sizes, vocab_size=100))
    with pytest.raises(ConfigError) as error:
        inject(model, LoraConfig(r=2, targets=(target,)))
    message = str(error.value)
    assert all(word in message for word in ("LoRA cannot adapt this ibert", "QuantLinear", "train.method=head"))
    assert "classes: QuantLinear. Choose" in message
    assert "all-linear" not in message


def test_a_rank_above_the_layer_and_a_taken_or_impossible_name_are_refused() -> None:
    model = small_model("roberta", num_labels=2)
    with pytest.raises(ConfigError, match=r"lora.r: .*query maps 32 to 32; expected a rank of at most 32, found 33"):
        inject(model, LoraConfig(r=33))
    assert not lora_layers(model), "a refused injection must leave the model alone"
    inject(model, LoraConfig())
    for name in ("default", "a.b", "keys", ""):
        with pytest.raises(AdapterError, match="adapter"):
            inject(model, LoraConfig(), name=name)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in ("bert", "roberta", "gpt2", "llama", "modernbert") else pytest.mark.full)
        for kind in CLASSIFIERS
        if kind not in ("albert", "mpnet")  # which cannot
    ],
)
def test_activations_computed_again_give_the_same_gradients(kind: str) -> None:
    """Each of them, to the last bit, dropout included."""

    def gradients(again: bool, seed: int = 3) -> dict[str, torch.Tensor]:
        lora = LoraConfig(r=2, lora_dropout=0.2, targets=("all",))
        model = inject(small_model(kind, num_labels=2), lora)
        randomize_lora_b(model)
        if again:
            model.gradient_checkpointing_enable()
        model.train()
        torch.manual_seed(seed)
        model(input_ids=token_ids(), labels=torch.tensor([0, 1, 1])).loss.backward()
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all(parameter.grad is not None for parameter in trained.values())
        return {name: parameter.grad for name, parameter in trained.items()}  # type: ignore[misc]

    plain, again, other = gradients(again=False), gradients(again=True), gradients(again=True, seed=4)
    assert [name for name in plain if not torch.equal(plain[name], again[name])] == []
    assert [name for name in plain if torch.equal(plain[name], other[name])] == [], "other masks, other gradients"


def test_a_merged_head_has_the_precision_of_the_base_that_it_is_left_in() -> None:
    model, ids = small_model("bert", 3).to(torch.bfloat16), token_ids()  # type: ignore[arg-type]
    inject(model, LoraConfig(r=2))
    eject(merge(model.eval()))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(input_ids=ids).logits.shape == (len(ids), 3)


def test_an_adapter_beside_one_with_other_labels_has_those_of_the_base() -> None:
    model = small_model("bert", 3)
    inject(model, LoraConfig(r=2), "a")
    state = adapter_state(model)
    state.labels["b"] = (("x", "y"), None)  # as `load_adapter(own_head=True)` leaves it
    state.names["b"] = None
    set_adapter(model, "b")
    inject(model, LoraConfig(r=2), "c")
    assert model.config.num_labels == 3
    set_adapter(model, "b")
    assert model.config.num_labels == 2
