"""The generation tasks against real rows, the paper's own text files, and every original format written here."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from lora_hf.core.errors import DataError, HubError, ModelError, TrainingError
from lora_hf.core.labels import IGNORE_INDEX
from lora_hf.data.synthetic import RESTAURANT_ROWS
from lora_hf.data.tasks.generation import TextGeneration
from lora_hf.data.tasks.nlg import NLG
from lora_hf.data.tasks.registry import get_task, task_names
from tests.support.split_files import load, message, write, write_text

END = 50256  # GPT-2's <|endoftext|>: the separator and the end
SLOTS = "name, eatType, food, priceRange, customer rating, area, familyFriendly, near"

# The first validation row of each set: its context, its first reference, and how many it has.
FIRST_ROW = {
    "e2e_nlg": (
        "name : Alimentum | area : city centre | family friendly : no",
        "There is a place in the city centre, Alimentum, that is not family-friendly.",
        1,
    ),
    "dart": (
        "Mars Hill College : joined : 1973 | Mars Hill College : location : Mars Hill, North Carolina",
        "A school from Mars Hill, North Carolina, joined in 1973.",
        1,
    ),
    "web_nlg": ("Aarhus : leaderName : Jacob_Bundsgaard", "The leader of Aarhus is Jacob Bundsgaard.", 1),
}

# Of each split: rows, different contexts, references; PROVENANCE.md beside the data has the rows.
COUNTS = {
    ("e2e_nlg", "train"): (42061, 4862, 42061),
    ("e2e_nlg", "validation"): (4672, 547, 4672),
    ("e2e_nlg", "test"): (4693, 630, 4693),
    ("dart", "validation"): (2768, 2721, 6980),
    ("dart", "test"): (5097, 4159, 12551),
    ("web_nlg", "train"): (6940, 6888, 18025),
    ("web_nlg", "validation"): (872, 870, 2258),
    ("web_nlg", "test"): (1862, 1862, 4928),
}


def nlg_task(name: str) -> TextGeneration:
    return cast(TextGeneration, get_task(name))


def refused(name: str, prompt: str) -> str:
    with pytest.raises(DataError) as error:
        nlg_task(name).context(prompt)
    return str(error.value)


@pytest.fixture(scope="module")
def tokenizer(models_dir: Path) -> Any:
    from transformers import AutoTokenizer

    folder = models_dir / "gpt2-tokenizer"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: put GPT-2's tokenizer files there")
    return AutoTokenizer.from_pretrained(folder)


# --- real rows ---------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize(("name", "split"), COUNTS)
def test_real_rows(name: str, split: str, data_dir: Path) -> None:
    rows = load(name, data_dir, split)
    groups = nlg_task(name).groups(rows)
    references = sum(len(group.references) for group in groups)
    assert (len(rows), len(groups), references) == COUNTS[name, split]


@pytest.mark.full
@pytest.mark.parametrize(("split", "file"), [("validation", "valid"), ("test", "test")])
def test_every_e2e_context_is_the_papers(split: str, file: str, data_dir: Path) -> None:
    lines = (data_dir / "e2e_nlg" / "lora_form" / f"{file}.txt").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    task, rows = nlg_task("e2e_nlg"), load("e2e_nlg", data_dir, split)
    theirs = [line.split("||")[0] for line in lines]
    assert [example.context for example in task.examples(rows)] == theirs
    assert [task.context(meaning) for meaning in rows["meaning_representation"]] == theirs
    assert [group.context for group in task.groups(rows)] == list(dict.fromkeys(theirs))


@pytest.mark.parametrize(("split", "file"), [("validation", "dev"), ("test", "test")])
def test_e2e_groups_are_those_of_the_official_scorer(split: str, file: str, data_dir: Path) -> None:
    meanings, references = (data_dir / "e2e_eval" / f"{file}_{kind}.txt" for kind in ("mrs", "refs"))
    if not meanings.is_file():
        pytest.skip(f"no {meanings}")
    task = nlg_task("e2e_nlg")
    groups = task.groups(load("e2e_nlg", data_dir, split))
    assert [group.context for group in groups] == [
        task.context(line) for line in meanings.read_text(encoding="utf-8").splitlines()
    ]
    blocks = references.read_text(encoding="utf-8").strip("\n").split("\n\n")
    theirs = [tuple(" ".join(line.split()) for line in block.split("\n")) for block in blocks]
    assert [group.references for group in groups] == theirs


def test_web_nlg_subsets(data_dir: Path) -> None:
    rows = load("web_nlg", data_dir, "test")
    task = nlg_task("web_nlg")
    groups = task.groups(rows)
    assert task.subsets == ("seen", "unseen")
    assert [sum(group.subset == subset for group in groups) for subset in task.subsets] == [971, 891]
    assert [group.subset == "seen" for group in groups] == list(rows["seen_category"])


def test_dart_has_no_train_rows_here_and_says_so(data_dir: Path) -> None:
    if (data_dir / "dart" / "train.parquet").is_file():
        pytest.skip("DART's training rows are there")
    assert "splits found there: test, validation. Set task.data_dir=DIR" in message("dart", data_dir)


@pytest.mark.parametrize("name", FIRST_ROW)
def test_encodes_a_real_row(name: str, data_dir: Path, tokenizer: Any) -> None:
    task = nlg_task(name)
    rows = load(name, data_dir, "validation")[:1]
    context, reference, count = FIRST_ROW[name]
    encoded = task.encode(rows, tokenizer, max_length=512)

    asked = [*tokenizer(context)["input_ids"], END]
    answer = [*tokenizer(" " + reference)["input_ids"], END]
    assert encoded["input_ids"][0] == asked + answer
    assert encoded["attention_mask"][0] == [1] * len(asked + answer)
    assert encoded["labels"][0] == [IGNORE_INDEX] * len(asked) + answer
    assert [len(column) for column in encoded.values()] == [count] * 4
    (prompt,) = task.prompts([context], tokenizer, max_length=512)
    assert prompt == asked  # training and generation read the same tokens
    assert tokenizer.decode(encoded["input_ids"][0]) == f"{context}<|endoftext|> {reference}<|endoftext|>"


def test_every_reference_is_a_training_row(data_dir: Path, tokenizer: Any) -> None:
    rows = load("dart", data_dir, "validation")
    rows = rows.select(range(len(rows) - 200, len(rows)))
    task = nlg_task("dart")
    encoded = rows.map(lambda batch: task.encode(batch, tokenizer, 512), batched=True, remove_columns=rows.column_names)
    references = [reference for annotations in rows["annotations"] for reference in annotations]
    assert len(encoded) == len(references) > len(rows)
    assert sorted(encoded.column_names) == ["attention_mask", "input_ids", "labels", "truncated"]
    answers = [[token for token in labels if token != IGNORE_INDEX] for labels in encoded["labels"]]
    assert [tokenizer.decode(answer[:-1]) for answer in answers] == [f" {each['text']}" for each in references]
    assert all(answer[-1] == END for answer in answers)


@pytest.mark.full
def test_real_rows_are_shorter_than_the_papers_512_tokens(
    data_dir: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for name in FIRST_ROW:
        rows = load(name, data_dir, "validation")
        caplog.clear()
        assert nlg_task(name).encode(rows[:], tokenizer, 512)["input_ids"]
        assert not caplog.messages


# --- contexts from a person's line -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "context"),
    [
        (
            "name[The Vaults], eatType[pub], priceRange[more than £30], customer rating[low], near[Café Adriatic]",
            "name : The Vaults | Type : pub | price : more than £ 30 | customer rating : low | near : Café Adriatic",
        ),
        ("priceRange[£20-25],familyFriendly[yes]", "price : £ 20 - 25 | family friendly : yes"),
        (" name [ Bob's, 24-7 ] , food[Fast food]\n", "name : Bob's, 24 - 7 | food : Fast food"),
    ],
)
def test_a_meaning_representation_becomes_the_context(prompt: str, context: str) -> None:
    assert nlg_task("e2e_nlg").context(prompt) == context
    assert nlg_task("rule-restaurants").context(prompt) == context


@pytest.mark.parametrize(
    ("prompt", "position", "expected", "found"),
    [
        ("", 0, "slot[value], such as name[The Vaults]", "the end"),
        ("The Vaults", 0, "slot[value], such as name[The Vaults]", "'The Vaults'"),
        ("name[The Vaults", 0, "slot[value], such as name[The Vaults]", "'name[The Vaults'"),
        ("name[A], ", 8, "slot[value], such as name[The Vaults]", "the end"),
        ("name[A] food[B]", 8, "a comma before the next slot, or the end", "'food[B]'"),
        ("name[A]]", 7, "a comma before the next slot, or the end", "']'"),
        ("name[A], near[ ]", 14, "a value of near", "' ]'"),
        ("name[A], pricerange[high]", 9, f"one of {SLOTS} (did you mean 'priceRange'?)", "'pricerange[high]'"),
        ("name[A], [high]", 8, "slot[value], such as name[The Vaults]", "' [high]'"),
    ],
)
def test_a_meaning_representation_that_does_not_parse(prompt: str, position: int, expected: str, found: str) -> None:
    assert refused("e2e_nlg", prompt) == (
        f"e2e_nlg: {prompt!r} does not parse at position {position} (counting from 0): expected {expected}, "
        f"found {found}"
    )


def test_triples_become_the_context() -> None:
    prompt = "Mars Hill College : JOINED : 1973 | A : Score : 2-10 : 0-14"
    assert nlg_task("dart").context(prompt) == "Mars Hill College : joined : 1973 | A : score : 2-10 : 0-14"
    assert nlg_task("web_nlg").context(prompt) == prompt


@pytest.mark.parametrize(
    ("prompt", "position", "found"),
    [("", 0, ""), ("a : b : c | d : e", 12, "d : e"), ("a | b | c", 0, "a"), ("a : b : ", 0, "a : b : ")],
)
def test_triples_that_do_not_parse(prompt: str, position: int, found: str) -> None:
    assert refused("web_nlg", prompt) == (
        f"web_nlg: {prompt!r} does not parse at position {position} (counting from 0): expected "
        f"'subject : relation : object', and ' | ' before the next, found {found!r}"
    )


# --- lengths and tokenizers --------------------------------------------------------------------------------------

ROW = {"meaning_representation": ["name[The Vaults], eatType[pub]"], "human_reference": ["A  fine\npub. "]}


def test_a_long_row_loses_the_first_of_its_input_and_never_its_end(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    task = nlg_task("e2e_nlg")
    (whole,), (labels,) = (task.encode(ROW, tokenizer, 64)[column] for column in ("input_ids", "labels"))
    answer = [token for token in labels if token != IGNORE_INDEX]
    assert tokenizer.decode(answer) == " A fine pub.<|endoftext|>"

    shortest = len(answer) + 2
    encoded = task.encode(ROW, tokenizer, shortest)
    assert encoded["input_ids"] == [whole[-shortest:]]
    assert encoded["labels"] == [[IGNORE_INDEX, IGNORE_INDEX, *answer]]
    task.warn_truncated(task.encode(ROW, tokenizer, 64)["truncated"], tokenizer, 64)
    assert not caplog.messages
    task.warn_truncated(encoded["truncated"], tokenizer, shortest)
    (message,) = caplog.messages
    assert message.startswith(
        f"e2e_nlg: truncated 1 of 1 rows, which are longer than {shortest} tokens (task.max_length"
    )
    assert "the start of their prompts" in message
    with pytest.raises(DataError) as error:
        task.encode(ROW, tokenizer, shortest - 1)
    assert f"a reference of {len(answer)} tokens" in str(error.value)
    assert f"within {shortest - 1} tokens (task.max_length" in str(error.value)


def test_a_prompt_longer_than_the_model_reads(tokenizer: Any) -> None:
    task = nlg_task("e2e_nlg")
    contexts = ["name : A", "name : " + "A" * 100]
    lengths = [len(prompt) for prompt in task.prompts(contexts, tokenizer, 512)]
    with pytest.raises(DataError) as error:
        task.prompts(contexts, tokenizer, lengths[0])
    assert str(error.value).startswith(
        f"e2e_nlg: prompt 1 (counting from 0) has {lengths[1]} tokens, special ones included; the model reads at most "
        f"{lengths[0]} before it answers: 'name : AAAA"
    )
    assert task.prompts([], tokenizer, 4) == []


def test_another_tokenizer_gives_its_own_end_and_adds_nothing(models_dir: Path) -> None:
    from transformers import AutoTokenizer

    if not (models_dir / "llama-stories260k").is_dir():
        pytest.skip("no llama-stories260k tokenizer")
    other = AutoTokenizer.from_pretrained(models_dir / "llama-stories260k")
    (ids,) = nlg_task("e2e_nlg").encode(ROW, other, 64)["input_ids"]
    assert ids.count(other.eos_token_id) == 2
    assert ids[-1] == other.eos_token_id
    assert other.bos_token_id not in ids or other.bos_token_id == other.eos_token_id


def test_a_tokenizer_without_an_end_is_refused() -> None:
    class Endless:
        name_or_path, eos_token_id = "endless", None

    with pytest.raises(ModelError, match="the tokenizer 'endless' has no end-of-text token"):
        nlg_task("e2e_nlg").encode(ROW, cast(Any, Endless()), 64)


# --- the bundled rows, groups and scores ------------------------------------------------------------------------


@pytest.mark.parametrize("split", RESTAURANT_ROWS)
def test_the_bundled_restaurants(split: str) -> None:
    task = nlg_task("rule-restaurants")
    rows = load("rule-restaurants", None, split)
    groups = task.groups(rows)
    each = 2 if split == "train" else 5
    assert (len(rows), len(groups)) == (RESTAURANT_ROWS[split], RESTAURANT_ROWS[split] // each)
    assert {len(group.references) for group in groups} == {each}


def test_the_same_input_on_distant_rows_is_one_group() -> None:
    rows = {"meaning_representation": ["name[A]", "name[B]", "name[A]"], "human_reference": ["1", "2", "3"]}
    groups = nlg_task("e2e_nlg").groups(rows)
    assert [(group.context, group.references) for group in groups] == [("name : A", ("1", "3")), ("name : B", ("2",))]


def test_perplexity_is_over_tokens_not_rows() -> None:
    rows: Any = None
    assert nlg_task("dart").score_rows(np.array([[6.0, 2.0], [2.0, 6.0]]), rows) == {"perplexity": math.e}
    with pytest.raises(TrainingError, match="dart: the likelihoods of 1 of 2 rows are not finite, the first is row 1 "):
        nlg_task("dart").score_rows(np.array([[1.0, 2.0], [np.nan, 6.0]]), rows)
    with pytest.raises(TrainingError, match="1000 nats"):
        nlg_task("dart").score_rows(np.array([[2000.0, 2.0]]), rows)


def test_the_table() -> None:
    assert [task.name for task in NLG] == ["e2e_nlg", "dart", "web_nlg"]
    assert task_names()[8:] == ("e2e_nlg", "dart", "web_nlg", "rule-sentiment", "rule-restaurants")
    for name in ("e2e_nlg", "dart", "web_nlg", "rule-restaurants"):
        task = nlg_task(name)
        assert (task.model_kind, task.best_metric, task.greater_is_better) == ("causal-lm", "perplexity", False)
        assert (task.splits, task.label_names, task.problem_type) == (("train", "validation"), (), None)


# --- original files ----------------------------------------------------------------------------------------------

CSV = 'mr,ref\r\n"name[A, B], food[Indian]","Said ""yes"",\nto A, B."\r\nname[C],See C.\r\n'
E2E_ROWS = {
    "meaning_representation": ["name[A, B], food[Indian]", "name[C]"],
    "human_reference": ['Said "yes",\nto A, B.', "See C."],
}
ENTRY = {"tripleset": [["A", "IS", "b"]], "annotations": [{"source": "x", "text": "A is b."}]}
XML = """<?xml version="1.0" encoding="UTF-8"?>
<benchmark>
  <entries>
    <entry category="{category}" eid="Id1" size="2">
      <originaltripleset>
        <otriple>{subject} | city | "B"@en</otriple>
      </originaltripleset>
      <modifiedtripleset>
        <mtriple>{subject} | city | B</mtriple>
        <mtriple>B | leader | C &amp; D</mtriple>
      </modifiedtripleset>
      <lex comment="good" lid="Id1">One.</lex>
      <lex comment="toFix" lid="Id2">Two.</lex>
      <lex comment="good" lid="Id3">Three.</lex>
    </entry>
  </entries>
