"""`demo`: fine-tune the embedded bases on embedded data."""

from __future__ import annotations

import argparse
import logging
import sys
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.adapters.resolve import SavedModel, find_saved_model
from lora_hf.cli.terminal import print_json
from lora_hf.core.config.loader import load_config

if TYPE_CHECKING:
    from lora_hf.training.run import Run


def add(verbs: Any) -> None:
    """Describes the verb."""
    parser = verbs.add_parser("demo", help="fine-tune the embedded tiny bases on embedded data, in a few minutes")
    parser.add_argument("--output", default="outputs", metavar="DIR")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Trains, answers, and prints the table."""
    # Before the seconds that importing torch takes.
    print("three small trainings, one after the other: about two minutes on two cores", file=sys.stderr, flush=True)
    report = demo(options.output)
    if options.json:
        print_json(report.to_dict())
    else:
        print(report.table())


logger = logging.getLogger(__name__)

RECIPE = "rule_sentiment.yaml"
WRITER_RECIPE = "rule_restaurants.yaml"
ASKED = 4  # held-out sentences: the first ones, whatever the answers
DESCRIBED = 3  # meanings of the test split: the first ones, not the best
WIDTH = 110  # of a line of the table


@dataclass(frozen=True)
class Writing:
    """What the writer measured, from its record, and for each meaning the base's text and the adapted model's."""

    perplexity: float
    rows: int
    parameters: int
    total_parameters: int
    adapter_bytes: int
    seconds: float
    adapter: str
    record: str
    texts: list[dict[str, str]]

    def lines(self) -> list[str]:
        """This part of the table."""
        lines = ["", f"Descriptions of restaurants made by rule, {self.rows} held-out rows:", ""]
        lines.append(f"  {'':34}{'perplexity':>10}{'trained parameters':>22}")
        share = _share(self.parameters, self.total_parameters)
        lines.append(f"  {'tiny base, LoRA trained':34}{self.perplexity:>10.3f}{share:>22}")
        for text in self.texts:
            base = text["base"] if len(text["base"]) <= WIDTH - 11 else f"{text['base'][: WIDTH - 14]}..."
            lines.append("")
            lines += _wrapped("input", text["input"]) + _wrapped("base", base) + _wrapped("LoRA", text["adapted"])
        return [*lines, *_places(self.adapter, self.adapter_bytes, self.record, self.seconds)]


@dataclass(frozen=True)
class DemoReport:
    """What the demo measured, all of it from the three records it wrote."""

    majority: float
    head: float
    lora: float
    head_parameters: int
    lora_parameters: int
    total_parameters: int
    adapter_bytes: int
    seconds: float
    adapter: str
    record: str
    answers: list[dict[str, Any]]
    writing: Writing

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        """The report as lines for a terminal."""
        rows = [
            ("always the commonest class", self.majority, 0),
            ("tiny base, only its head trained", self.head, self.head_parameters),
            ("tiny base, LoRA and head trained", self.lora, self.lora_parameters),
        ]
        lines = ["", "Sentiment of sentences made by rule, 500 held-out rows:", ""]
        lines.append(f"  {'':34}{'accuracy':>10}{'trained parameters':>22}")
        for name, accuracy, trained in rows:
            lines.append(f"  {name:34}{accuracy:>10.3f}{_share(trained, self.total_parameters):>22}")
        lines.append("")
        for answer in self.answers:
            sure = max(answer["probabilities"].values())
            wrong = "" if answer["label"] == answer["right"] else ", wrong"
            lines.append(f"  {answer['sentence']!r}: {answer['label']} ({sure:.2f}){wrong}")
        lines += _places(self.adapter, self.adapter_bytes, self.record, self.seconds)
        lines += [
            *self.writing.lines(),
            "",
            "Next: docs/start.md, to type along with",
        ]
        return "\n".join(lines)


def demo(output: str = "outputs") -> DemoReport:
    """Trains the embedded tiny bases on the embedded data, and asks them for what was held out."""
    from lora_hf.training.run import train

    runs: dict[str, Run] = {}
    for method in ("head", "lora"):
        name = f"output.name=demo-{method}"
        logger.info("training tiny-roberta, method %s", method)
        runs[method] = train(
            load_config(RECIPE, [f"train.method={method}", name, f"output.dir={output}", "output.overwrite=true"])
        )
    head, lora = runs["head"].record, runs["lora"].record
    return DemoReport(
        majority=head.majority["validation"]["accuracy"],
        head=head.metrics["validation"]["accuracy"],
        lora=lora.metrics["validation"]["accuracy"],
        head_parameters=head.parameters["trainable"],
        lora_parameters=lora.parameters["trainable"],
        total_parameters=lora.parameters["total"],
        adapter_bytes=lora.files["adapter"],
        seconds=head.timings["total"] + lora.timings["total"],
        adapter=str(runs["lora"].weights),
        record=str(Path(runs["lora"].folder) / "record.json"),
        answers=_answers(find_saved_model(runs["lora"].weights)),
        writing=_writing(output),
    )


def _answers(saved: SavedModel) -> list[dict[str, Any]]:
    """What the model says of held-out sentences, and which label is right."""
    from lora_hf.inference.classify import Predictor

    rows = saved.task.load(None, ["validation"])["validation"][:ASKED]
    answers = Predictor.load(saved).predict({"sentence": rows["sentence"]})
    return [
        {"sentence": sentence, "right": saved.task.label_names[label], **answer}
        for sentence, label, answer in zip(rows["sentence"], rows["label"], answers, strict=True)
    ]


def _writing(output: str) -> Writing:
    """Trains the tiny writer on the embedded restaurants and lets it describe some that it has not seen."""
    from lora_hf.training.run import train

    logger.info("training tiny-gpt2, method lora")
    words = ["output.name=demo-writer", f"output.dir={output}", "output.overwrite=true"]
    run = train(load_config(WRITER_RECIPE, words))
    record = run.record
    return Writing(
        perplexity=record.metrics["validation"]["perplexity"],
        rows=record.rows["validation"],
        parameters=record.parameters["trainable"],
        total_parameters=record.parameters["total"],
        adapter_bytes=record.files["adapter"],
        seconds=record.timings["total"],
        adapter=str(run.weights),
        record=str(run.folder / "record.json"),
        texts=_texts(find_saved_model(run.weights)),
    )


def _texts(saved: SavedModel) -> list[dict[str, str]]:
    """The base's and the adapted model's text for the same meanings, with the same decoding."""
    from lora_hf.inference.generate import Generator

    # Neither trained on nor, as the development rows are, used to choose the checkpoint.
    rows = saved.task.load(None, ["test"])["test"]
    meanings = list(dict.fromkeys(rows["meaning_representation"]))[:DESCRIBED]
    texts = []
    for adapted in (False, True):
        generator = Generator.load(saved, adapted)
        contexts = [generator.task.context(meaning) for meaning in meanings]
        texts.append([made.text for made in generator.generate(contexts, saved.generate)])
    return [
        {"input": meaning, "base": base, "adapted": written}
        for meaning, base, written in zip(meanings, *texts, strict=True)
    ]


def _share(trained: int, total: int) -> str:
    return f"{trained:,} ({100 * trained / total:.1f} %)" if trained else "0"


def _wrapped(name: str, text: str) -> list[str]:
    """A named text on as many lines as it takes, each below the other."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"  {name:9}", subsequent_indent=" " * 11, break_on_hyphens=False
    ) or [f"  {name}"]


def _places(adapter: str, size: int, record: str, seconds: float) -> list[str]:
    return [
        "",
        f"  adapter  {adapter} ({size / 1e6:.2f} MB)",
        f"  record   {record}",
        f"  trained and scored in {seconds:.0f} s",
    ]
