"""`demo`: fine-tune the bundled tiny bases on bundled data."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lora_hf.cli.terminal import add_json, print_json
from lora_hf.core.child_process import ChildProcesses, package_command, package_environment
from lora_hf.core.errors import TrainingError
from lora_hf.core.imports import heavy_imports

if TYPE_CHECKING:
    from lora_hf.core.records import RunRecord
    from lora_hf.training.run import Run

logger = logging.getLogger(__name__)

HELP = "fine-tune the bundled tiny bases on bundled data, in a few minutes"
CLASSIFIER_RECIPE = "rule_sentiment.yaml"
GENERATOR_RECIPE = "rule_restaurants.yaml"
WRITER = "demo-writer"
EPOCHS = 1  # of the generator: enough for sentences, and it trains longest
SENTENCES = 4  # held-out sentences to classify: the first ones, whatever the answers
PROMPTS = 3  # prompts of the test split: the first ones, not the best
WIDTH = 110
# A second thread gains nothing with such small bases, and next to other programs it costs much.
THREADS = 1
POLL = 0.2  # seconds between two looks at what the other process prints


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="outputs", metavar="DIR", help="folder for the runs; default: outputs")
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    # Before importing torch takes seconds.
    print("training three small models: about two minutes on two cores", file=sys.stderr, flush=True)
    report = demo(options.output)
    if options.json:
        print_json(report)
    else:
        _print_report(report, report["writing"])


def demo(output: str = "outputs") -> dict[str, Any]:
    """Trains a classifier with and without LoRA, beside it a generator, and asks them held-out inputs.

    Returns:
        The scores, sizes and times of the runs' records, and the answers.

    Raises:
        TrainingError: the process that trains the generator failed.
    """
    with ChildProcesses() as children, tempfile.TemporaryDirectory() as scratch:
        messages = Path(scratch) / "messages.txt"
        writer = _start_writer(children, output, messages)
        with _few_threads():
            report = _classifiers(output)
            logger.info("training %s, which began beside the others", WRITER)
            with messages.open(encoding="utf-8", errors="replace") as lines:
                _follow(writer, lines)
            return report | {"writing": _writing(Path(output) / WRITER)}


@contextmanager
def _few_threads() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _classifiers(output: str) -> dict[str, Any]:
    head, lora = (_train(f"demo-{method}", output, f"train.method={method}") for method in ("head", "lora"))
    return {
        "majority": head.record.majority["validation"]["accuracy"],
        "head": head.record.metrics["validation"]["accuracy"],
        "lora": lora.record.metrics["validation"]["accuracy"],
        "head_parameters": head.record.parameters["trainable"],
        "lora_parameters": lora.record.parameters["trainable"],
        **_files(lora.folder, lora.record),
        "seconds": head.record.timings["total"] + lora.record.timings["total"],
        "answers": _classify(lora.folder),
    }


def _train(name: str, output: str, *overrides: str) -> Run:
    from lora_hf.core.config.loader import load_config

    with heavy_imports():
        from lora_hf.training.run import train
    logger.info("training %s", name)
    return train(load_config(CLASSIFIER_RECIPE, [*overrides, *_folder(name, output)]))


def _folder(name: str, output: str) -> list[str]:
    return [f"output.name={name}", f"output.dir={json.dumps(output)}", "output.overwrite=true"]  # JSON is YAML


def _start_writer(children: ChildProcesses, output: str, messages: Path) -> subprocess.Popen[bytes]:
    words = ["train", "--config", GENERATOR_RECIPE, *_folder(WRITER, output), f"train.epochs={EPOCHS}", "--json"]
    with messages.open("wb") as file:
        return children.start(
            package_command(*words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
            env=package_environment() | {"OMP_NUM_THREADS": str(THREADS)},
        )


def _follow(process: subprocess.Popen[bytes], lines: TextIO) -> None:
    """Prints what the process has printed and still prints, until it ends."""
    last = ""
    while True:
        ended = process.poll() is not None
        for last in lines:
            print(last, end="", file=sys.stderr, flush=True)
        if ended:
            break
        time.sleep(POLL)
    if process.returncode:
        raise TrainingError(f"{WRITER} ended with exit code {process.returncode}: {last.strip()}")


def _writing(folder: Path) -> dict[str, Any]:
    from lora_hf.core.records import RECORD_FILE, RunRecord

    record = RunRecord.load(folder / RECORD_FILE)
    return {
        "perplexity": record.metrics["validation"]["perplexity"],
        "rows": record.rows["validation"],
        "parameters": record.parameters["trainable"],
        **_files(folder, record),
        "seconds": record.timings["total"],
        "texts": _generate(folder),
    }


def _files(folder: Path, record: RunRecord) -> dict[str, Any]:
    return {
        "total_parameters": record.parameters["total"],
        "adapter_bytes": record.files["adapter"],
        "adapter": str(folder / "adapter"),
        "record": str(folder / "record.json"),
    }


def _classify(folder: Path) -> list[dict[str, Any]]:
    """The answers to held-out sentences, with the right labels."""
    from lora_hf.adapters.resolve import find_saved_model
    from lora_hf.inference.classify import Predictor

    saved = find_saved_model(folder / "adapter")
    rows = saved.task.load(None, ["validation"])["validation"][:SENTENCES]
    answers = Predictor.load(saved).predict({"sentence": rows["sentence"]})
    return [
        {"sentence": sentence, "right": saved.task.label_names[label], **answer}
        for sentence, label, answer in zip(rows["sentence"], rows["label"], answers, strict=True)
    ]


def _generate(folder: Path) -> list[dict[str, str]]:
    """Texts of the base and of the adapted model for the same prompts, with the same decoding."""
    from lora_hf.adapters.resolve import find_saved_model
    from lora_hf.inference.generate import Generator

    saved = find_saved_model(folder / "adapter")
    # The test rows are neither trained on nor, like the validation rows, used to choose the checkpoint.
    rows = saved.task.load(None, ["test"])["test"]
    prompts = list(dict.fromkeys(rows["meaning_representation"]))[:PROMPTS]
    texts = []
    for adapted in (False, True):
        generator = Generator.load(saved, adapted)
        contexts = [generator.task.context(prompt) for prompt in prompts]
        texts.append([generated.text for generated in generator.generate(contexts, saved.generate)])
    return [
        {"input": prompt, "base": base, "adapted": adapted}
        for prompt, base, adapted in zip(prompts, *texts, strict=True)
    ]


def _print_report(report: dict[str, Any], writing: dict[str, Any]) -> None:
    print("\nSentiment of rule-made sentences, 500 held-out rows:\n")
    _print_scores(
        "accuracy",
        report["total_parameters"],
        ("most frequent class", report["majority"], 0),
        ("tiny base, head trained", report["head"], report["head_parameters"]),
        ("tiny base, LoRA and head trained", report["lora"], report["lora_parameters"]),
    )
    print()
    for answer in report["answers"]:
        probability = max(answer["probabilities"].values())
        wrong = "" if answer["label"] == answer["right"] else ", wrong"
        print(f"  {answer['sentence']!r}: {answer['label']} ({probability:.2f}){wrong}")
    _print_files(report)
    print(f"\nDescriptions of rule-made restaurants, {writing['rows']} held-out rows:\n")
    row = ("tiny base, LoRA trained", writing["perplexity"], writing["parameters"])
    _print_scores("perplexity", writing["total_parameters"], row)
    for text in writing["texts"]:
        base = textwrap.shorten(text["base"], WIDTH - 11, placeholder="...")
        print()
        for name, value in (("input", text["input"]), ("base", base), ("LoRA", text["adapted"])):
            indent, start = " " * 11, f"  {name:9}"
            lines = textwrap.wrap(value, WIDTH, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False)
            print("\n".join(lines) or f"  {name}")
    _print_files(writing)
    print("\nNext: follow docs/start.md")


def _print_scores(metric: str, total: int, *rows: tuple[str, float, int]) -> None:
    print(f"  {'':34}{metric:>10}{'trained parameters':>22}")
    for name, score, trained in rows:
        share = f"{trained:,} ({100 * trained / total:.1f} %)" if trained else "0"
        print(f"  {name:34}{score:>10.3f}{share:>22}")


def _print_files(report: dict[str, Any]) -> None:
    print(f"\n  adapter  {report['adapter']} ({report['adapter_bytes'] / 1e6:.2f} MB)\n  record   {report['record']}")
    print(f"  trained and scored in {report['seconds']:.0f} s")