</benchmark>
"""


@pytest.mark.parametrize("folder", ["e2e-dataset/", "e2e_nlg/", ""])
def test_e2e_csv(folder: str, tmp_path: Path) -> None:
    for file in ("trainset", "devset", "testset_w_refs"):
        write_text(tmp_path / f"{folder}{file}.csv", CSV)
    for split in ("train", "validation", "test"):
        rows = load("e2e_nlg", tmp_path, split)
        assert rows[:] == E2E_ROWS
        assert [group.references for group in nlg_task("e2e_nlg").groups(rows)] == [
            ('Said "yes", to A, B.',),
            ("See C.",),
        ]


@pytest.mark.full
def test_e2e_csv_rows_are_the_parquet_rows(tmp_path: Path, data_dir: Path) -> None:
    import csv

    rows = load("e2e_nlg", data_dir, "train")
    with (tmp_path / "trainset.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("mr", "ref"))
        writer.writerows(zip(rows["meaning_representation"], rows["human_reference"], strict=True))
    assert load("e2e_nlg", tmp_path)[:] == rows[:]


@pytest.mark.parametrize("folder", ["dart/", "dart/data/v1.1.1/", ""])
def test_dart_json(folder: str, tmp_path: Path) -> None:
    for part in ("train", "dev", "test"):
        second = {"tripleset": [["A", "B c", "d"], ["d", "E", "f"]], "subtree_was_extended": True}
        second["annotations"] = [{"source": "x", "text": text} for text in ("One.", None, "  ", "Two.")]
        write_text(tmp_path / f"{folder}dart-v1.1.1-full-{part}.json", json.dumps([ENTRY, second]))
    for split in ("train", "validation", "test"):
        groups = nlg_task("dart").groups(load("dart", tmp_path, split))
        assert [(group.context, group.references) for group in groups] == [
            ("A : is : b", ("A is b.",)),
            ("A : b c : d | d : e : f", ("One.", "Two.")),
        ]


@pytest.mark.parametrize("folder", ["webnlg_challenge_2017", "web_nlg"])
def test_web_nlg_xml(folder: str, tmp_path: Path) -> None:
    root = tmp_path / folder
    write_text(root / "train/2triples/2triples_City_train.xml", XML.format(category="City", subject="Y"))
    write_text(root / "train/1triples/1triple_Food_train.xml", XML.format(category="Food", subject="X"))
    write_text(root / "dev/1triples/1triple_Food_dev.xml", XML.format(category="Food", subject="Z"))
    write_text(root / "test/testdata_with_lex.xml", XML.format(category="Artist", subject="Ü"))
    write_text(root / "test/testdata_no_lex.xml", XML.format(category="Artist", subject="V"))
    found = {}
    for split in ("train", "validation", "test"):
        groups = nlg_task("web_nlg").groups(load("web_nlg", tmp_path, split))
        found[split] = [(group.context.split(" : ")[0], group.subset) for group in groups]
    assert found == {
        "train": [("X", "seen"), ("Y", "seen")],
        "validation": [("Z", "seen")],
        "test": [("Ü", "unseen")],
    }
    (group,) = nlg_task("web_nlg").groups(load("web_nlg", tmp_path, "validation"))
    assert group.context == "Z : city : B | B : leader : C & D"
    assert group.references == ("One.", "Three.")  # not what was to be fixed


# --- the hub's layouts -------------------------------------------------------------------------------------------


def test_the_hubs_columns_of_dart(tmp_path: Path) -> None:
    columns = {"tripleset": [ENTRY["tripleset"]], "subtree_was_extended": [None]}
    columns["annotations"] = [{"source": ["x", "x"], "text": ["One.", "Two."]}]
    write(tmp_path / "dart/train.parquet", columns)
    (group,) = nlg_task("dart").groups(load("dart", tmp_path))
    assert (group.context, group.references) == ("A : is : b", ("One.", "Two."))


@pytest.mark.parametrize("structs", [True, False])
def test_the_hubs_columns_of_web_nlg(structs: bool, tmp_path: Path) -> None:
    triples, lex = {"mtriple_set": [["A | is | b"]]}, {"comment": ["good"], "lid": ["Id1"], "text": ["One."]}
    if structs:
        triples = [{"mtriple_set": ["A | is | b"]}]
        lex = [{"comment": "good", "lid": "Id1", "text": "One."}]
    kinds = ["testdata_no_lex", "testdata_unseen_with_lex", "testdata_with_lex", ""]
    columns = {
        "category": ["Food"] * 4,
        "modified_triple_sets": [triples] * 4,
        "lex": [lex] * 4,
        "test_category": kinds,
    }
    write(tmp_path / "web_nlg/test.parquet", columns)
    rows = load("web_nlg", tmp_path, "test")
    assert len(rows) == 2  # each entry once
    (group,) = nlg_task("web_nlg").groups(rows)
    assert (group.context, group.references, group.subset) == ("A : is : b", ("One.", "One."), "seen")


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("e2e_nlg", ("tuetschek/e2e_nlg", None, None)),
        ("dart", ("Yale-LILY/dart", None, None)),
        ("web_nlg", ("webnlg-challenge/web_nlg", None, "webnlg_challenge_2017")),
    ],
)
def test_the_hub_is_asked_for_its_converted_branch(
    name: str, called: tuple, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    from lora_hf.data.tasks import sources

    here = load(name, data_dir, "validation")
    calls = []

    def load_dataset(*arguments: str | None, **options: str | None) -> Any:
        calls.append((*arguments, options.pop("data_dir")))
        assert options == {"split": "validation", "revision": "refs/convert/parquet"}
        return here

    monkeypatch.setattr(sources, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load(name, None, "validation")[:] == here[:]
    assert calls == [called]


def test_out_of_reach_of_the_hub() -> None:
    with pytest.raises(HubError) as error:
        load("web_nlg", None)
    found = str(error.value)
    assert found.startswith("webnlg-challenge/web_nlg webnlg_challenge_2017, split 'train': the hub (")
    assert "DIR/web_nlg/train.parquet or DIR/webnlg_challenge_2017/train;" in found


# --- errors ------------------------------------------------------------------------------------------------------

# What `check_text` refuses, `test_sources` shows for all tasks.
WRONG_ROWS = {
    "null text": (
        "e2e_nlg",
        {"meaning_representation": ["name[A]", "name[B]"], "human_reference": ["a", None]},
        ": 1 of 2 rows have a wrong 'human_reference', the first is row 1 (counting from 0): None; expected text",
    ),
    "does not parse": (
        "e2e_nlg",
        {"meaning_representation": ["name[A]", "name(B)"], "human_reference": ["a", "b"]},
        (
            ": row 1 (counting from 0): 'name(B)' does not parse at position 0 (counting from 0): expected "
            "slot[value], such as name[The Vaults], found 'name(B)'"
        ),
    ),
    "no text at all": (
        "e2e_nlg",
        {"meaning_representation": ["name[A]"], "human_reference": [" "]},
        ": none of the 1 rows has a reference text",
    ),
    "dart column": (
        "dart",
        {"triples": [[["a", "b", "c"]]], "annotations": [[{"source": "x", "text": "a"}]]},
        ": no column 'tripleset' (did you mean 'triples'?); found: triples, annotations",
    ),
    "two of three": (
        "dart",
        {"tripleset": [[["a", "b"]]], "annotations": [[{"source": "x", "text": "a"}]]},
        (
            ": row 0 (counting from 0): expected 'tripleset' as lists of subject, relation and object, found "
            "[['a', 'b']]"
        ),
    ),
    "null triples": (
        "dart",
        {"tripleset": [None, [["a", "b", "c"]]], "annotations": [[{"source": "x", "text": "a"}]] * 2},
        ": row 0 (counting from 0): expected 'tripleset' as lists of subject, relation and object, found None",
    ),
    "no texts": (
        "dart",
        {"tripleset": [[["a", "b", "c"]]], "annotations": [[{"source": "x"}]]},
        ": row 0 (counting from 0): expected 'annotations' with a 'text' each, found [{'source': 'x'}]",
    ),
    "web_nlg column": (
        "web_nlg",
        {"category": ["Food"], "modified_triple_set": [["a | b | c"]], "lex_comment": [["good"]]},
        ": no column 'lex_text' (did you mean 'lex_comment'?); found: category, modified_triple_set, lex_comment",
    ),
    "no triple": (
        "web_nlg",
        {"category": ["Food"], "modified_triple_set": [["a | b"]], "lex_comment": [["good"]], "lex_text": [["A."]]},
        (": row 0 (counting from 0): expected 'modified_triple_set' of 'subject | relation | object', found ['a | b']"),
    ),
    "comments and texts": (
        "web_nlg",
        {"category": ["Food"], "modified_triple_set": [["a | b | c"]], "lex_comment": [[]], "lex_text": [["A."]]},
        ": row 0 (counting from 0): expected as many entries of 'lex_comment' as of 'lex_text'",
    ),
}


@pytest.mark.parametrize("case", WRONG_ROWS)
def test_wrong_rows(case: str, tmp_path: Path) -> None:
    name, columns, expected = WRONG_ROWS[case]
    path = write(tmp_path / name / "train.parquet", columns)
    assert message(name, tmp_path) == f"{path}{expected}"


def test_rows_without_a_text_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    columns = {"meaning_representation": ["name[A]", "name[B]"], "human_reference": ["a", ""]}
    path = write(tmp_path / "e2e_nlg/train.parquet", columns)
    with caplog.at_level(logging.WARNING):
        groups = nlg_task("e2e_nlg").groups(load("e2e_nlg", tmp_path))
    assert [group.context for group in groups] == ["name : A"]
    assert caplog.messages == [f"{path}: left out 1 of 2 rows without a reference text"]


# `test_custom` has the other errors of CSV files.
WRONG_FILES = {
    "column": ("e2e_nlg", "trainset.csv", "mr,reference\na,b\n", ": no column 'ref' (did you mean"),
    "open quote": (
        "e2e_nlg",
        "trainset.csv",
        'mr,ref\nname[A],"A.\n',
        " cannot be read as CSV: line 2: unexpected end",
    ),
    "no json": ("dart", "dart-v1.1.1-full-train.json", "[{", " cannot be read as JSON: "),
    "json form": ("dart", "dart-v1.1.1-full-train.json", "{}", ": expected a list of entries, each with 'tripleset'"),
    "json key": (
        "dart",
        "dart-v1.1.1-full-train.json",
        '[{"tripleset": [], "annotation": []}]',
        ": entry 0 (counting from 0): no column 'annotations' (did you mean 'annotation'?); found: tripleset, annot",
    ),
    "json type": (
        "dart",
        "dart-v1.1.1-full-train.json",
        '[{"tripleset": 7, "annotations": []}]',
        ": the entries do not have the types of the data set: ",
    ),
    "no xml": ("web_nlg", "web_nlg/train/a.xml", "<benchmark>", " cannot be read as XML: "),
    "no entry": ("web_nlg", "web_nlg/train/a.xml", "<benchmark/>", ": no <entry>; expected the form of the WebNLG"),
    "no triples": (
        "web_nlg",
        "web_nlg/train/a.xml",
        '<benchmark><entry eid="Id7" category="Food"/></benchmark>',
        ": the entry with eid='Id7' has no element <modifiedtripleset>",
    ),
    "no category": (
        "web_nlg",
        "web_nlg/train/a.xml",
        '<benchmark><entry eid="Id7"/></benchmark>',
        ": the entry with eid='Id7' has no attribute 'category'",
    ),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_original_files(case: str, tmp_path: Path) -> None:
    name, file, text, expected = WRONG_FILES[case]
    path = write_text(tmp_path / file, text)
    assert message(name, tmp_path).startswith(f"{path}{expected}")


def test_a_folder_without_xml(tmp_path: Path) -> None:
    (tmp_path / "web_nlg/train").mkdir(parents=True)
    assert message("web_nlg", tmp_path) == (
        f"{tmp_path / 'web_nlg/train'}: no .xml file in this folder; expected the challenge's, such as 1triples/*.xml"
    )


def test_a_missing_split_names_where_it_looked(tmp_path: Path) -> None:
    write_text(tmp_path / "devset.csv", CSV)
    found = message("e2e_nlg", tmp_path)
    assert "e2e_nlg/train.parquet" in found
    assert "e2e-dataset/trainset.csv, e2e_nlg/trainset.csv, trainset.csv; splits found there: validation." in found
