"""Where rows come from, and every way they can be wrong. The files are written here; conftest cuts the network."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pyarrow
import pytest
from huggingface_hub import constants
from pyarrow import parquet

from lora_hf.core.errors import HubError
from lora_hf.core.hub_access import hub_is_reachable
from lora_hf.data.tasks.registry import get_task
from lora_hf.data.tasks.sources import DATA_DIR_VARIABLE
from tests.support.split_files import columns, message, write, write_text

ROWS = {"sentence": ["a fine film", "a dull film"], "label": [1, 0], "idx": [0, 1]}


# --- local layouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["glue/sst2", "sst2"])
@pytest.mark.parametrize("file", ["train.parquet", "train-00000-of-00001.parquet"])
def test_parquet_layouts(tmp_path: Path, folder: str, file: str) -> None:
    write(tmp_path / folder / file, ROWS)
    before = sorted(tmp_path.rglob("*"))
    assert columns("sst2", tmp_path) == ROWS
    assert sorted(tmp_path.rglob("*")) == before


def test_the_environment_names_the_folder_and_the_config_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a/sst2/train.parquet", ROWS)
    write(tmp_path / "b/sst2/train.parquet", {**ROWS, "label": [0, 0]})
    monkeypatch.setenv(DATA_DIR_VARIABLE, str(tmp_path / "a"))
    assert columns("sst2", None)["label"] == [1, 0]
    assert columns("sst2", tmp_path / "b")["label"] == [0, 0]
    monkeypatch.setenv(DATA_DIR_VARIABLE, str(tmp_path / "c"))
    assert message("sst2", None).startswith(f"{DATA_DIR_VARIABLE}={tmp_path / 'c'} is not a folder. Set task.data_dir=")


# Each task's original training file, as its authors wrote it, and the rows the hub made of it.
ORIGINALS = {
    "cola": (
        "CoLA/train.tsv",
        'gj04\t1\t\tShe said "no.\ngj04\t0\t*\tHim left.\n',
        {"sentence": ['She said "no.', "Him left."], "label": [1, 0]},
    ),
    "sst2": (
        "SST-2/train.tsv",
        "sentence\tlabel\na fine film \t1\nso dull \t0\n",
        {"sentence": ["a fine film ", "so dull "], "label": [1, 0]},
    ),
    "mrpc": (
        "MRPC/train.tsv",
        ('\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\t" Yes , " he said\tHe agreed\r\n'),
        {"sentence1": ['" Yes , " he said'], "sentence2": ["He agreed"], "label": [1]},
    ),
    "qqp": (
        "QQP/train.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n5\t1\t2\tWhy?\tHow?\t0\n",
        {"question1": ["Why?"], "question2": ["How?"], "label": [0]},
    ),
    "stsb": (
        "STS-B/train.tsv",
        (
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
            "0\tnews\tf\t2012\t1\tnone\tnone\tA plane.\tA jet.\t3.5\n"
        ),
        {"sentence1": ["A plane."], "sentence2": ["A jet."], "label": [3.5]},
    ),
    "mnli": (
        "MNLI/train.tsv",
        (
            "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
            "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
            "0\t1\t1n\tfiction\t(b)\t(b)\t(p)\t(p)\tIt rains.\tIt is wet.\tentailment\tneutral\n"
        ),
        {"premise": ["It rains."], "hypothesis": ["It is wet."], "label": [1]},
    ),
    "qnli": (
        "QNLI/train.tsv",
        ("index\tquestion\tsentence\tlabel\n0\tWho?\tHe did.\tentailment\n1\tWho?\tRain.\tnot_entailment\n"),
        {"question": ["Who?", "Who?"], "sentence": ["He did.", "Rain."], "label": [0, 1]},
    ),
    "rte": (
        "RTE/train.tsv",
        "index\tsentence1\tsentence2\tlabel\n0\tA b.\tB.\tnot_entailment\n",
        {"sentence1": ["A b."], "sentence2": ["B."], "label": [1]},
    ),
}


@pytest.mark.parametrize("name", ORIGINALS)
@pytest.mark.parametrize("below", ["", "glue"])
def test_original_files(name: str, below: str, tmp_path: Path) -> None:
    file, text, expected = ORIGINALS[name]
    write_text(tmp_path / below / file, text)
    rows = columns(name, tmp_path)
    assert rows == {**expected, "idx": list(range(len(expected["label"])))}


def test_original_file_names_of_the_other_splits(tmp_path: Path) -> None:
    header, row = "index\tsentence1\tsentence2", "0\tIt rains.\tIt is wet."
    write_text(tmp_path / "MNLI/dev_mismatched.tsv", f"{header}\tgold_label\n{row}\tcontradiction\n")
    write_text(tmp_path / "MNLI/test_matched.tsv", f"{header}\n{row}\n")
    write_text(tmp_path / "CoLA/dev.tsv", "gj04\t1\t\tShe left.\n")
    write_text(tmp_path / "CoLA/test.tsv", "index\tsentence\n0\tHe left.\n")
    assert columns("mnli", tmp_path, "validation_mismatched")["label"] == [2]
    assert columns("mnli", tmp_path, "test_matched")["label"] == [-1]
    assert columns("cola", tmp_path, "validation")["sentence"] == ["She left."]
    assert columns("cola", tmp_path, "test") == {"sentence": ["He left."], "label": [-1], "idx": [0]}


def test_original_rows_are_the_parquet_rows(tmp_path: Path, data_dir: Path) -> None:
    rows = columns("rte", data_dir, "validation")
    names = get_task("rte").label_names
    fields = zip(rows["idx"], rows["sentence1"], rows["sentence2"], rows["label"], strict=True)
    lines = (f"{index}\t{first}\t{second}\t{names[label]}\n" for index, first, second, label in fields)
    write_text(tmp_path / "RTE/dev.tsv", "index\tsentence1\tsentence2\tlabel\n" + "".join(lines))
    assert columns("rte", tmp_path, "validation") == rows


def test_short_original_rows_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_text(tmp_path / "SST-2/train.tsv", "sentence\tlabel\ngood\t1\nbroken\nbad\t0\n")
    with caplog.at_level(logging.WARNING):
        assert columns("sst2", tmp_path) == {"sentence": ["good", "bad"], "label": [1, 0], "idx": [0, 2]}
    assert caplog.messages == [f"{path}: left out 1 of 3 rows with too few fields"]


# --- errors ------------------------------------------------------------------------------------------------------


def test_missing_folder(tmp_path: Path) -> None:
    assert message("sst2", tmp_path / "nope") == (
        f"task.data_dir={tmp_path / 'nope'} is not a folder. Set task.data_dir=DIR or LORA_HF_DATA_DIR=DIR to a folder "
        "with DIR/glue/sst2/train.parquet or DIR/SST-2/train.tsv; with neither set the rows come from the hub."
    )


def test_missing_split(tmp_path: Path) -> None:
    write(tmp_path / "glue/sst2/train.parquet", ROWS)
    write_text(tmp_path / "SST-2/test.tsv", "index\tsentence\n0\ta\n")
    found = message("sst2", tmp_path, "validation")
    assert found.startswith(
        f"no rows of glue/sst2, split 'validation', in {tmp_path} (task.data_dir); looked for: "
        "glue/sst2/validation.parquet, glue/sst2/validation-00000-of-00001.parquet, sst2/validation.parquet, "
    )
    assert "SST-2/dev.tsv, glue/SST-2/dev.tsv; splits found there: test, train. Set task.data_dir=DIR" in found


WRONG = {
    "missing column": (
        {"sentense": ["a"], "label": [1]},
        (": no column 'sentence' (did you mean 'sentense'?); found: sentense, label"),
    ),
    "no label": ({"sentence": ["a"]}, ": no column 'label'; found: sentence"),
    "text type": ({"sentence": [1, 2], "label": [1, 0]}, ": column 'sentence' should hold text (string), found int64"),
    "label type": (
        {"sentence": ["a"], "label": ["positive"]},
        ": column 'label' should hold class ids (integers, 0 negative, 1 positive), found string",
    ),
    "label float": (
        {"sentence": ["a"], "label": [1.0]},
        ": column 'label' should hold class ids (integers, 0 negative, 1 positive), found float64",
    ),
    "label range": (
        {"sentence": ["a", "b", "c"], "label": [1, 2, 7]},
        (
            ": 2 of 3 rows have a wrong 'label', the first "
            "is row 1 (counting from 0): 2; allowed: 0 negative, 1 positive"
        ),
    ),
    "hidden label": (
        {"sentence": ["a", "b"], "label": [1, -1]},
        (
            ": 1 of 2 rows have a wrong 'label', the first is row "
            "1 (counting from 0): -1; allowed: 0 negative, 1 positive; hidden labels (-1) are only for test "
            "splits"
        ),
    ),
    "null label": (
        {"sentence": ["a", "b"], "label": [1, None]},
        (": 1 of 2 rows have a wrong 'label', the first is row 1 (counting from 0): None; expected a label"),
    ),
    "empty": ({"sentence": [], "label": []}, ": no rows; expected at least one"),
    "null text": (
        {"sentence": ["a", None, None], "label": [1, 0, 1]},
        (": 2 of 3 rows have a wrong 'sentence', the first is row 1 (counting from 0): None; expected text"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_rows(case: str, tmp_path: Path) -> None:
    columns, expected = WRONG[case]
    path = write(tmp_path / "sst2/train.parquet", columns)
    assert message("sst2", tmp_path) == f"{path}{expected}"


def test_labels_in_another_order_are_refused(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["positive", "negative"])})
    path = tmp_path / "sst2/train.parquet"
    path.parent.mkdir()
    rows = Dataset.from_dict({"sentence": ["a"], "label": [0]}, features=features)
    parquet.write_table(pyarrow.table(rows.to_dict(), schema=features.arrow_schema), path)
    expected = f"{path}: the labels should be 0 negative, 1 positive, found 0 positive, 1 negative"
    assert message("sst2", tmp_path) == expected


@pytest.mark.parametrize(("score", "shown"), [(5.5, "5.5"), (float("nan"), "nan")])
def test_a_score_off_the_scale(score: float, shown: str, tmp_path: Path) -> None:
    write(tmp_path / "stsb/train.parquet", {"sentence1": ["a", "b"], "sentence2": ["a", "b"], "label": [5.0, score]})
    assert message("stsb", tmp_path).endswith(f"the first is row 1 (counting from 0): {shown}; allowed: 0 to 5")


def test_test_splits_may_hide_all_their_labels_but_not_some(tmp_path: Path) -> None:
    write(tmp_path / "sst2/test.parquet", {**ROWS, "label": [-1, -1]})
    assert columns("sst2", tmp_path, "test")["label"] == [-1, -1]
    write(tmp_path / "sst2/test.parquet", {"sentence": ["a"]})
    assert columns("sst2", tmp_path, "test") == {"sentence": ["a"]}
    write(tmp_path / "sst2/test.parquet", {**ROWS, "label": [-1, 1]})
    assert "1 of 2 rows have a wrong 'label', the first is row 0" in message("sst2", tmp_path, "test")


def test_corrupt_parquet(tmp_path: Path) -> None:
    path = write(tmp_path / "sst2/train.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    found = message("sst2", tmp_path)
    assert found.startswith(f"{path} cannot be read as parquet: ")
    assert found.endswith("Download or write the file again.")


def test_original_file_not_utf8(tmp_path: Path) -> None:
    path = write_text(tmp_path / "SST-2/train.tsv", b"sentence\tlabel\nfine\t1\ncaf\xe9\t1\n")
    assert message("sst2", tmp_path).startswith(f"{path}, line 3: not UTF-8: found the byte 0xe9")


def test_original_file_without_its_columns(tmp_path: Path) -> None:
    path = write_text(tmp_path / "RTE/train.tsv", "index\tsentence1\tsentence_2\tlabel\n")
    assert message("rte", tmp_path) == (
        f"{path}: no column 'sentence2' (did you mean 'sentence_2'?); found: index, sentence1, sentence_2, label"
    )
    path = write_text(tmp_path / "RTE/train.tsv", "")
    assert message("rte", tmp_path) == f"{path}: no column 'sentence1'; found: none"


def test_original_file_with_an_unknown_label(tmp_path: Path) -> None:
    for label, near in (("entailmen", " (did you mean 'entailment'?)"), ("4", "")):
        path = write_text(tmp_path / "RTE/train.tsv", f"index\tsentence1\tsentence2\tlabel\n0\ta\tb\t{label}\n")
        assert message("rte", tmp_path) == (
            f"{path}: row 0 (counting from 0) has the label '{label}' in column 'label'; expected one of the classes "
            f"(entailment, not_entailment){near}; the column holds {label} (1)"
        )


# --- the hub -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_allowed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE")
    hub_is_reachable.cache_clear()
    yield
    hub_is_reachable.cache_clear()


@pytest.fixture
def hub_answers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(request.param)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("hub_allowed", "hub_answers")
@pytest.mark.parametrize(
    ("hub_answers", "reachable"), [(200, True), (302, True), (404, True), (503, False)], indirect=["hub_answers"]
)
def test_reachable_means_an_answer_from_the_endpoint(reachable: bool) -> None:
    assert hub_is_reachable() is reachable


@pytest.mark.usefixtures("hub_allowed", "hub_answers")
@pytest.mark.parametrize("hub_answers", [200], indirect=True)
def test_offline_mode_is_not_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    assert not hub_is_reachable()
    monkeypatch.delenv("HF_DATASETS_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_is_reachable.cache_clear()
    assert not hub_is_reachable()


@pytest.mark.usefixtures("hub_allowed")
def test_an_endpoint_that_never_answers_costs_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert not hub_is_reachable(timeout=0.2), "and without the timeout, it never returns"


@pytest.mark.usefixtures("hub_allowed")
def test_a_dns_lookup_that_hangs_costs_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: release.wait())
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.localhost")
    assert not hub_is_reachable(timeout=0.2), "and it returns although the lookup still hangs"
    release.set()


@pytest.mark.usefixtures("hub_allowed")
def test_no_hub_and_no_cache_is_an_error_without_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("the client pauses before it asks again"))
    with pytest.raises(HubError) as error:
        columns("sst2", None)
    found = str(error.value)
    assert found.startswith(
        "nyu-mll/glue sst2, split 'train': the hub (https://huggingface.co) is out of reach or switched off "
        "(HF_HUB_OFFLINE, HF_DATASETS_OFFLINE), and the local cache ("
    )
    assert found.endswith(
        "does not hold it. Set task.data_dir=DIR or LORA_HF_DATA_DIR=DIR to a folder with DIR/glue/sst2/train.parquet "
        "or DIR/SST-2/train.tsv; with neither set the rows come from the hub."
    )


def test_the_cache_is_read_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from datasets.arrow_writer import ArrowWriter

    folder = tmp_path / "nyu-mll___glue/sst2/0.0.0/0123abcd"  # where load_dataset leaves what it has downloaded
    folder.mkdir(parents=True)
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
    )
    with ArrowWriter(features=features, path=str(folder / "glue-train.arrow")) as writer:
        writer.write_batch({"sentence": ["a fine film"], "label": [1]})
        writer.finalize()
    split = datasets.SplitInfo("train", num_bytes=1, num_examples=1, dataset_name="glue")
    info = datasets.DatasetInfo(
        features=features, splits=datasets.SplitDict({"train": split}), config_name="sst2", dataset_name="glue"
    )
    info.write_to_directory(str(folder))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)

    assert columns("sst2", None) == {"sentence": ["a fine film"], "label": [1]}
    with pytest.raises(HubError, match="nyu-mll/glue rte, split 'train': the hub"):
        columns("rte", None)


@pytest.mark.usefixtures("hub_allowed")
def test_a_hub_that_refuses_is_a_hub_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets.exceptions import DatasetNotFoundError

    def refuse(*args: object, **kwargs: object) -> None:
        raise DatasetNotFoundError("no such data set")

    monkeypatch.setattr("lora_hf.data.tasks.sources.hub_is_reachable", lambda: True)
    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(HubError, match=r"nyu-mll/glue sst2, split 'train': no such data set\. Set task.data_dir=DIR"):
        columns("sst2", None)
