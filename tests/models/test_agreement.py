"""A base, its config and its tokenizer that do not fit together: they are made to agree, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lora_hf.core.config.schema import ModelConfig
from lora_hf.core.errors import DataError, ModelError
from lora_hf.data.tasks.registry import get_task
from lora_hf.inference.classify import Predictor
from lora_hf.models.align import align_tokenizer, check_tokens, position_limit
from lora_hf.models.load import BUNDLED_FOLDER, load_base, load_tokenizer
from tests.support.command_lines import ask
from tests.support.small_models import small_model
from tests.support.word_tokenizer import word_tokenizer

SST2 = get_task("sst2")
MRPC = get_task("mrpc")


def base_folder(folder: Path, kind: str, tokenizer: Any = None, num_labels: int | None = 2, **config: Any) -> Path:
    """The folder of a base, whose config.json gets the values in `config`."""
    small_model(kind, num_labels).save_pretrained(folder)
    (tokenizer or word_tokenizer(pad_token="<pad>")).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    return folder


def loaded(folder: Path) -> Predictor:
    model = ModelConfig(name=str(folder), precision="fp32")
    return Predictor(load_base(model, SST2).eval(), load_tokenizer(model), SST2)


@pytest.mark.parametrize("end", [[2, 5], 2, None])
@pytest.mark.parametrize("pad", [None, -1, 100, 7])
def test_the_padding_token_is_the_tokenizers(tmp_path: Path, end: Any, pad: int | None) -> None:
    own, borrowed = word_tokenizer(pad_token="<pad>"), word_tokenizer()
    for tokenizer, expected in ((own, 1), (borrowed, 2)):
        folder = base_folder(tmp_path / str(expected), "llama", tokenizer, eos_token_id=end, pad_token_id=pad)
        predictor = loaded(folder)
        assert predictor.tokenizer.pad_token_id == predictor.model.config.pad_token_id == expected
        assert predictor.logits({"sentence": ["w1", "w2 w3"]}).shape == (2, 2)


def test_positions_that_count_from_the_padding_token_stay(tmp_path: Path) -> None:
    predictor = loaded(base_folder(tmp_path, "roberta", word_tokenizer()))
    assert (predictor.tokenizer.pad_token_id, predictor.model.config.pad_token_id) == (2, 1)
    broken = base_folder(tmp_path / "broken", "roberta", pad_token_id=None)
    with pytest.raises(ModelError, match=r"pad_token_id None.*roberta counts positions from it"):
        loaded(broken)


def test_another_padding_token_than_positions_count_from_is_refused(tmp_path: Path) -> None:
    folder = base_folder(tmp_path, "roberta", pad_token_id=0)
    with pytest.raises(ModelError, match=r"'<pad>' \(id 1\), but config.json has the pad_token_id 0.*roberta counts"):
        loaded(folder)


@pytest.mark.parametrize("end", [2, [5, 2], None, 3, [5, 6]])
def test_a_tokenizer_of_another_model_is_named(end: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = small_model("llama", 2, eos_token_id=end)
    align_tokenizer(word_tokenizer(pad_token="<pad>"), model)
    assert (f"'</s>' has id 2, but that in config.json is {end};" in caplog.text) == (end in (3, [5, 6]))


def test_a_config_without_an_end_token() -> None:
    model, tokenizer = small_model("bert", 2, pad_token_id=0), word_tokenizer(pad_token="<pad>")
    del model.config.eos_token_id
    align_tokenizer(tokenizer, model)
    assert model.config.pad_token_id == tokenizer.pad_token_id != 0


def test_a_tokenizer_with_neither_token_is_refused(tmp_path: Path) -> None:
    folder = base_folder(tmp_path, "gpt2", word_tokenizer(eos_token=None))
    with pytest.raises(ModelError, match=r"neither a padding token \(pad_token\) nor an end token"):
        loaded(folder)


def test_a_padding_token_without_an_embedding_is_refused(tmp_path: Path) -> None:
    folder = base_folder(tmp_path, "gpt2", word_tokenizer(pad_token="<more>"))
    with pytest.raises(ModelError, match=r"'<more>' has id 100.* ids below 100"):
        loaded(folder)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_end_token_cannot_pad_where_the_answer_is_read(kind: str) -> None:
    tokenizer = word_tokenizer(ends=True, pad_token="</s>")
    with pytest.raises(ModelError, match=r"pads with the end token '</s>' \(id 2\)"):
        align_tokenizer(tokenizer, small_model(kind, 2))


@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        ("bert", 64),
        ("roberta", 62),  # 64 less those up to the padding token's id
        ("mpnet", 62),
        ("distilbert", 64),
        ("gpt2", 64),
        ("gpt_neo", 64),
        ("gptj", 64),
        ("opt", 64),  # 66 less an offset of 2
        ("bart", 64),
        ("llama", None),
        ("qwen3", None),
        ("bloom", None),
        ("t5", None),
        ("deberta-v2", None),
    ],
)
def test_rows_are_cut_to_the_positions_of_the_base(kind: str, limit: int | None) -> None:
    model = small_model(kind, 2, max_position_embeddings=64, position_biased_input=False)
    assert position_limit(model) == limit
    predictor = Predictor(model, word_tokenizer(ends=True, pad_token="<pad>"), SST2)  # type: ignore[arg-type]
    inputs = SST2.encode({"sentence": ["w1 " * 200]}, predictor.tokenizer, predictor.max_length)["input_ids"]
    assert len(inputs[0]) == (limit or 201)
    assert predictor.logits({"sentence": ["w1 " * 200]}).shape == (1, 2)


def test_a_tokenizer_that_leaves_no_space_for_a_text_is_refused() -> None:
    with pytest.raises(ModelError, match=r"1 special tokens and a text, found a model_max_length of 1"):
        align_tokenizer(word_tokenizer(ends=True, pad_token="<pad>", model_max_length=1), small_model("bert", 2))


def test_a_limit_of_another_type_is_refused() -> None:
    tokenizer: Any = word_tokenizer(ends=True, pad_token="<pad>")
    for limit in ("512", True):
        tokenizer.model_max_length = limit
        with pytest.raises(ModelError, match=rf"model_max_length {limit!r}.*tokenizer_config.json"):
            align_tokenizer(tokenizer, small_model("bert", 2))


def test_texts_that_are_unknown_to_the_tokenizer_are_named(caplog: pytest.LogCaptureFixture) -> None:
    predictor = Predictor(small_model("bert", 2), word_tokenizer(ends=True, pad_token="<pad>"), SST2)  # type: ignore[arg-type]
    predictor.logits({"sentence": ["w1 w2", "w1 \u6f22", ""]})
    assert "unknown to the tokenizer" not in caplog.text
    predictor.logits({"sentence": ["w1", "\u6f22\u5b57", "\u5b57 w1 \u6f22"]})
    assert "of 2 rows, more than half of the text is unknown to the tokenizer (<unk>)" in caplog.text
    assert "the first is row 1 " in caplog.text


def test_a_token_that_the_base_does_not_have_is_named() -> None:
    tokenizer, model = word_tokenizer(pad_token="<pad>"), small_model("gpt2", 2)
    tokenizer.add_tokens(["film"])
    predictor = Predictor(model, tokenizer, SST2)  # type: ignore[arg-type]
    assert predictor.logits({"sentence": ["w1", "w2"]}).shape == (2, 2), "it has it, but no text does"
    with pytest.raises(DataError, match=r"row 1 \(counting from 0\) has the token 'film' with id 100"):
        predictor.logits({"sentence": ["w1", "w2 film"]})


@pytest.mark.parametrize(("task", "texts"), [(SST2, ("w1 </s>",)), (MRPC, ("w1", "w2 </s>"))])
def test_an_end_token_in_a_text_is_refused_where_the_answer_is_read(task: Any, texts: tuple[str, ...]) -> None:
    tokenizer, model = word_tokenizer(ends=True, pad_token="<pad>"), small_model("t5", 2)
    columns = dict(zip(task.text_columns, ([text] for text in texts), strict=True))
    with pytest.raises(DataError, match=r"row 0 .* tokens with the id 2"):
        check_tokens(task, task.encode(columns, tokenizer, 60)["input_ids"], tokenizer, model)
    plain = {name: [text.replace("</s>", "") for text in column] for name, column in columns.items()}
    check_tokens(task, task.encode(plain, tokenizer, 60)["input_ids"], tokenizer, model)


def test_segments_are_left_out_where_the_base_has_one() -> None:
    names = ["input_ids", "token_type_ids", "attention_mask"]
    rows = {"sentence1": ["w1"], "sentence2": ["w2"]}
    for kind, reads in (("bert", True), ("roberta", False), ("distilbert", False), ("llama", False)):
        tokenizer = word_tokenizer(pad_token="<pad>", model_input_names=names)
        model = small_model(kind, 2, **({"type_vocab_size": 1} if kind == "roberta" else {}))
        predictor = Predictor(model, tokenizer, MRPC)  # type: ignore[arg-type]
        assert ("token_type_ids" in MRPC.encode(rows, tokenizer, 60)) == reads
        assert predictor.logits(rows).shape == (1, 2)


@pytest.mark.parametrize(
    "config",
    [
        {"num_attention_heads": 0},
        {"hidden_size": 10**12},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"attn_implementation": "someone/kernel"},
        [],
        None,
    ],
)
def test_a_config_that_fits_nothing_is_one_message(tmp_path: Path, config: Any) -> None:
    folder = base_folder(tmp_path / "base", "bert")
    values = json.loads((folder / "config.json").read_text())
    whole = "[" * 100_000 if config is None else json.dumps(values | config if isinstance(config, dict) else config)
    (folder / "config.json").write_text(whole)
    for init in ("pretrained", "random"):
        if init == "random" and {"quantization_config", "attn_implementation"} & set(config or {}):
            continue  # there is nothing to unpack, and transformers 5.20 looks for kernels only when it loads weights
        with pytest.raises(
            ModelError, match=r"base: (cannot be loaded: \S|config.json describes no model that can be built)"
        ):
            load_base(ModelConfig(name=str(folder), precision="fp32", init=init), SST2)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["classification", pytest.param("generation", marks=pytest.mark.full)])
def test_training_on_hostile_rows_and_settings(tmp_path: Path, kind: str) -> None:
    """Padding in front, no length, an empty and a long text: it trains. A token without an embedding: exit code 2."""
    base = tmp_path / "base"
    base.mkdir()
    for file in (BUNDLED_FOLDER / "tiny-gpt2").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "tokenizer_config.json").read_text()) | {"padding_side": "left"}
    del config["model_max_length"]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    texts = ["good film", "good " * 700, "bad <|endoftext|>", "" if kind == "classification" else "bad"]
    names = ("text", "label", ("pos", "neg")) if kind == "classification" else ("prompt", "completion", ("yes", "no"))
    rows = [{names[0]: text, names[1]: names[2][index // 2]} for index, text in enumerate(texts)]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    labels = ["task.label_names=[neg, pos]"] if kind == "classification" else []
    (tmp_path / "run.yaml").write_text(f"task: {{name: mine, kind: {kind}, data_dir: {tmp_path}, max_length: 1024}}\n")
    words = ["--config", tmp_path / "run.yaml", f"model.name={base}", "model.precision=fp32", *labels]
    words += ["train.max_steps=2", f"output.dir={tmp_path / 'out'}", "output.plots=false"]
    ask("train", *words)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["zyzzyva"])
    tokenizer.save_pretrained(base)
    (tmp_path / "validation.jsonl").write_text(json.dumps(rows[0] | {names[0]: "a zyzzyva"}) + "\n")
    refused = ask("train", *words, code=2).stderr
    assert "'zyzzyva'" in refused
    assert "Traceback" not in refused


def test_a_model_is_aligned_before_it_answers() -> None:
    """A decoder whose config names no padding token cannot read a batch by itself."""
    model = small_model("gpt2", 2, pad_token_id=None)
    with pytest.raises(ValueError, match="padding token"):
        model(torch.tensor([[5, 6], [7, 8]]))
    align_tokenizer(word_tokenizer(pad_token="<pad>"), model)
    assert model(torch.tensor([[5, 6], [7, 8]])).logits.shape == (2, 2)
