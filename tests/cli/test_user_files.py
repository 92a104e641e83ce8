"""The verbs on users' files: as many answers as rows, and everything that a model does not read is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_hf.data.readers import TABLE_SUFFIXES
from tests.data.test_user_files import TEXTS, write_rows
from tests.support.command_lines import ask, last_json
from tests.support.split_files import write_text

CODE = "def f(x):\n    if x:\n        return 1\n    return 0"


def train(folder: Path, rows: list[dict[str, str]], *words: str, code: int = 0, base: str = "tiny-roberta") -> Any:
    for split in ("train", "validation"):
        write_rows(folder / f"{split}.jsonl", rows)
    config = write_text(folder / "config.yaml", f"model: {{name: {base}, precision: fp32}}\n")
    settings = ["task.name=mine", f"task.data_dir={folder}", "train.max_steps=1"]
    settings += ["train.warmup_ratio=0", f"output.dir={folder}", "output.plots=false"]
    return ask("train", "--config", config, *settings, "output.name=run", *words, code=code)


def rows_of(label_of: tuple[str, ...] = ("neg", "pos")) -> list[dict[str, str]]:
    return [{"title": f"film {n}", "team": label_of[n % len(label_of)]} for n in range(8)]


CLASSES = (
    "task.kind=classification",
    "task.text_columns=title",
    "task.label_column=team",
    "task.label_names=[neg, pos]",
)
TEXT = ("task.kind=generation", "task.text_columns=question", "task.label_column=answer", "generate.max_new_tokens=4")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    train(folder, rows_of(), *CLASSES, "task.max_length=16")
    return folder / "run" / "adapter"


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("writer")
    train(folder, [{"question": f"what is {n}", "answer": CODE} for n in range(4)], *TEXT, base="tiny-gpt2")
    return folder / "run" / "adapter"


def answers(done: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.removesuffix("\n").split("\n")]


@pytest.mark.parametrize("suffix", TABLE_SUFFIXES)
def test_predict_answers_each_row(classifier: Path, suffix: str, tmp_path: Path) -> None:
    texts = [text for name, text in TEXTS.items() if name != "a million characters"]
    path = write_rows(tmp_path / f"rows{suffix}", [{"n": str(n), "title": text} for n, text in enumerate(texts)])
    found = answers(ask("predict", "--adapter", classifier, "--input", path))
    assert [row["title"] for row in found] == texts
    assert found[0] == answers(ask("predict", "--adapter", classifier, "--text", texts[0]))[0]


def test_predict_answers_each_line(classifier: Path, tmp_path: Path) -> None:
    path = write_text(tmp_path / "rows.txt", "one\u2028two\nthree\x85four\nfive\x1csix\n")
    assert len(answers(ask("predict", "--adapter", classifier, "--input", path))) == 3


@pytest.mark.parametrize(
    ("verb", "column", "suffix"), [("predict", "title", ".csv"), ("generate", "question", ".parquet")]
)
def test_another_column_is_refused(
    verb: str, column: str, suffix: str, classifier: Path, writer: Path, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / f"rows{suffix}", [{"sentence": "a"}])
    adapter = classifier if verb == "predict" else writer
    done = ask(verb, "--adapter", adapter, "--input", path, code=2)
    assert f"{path}: no column {column!r}; found: sentence" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("suffix", TABLE_SUFFIXES)
def test_eval_reads_each_format(classifier: Path, suffix: str, tmp_path: Path) -> None:
    write_rows(tmp_path / f"validation{suffix}", rows_of())
    done = ask("eval", "--adapter", classifier, "--data-dir", tmp_path, "--json")
    assert 0 <= last_json(done)["metrics"]["validation"]["accuracy"] <= 1


def test_truncated_rows_are_counted(classifier: Path, tmp_path: Path) -> None:
    long = {"title": "word " * 50 + "good", "team": "pos"}
    path = write_rows(tmp_path / "validation.csv", [*rows_of(), long, long])
    done = ask("predict", "--adapter", classifier, "--input", path)
    assert len(answers(done)) == 10
    evaluated = ask("eval", "--adapter", classifier, "--data-dir", tmp_path)
    trained = train(tmp_path / "again", [*rows_of(), long, long], *CLASSES, "task.max_length=16")
    for each in (done, evaluated, trained):
        assert "truncated 2 of 10 rows, which are longer than 16 tokens" in each.stderr
        assert "the end of their texts" in each.stderr
        assert "row 8 (counting from 0)" in each.stderr
    assert "mine, train: truncated" in trained.stderr
    assert "mine, validation: truncated" in trained.stderr
    exact = write_text(tmp_path / "exact.txt", "a " * 14 + "\n")  # and the two special tokens
    assert "truncated" not in ask("predict", "--adapter", classifier, "--input", exact).stderr


def test_truncated_prompts_are_counted(tmp_path: Path) -> None:
    rows = [{"question": "word " * 50, "answer": "yes"}, {"question": "short", "answer": "no"}]
    done = train(tmp_path, rows, *TEXT, "task.max_length=16", base="tiny-gpt2")
    assert "truncated 1 of 2 rows" in done.stderr
    assert "the start of their prompts" in done.stderr


def test_classes_without_and_with_few_training_rows(tmp_path: Path) -> None:
    rows = [*rows_of() * 10, {"title": "so so", "team": "rare"}]
    write_rows(tmp_path / "validation.csv", [{"title": "a", "team": "absent"}, *rows_of()])
    write_rows(tmp_path / "train.csv", rows)
    config = write_text(tmp_path / "config.yaml", "model: {name: tiny-roberta, precision: fp32}\n")
    words = [*CLASSES[:3], "task.label_names=[neg, pos, rare, absent]", "task.name=mine", f"task.data_dir={tmp_path}"]
    done = ask("train", "--config", config, *words, "train.max_steps=1", f"output.dir={tmp_path}", "output.plots=false")
    assert "no row of train has the class 'absent', validation has 1" in done.stderr
    assert "only 1 of 81 rows of train have the class 'rare', validation has 0" in done.stderr
    assert "rows of train have the class 'neg'" not in done.stderr
    assert "the classes are skewed: 40 training rows have 'neg', and 1 have 'rare'" in done.stderr
    assert "never predicts" in done.stderr


def test_generate_reads_the_tasks_column_and_keeps_lines(writer: Path, tmp_path: Path) -> None:
    rows = [{"question": "what is\n1"}, {"question": "what is 2"}]
    for suffix in TABLE_SUFFIXES:
        path = write_rows(tmp_path / f"rows{suffix}", rows)
        done = ask("generate", "--adapter", writer, "--input", path, "--json")
        assert [text["prompt"] for text in last_json(done)["texts"]] == ["what is\n1", "what is 2"]
    path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["question"]} for row in rows])
    assert len(last_json(ask("generate", "--adapter", writer, "--input", path, "--json"))["texts"]) == 2


def test_texts_of_several_lines(writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_hf.inference.generate import GeneratedText, Generator

    monkeypatch.setattr(
        Generator, "generate", lambda self, contexts, _: iter([GeneratedText(CODE, -1.0)] * len(contexts))
    )
    path = write_text(tmp_path / "rows.txt", "a\nb\n")
    assert ask("generate", "--adapter", writer, "--prompt", "a").stdout == f"{CODE}\n"
    done = ask("generate", "--adapter", writer, "--input", path)
    assert len(done.stdout.splitlines()) == 2
    assert "--json" in done.stderr
    done = ask("generate", "--adapter", writer, "--input", path, "--output", tmp_path / "out.txt")
    assert str(tmp_path / "out.jsonl") in done.stderr
    assert (tmp_path / "out.txt").read_text().count("\n") == 2
    written = [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written == [CODE, CODE]


def test_generate_never_replaces_its_prompts(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "what is 1"}])
    before = path.read_bytes()
    words = ["--input", path, "--output", tmp_path / "a.txt"]
    told = ask("generate", "--adapter", tmp_path / "nowhere", *words, code=2).stderr  # before anything is loaded
    assert f"--output {tmp_path / 'a.txt'}" in told
    assert f"{path}, which is written too, is the --input file" in told
    assert path.read_bytes() == before


def test_score_reads_the_texts_of_a_table(tmp_path: Path) -> None:
    references = write_text(tmp_path / "refs.txt", "The Vaults is a pub.\n\nThe Mill is cheap.\n")
    texts = [{"prompt": "x", "text": "The Vaults is\na pub."}, {"prompt": "y", "text": "The Mill is cheap."}]
    words = ["--task", "rouge_bleu", "--references", references, "--json"]
    for suffix in TABLE_SUFFIXES:
        path = write_rows(tmp_path / f"out{suffix}", texts)
        assert last_json(ask("score", "--predictions", path, *words))["scores"]["BLEU"] == pytest.approx(1)
    refused = ask("score", "--predictions", references, "--task", "rouge_bleu", "--references", path, code=2)
    assert "expected references as lines of text" in refused.stderr


@pytest.fixture
def diverged(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The adapter with weights that are finite, and whose outputs are not."""
    source: Path = request.getfixturevalue(request.param)
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    for file in (*source.iterdir(), source.parent / "config.yaml"):
        (folder / file.name).write_bytes(file.read_bytes())
    weights = folder / "adapter_model.safetensors"
    with safe_open(weights, "pt") as opened:
        metadata = opened.metadata()
    tensors = {
        name: tensor.sign() * 1e30 if "lora_B" in name else tensor for name, tensor in load_file(weights).items()
    }
    save_file(tensors, weights, metadata=metadata)
    return folder


@pytest.mark.parametrize("diverged", ["classifier"], indirect=True)
def test_classifier_outputs_that_are_not_finite(diverged: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "validation.csv", rows_of())
    rows = write_rows(tmp_path / "rows.jsonl", [{"adapter": "a", "title": "x"}, {"adapter": "b", "title": "x"}])
    for verb, words in (
        ("predict", ["--adapter", diverged, "--text", "a film", "--json"]),
        ("predict", ["--adapter", f"a={diverged}", "--adapter", f"b={diverged}", "--input", rows]),
        ("eval", ["--adapter", diverged, "--data-dir", tmp_path, "--json"]),
    ):
        done = ask(verb, *words, code=2)
        assert "are not finite" in done.stderr
        assert done.stdout == ""


@pytest.mark.parametrize("diverged", ["writer"], indirect=True)
@pytest.mark.parametrize("words", [[], ["--num-beams", "2"], ["--temperature", "0.7"], ["--no-repeat-ngram-size", "2"]])
def test_generator_outputs_that_are_not_finite(diverged: Path, words: list[str]) -> None:
    done = ask("generate", "--adapter", diverged, "--prompt", "what", "--json", *words, code=2)
    assert "not finite" in done.stderr
    assert done.stdout == ""
