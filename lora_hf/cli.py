"""The command line: `lora-hf <verb>`, or `python scripts/<verb>.py`.

Results go to standard output, progress and logs to standard error. Exit 0: done; 2: the user's mistake, told in one
message; 1: a bug, with its traceback.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.errors import ConfigError, UserError

# The keys of the config's generate section that a command line may set.
DECODING = {
    "num_beams": int,
    "length_penalty": float,
    "no_repeat_ngram_size": int,
    "max_new_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "seed": int,
    "batch_size": int,
}

if TYPE_CHECKING:
    from lora_hf.saved import Saved
    from lora_hf.tasks.base import Task


def main(arguments: Sequence[str] | None = None, verb: str | None = None) -> int:
    """Runs one verb; `scripts/<verb>.py` names it, otherwise it is the first argument."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parsed = _parser(verb).parse_args(words if verb is None else [verb, *words])
    _speak_on_standard_error()
    try:
        parsed.run(parsed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parser(verb: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lora-hf" if verb is None else "python scripts", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    train = verbs.add_parser("train", help="fine-tune as a config says")
    train.add_argument("--config", required=True, metavar="FILE", help="a YAML file, or a recipe's name in configs/")
    train.add_argument("--resume", metavar="auto|CHECKPOINT", help="go on from a checkpoint")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="such as lora.r=16 train.epochs=1")
    train.set_defaults(run=_train)

    evaluate = verbs.add_parser("eval", help="score a trained run on a split")
    evaluate.add_argument("--split", help="default: every evaluation split of the task")
    evaluate.add_argument("--data-dir", metavar="DIR", help="default: $LORA_HF_DATA_DIR, else the hub")
    evaluate.add_argument("--without-adapter", action="store_true", help="the bare base, for comparison (generation)")
    evaluate.set_defaults(run=_evaluate)

    predict = verbs.add_parser("predict", help="classify texts")
    source = predict.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="one text")
    source.add_argument("--input", type=Path, metavar="FILE", help="a text a line, or .jsonl with the task's columns")
    predict.add_argument("--text-pair", help="the second text, where the task reads two")
    predict.add_argument("--output", type=Path, metavar="FILE", help="write .jsonl there instead of standard output")
    predict.set_defaults(run=_predict)

    generate = verbs.add_parser("generate", help="write texts")
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="T", help="one input, such as 'name[The Vaults], eatType[pub]'")
    source.add_argument("--input", type=Path, metavar="FILE", help="an input a line")
    for name, kind in DECODING.items():
        generate.add_argument(f"--{name.replace('_', '-')}", type=kind, help="default: what the run's config says")
    generate.add_argument("--output", type=Path, metavar="FILE", help="a text a line there, and .jsonl with the scores")
    generate.set_defaults(run=_generate)

    score = verbs.add_parser("score", help="score a file of texts as the official scorer does")
    score.add_argument("--task", required=True, metavar="NAME", help="e2e_nlg, dart or web_nlg")
    score.add_argument("--predictions", required=True, type=Path, metavar="FILE", help="a text a line")
    score.add_argument("--references", required=True, type=Path, nargs="+", metavar="FILE", help="see docs/scores.md")
    score.set_defaults(run=_score)

    bench = verbs.add_parser("benchmark", help="measure methods and libraries side by side")
    bench.add_argument("what", choices=["train"], help="what to measure")
    bench.add_argument("--model", default="tiny-roberta", metavar="NAME")
    bench.add_argument("--init", default="pretrained", choices=["pretrained", "random"])
    bench.add_argument("--tokenizer", metavar="NAME", help="a hub id or folder, where it is not the model's own")
    bench.add_argument(
        "--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="of our frozen base"
    )
    bench.add_argument("--task", default="rule-sentiment", metavar="NAME")
    bench.add_argument("--data-dir", metavar="DIR")
    bench.add_argument("--batch-size", type=int, metavar="N", help="default: 16, and 8 for generation")
    bench.add_argument("--dropout", type=float, default=0.0, metavar="P", help="lora_dropout of every side")
    bench.add_argument("--base-dropout", type=float, default=0.0, metavar="P", help="the base's own, on every side")
    bench.add_argument(
        "--group-by-prompt", action="store_true", help="generation: all rows of a prompt, which our sides group"
    )
    bench.add_argument("--steps", type=int, default=10, metavar="N", help="optimiser steps of a round")
    bench.add_argument("--rounds", type=int, default=5, metavar="N", help="counted rounds, after one that is not")
    bench.add_argument(
        "--against",
        default="full",
        metavar="SIDE,...",
        help="peft (peft-default and peft-best), loralib, full, head, frozen (no adapter: the bound)",
    )
    bench.add_argument("--output", type=Path, metavar="FILE", help="write the whole record there")
    bench.set_defaults(run=_benchmark)

    demo = verbs.add_parser("demo", help="fine-tune the embedded tiny bases on embedded data, in under two minutes")
    demo.add_argument("--output", default="outputs", metavar="DIR")
    demo.set_defaults(run=_demo)

    for command in (evaluate, predict, generate):
        command.add_argument("--adapter", required=True, type=Path, metavar="DIR", help="outputs/<run>/adapter")
    for command in (train, evaluate, predict, generate, score, bench, demo):
        command.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    return parser


def _train(options: argparse.Namespace) -> None:
    from lora_hf.config import load_config
    from lora_hf.tasks.table import get_task

    config = load_config(options.config, options.overrides)
    task = get_task(config.task.name)
    # Mistakes in the data are told before the seconds that importing the Trainer takes.
    rows = task.load(config.task.data_dir, task.splits)
    from lora_hf.training import train

    run = train(config, options.resume, rows)
    record = run.record
    if options.json:
        _json({"run": str(run.folder), "weights": str(run.weights), "metrics": record.metrics, "best": record.best})
        return
    for split, scores in record.metrics.items():
        print(f"{split}: " + "  ".join(f"{metric} {value:.4f}" for metric, value in scores.items()))
    print(f"trained {record.parameters['trainable']:,} of {record.parameters['total']:,} parameters")
    print(f"weights: {run.weights}\nrecord:  {run.folder / 'record.json'}\ncurves:  {run.folder / 'curves.png'}")


def _evaluate(options: argparse.Namespace) -> None:
    from lora_hf.saved import find_saved

    saved = find_saved(options.adapter)
    splits = saved.task.evaluation_splits if options.split in (None, "validation") else (options.split,)
    rows = saved.task.load(options.data_dir, splits)
    if saved.task.model_kind == "causal-lm":
        scores = _evaluate_texts(saved, rows, adapted=not options.without_adapter)
    elif options.without_adapter:
        raise ConfigError(
            f"--without-adapter: {saved.task.name} needs the trained head, which a bare base does not have"
        )
    else:
        from lora_hf.inference import Predictor, evaluate

        scores = evaluate(Predictor.load(saved), rows, _progress)
    if options.json:
        _json({"adapter": str(options.adapter), "metrics": scores})
        return
    for split, values in scores.items():
        print(f"{split}: " + "  ".join(f"{name} {_shown(value)}" for name, value in values.items()))


def _evaluate_texts(saved: Saved, rows: Mapping[str, Any], adapted: bool) -> dict[str, Any]:
    """Scores by split and subset."""
    from lora_hf.generation import Generator, evaluate_texts

    records, scores = evaluate_texts(Generator.load(saved, adapted), saved, rows, adapted, _progress)
    for record in records:
        print(f"record: {record}", file=sys.stderr)
    return {
        split if subset == "all" else f"{split}, {subset}": values
        for split, subsets in scores.items()
        for subset, values in subsets.items()
    }


def _generate(options: argparse.Namespace) -> None:
    from dataclasses import asdict, replace

    from lora_hf.saved import find_saved
    from lora_hf.tasks.generation import TextGeneration

    saved = find_saved(options.adapter)
    task = saved.task
    if not isinstance(task, TextGeneration):
        raise ConfigError(f"{options.adapter} was trained for {task.name}, which classifies; use predict instead")
    given = {name: getattr(options, name) for name in DECODING if getattr(options, name) is not None}
    if given.keys() & {"temperature", "top_p", "top_k"}:
        given = {"num_beams": 1, **given, "do_sample": True}
    decoding = replace(saved.generate, **given)
    prompts = [options.prompt] if options.input is None else _prompts(options.input)
    contexts = [task.context(prompt) for prompt in prompts]
    from lora_hf.generation import Generator, write_texts

    texts = _progress(Generator.load(saved).generate(contexts, decoding), total=len(prompts))
    if options.output is not None:
        made = write_texts(options.output, prompts, texts)
        print(f"{len(made)} texts in {options.output}", file=sys.stderr)
    else:
        made = list(texts)
    lines = [{"prompt": prompt, **asdict(text)} for prompt, text in zip(prompts, made, strict=True)]
    if options.json:
        _json({"texts": lines} if options.output is None else {"output": str(options.output), "rows": len(lines)})
    elif options.output is None:
        for text in made:
            print(text.text)


def _prompts(path: Path) -> list[str]:
    from lora_hf.rows import read_rows

    return read_rows(path, ("prompt",))["prompt"]


def _predict(options: argparse.Namespace) -> None:
    from lora_hf.saved import find_saved

    saved = find_saved(options.adapter)
    if saved.task.model_kind != "sequence-classification":
        raise ConfigError(
            f"{options.adapter} was trained for {saved.task.name}, which writes texts; use generate instead"
        )
    columns = saved.task.text_columns
    if options.input is not None:
        from lora_hf.rows import read_rows

        rows = read_rows(options.input, columns)
    else:
        rows = _texts(saved.task, options.text, options.text_pair)
    from lora_hf.inference import Predictor

    answers = Predictor.load(saved).predict(rows, progress=_progress if options.input else iter)
    lines = [{**{column: rows[column][i] for column in columns}, **answer} for i, answer in enumerate(answers)]
    if options.output is not None:
        _write_lines(options.output, lines)
        print(f"{len(lines)} predictions in {options.output}", file=sys.stderr)
    if options.json:
        _json({"predictions": lines} if options.output is None else {"output": str(options.output), "rows": len(lines)})
    elif options.output is None:
        for line in lines:
            print(json.dumps(line, ensure_ascii=False))


def _texts(task: Task, text: str, pair: str | None) -> dict[str, list]:
    columns = task.text_columns
    given = [text] if pair is None else [text, pair]
    if len(given) != len(columns):
        wanted = "--text and --text-pair" if len(columns) == 2 else "--text alone"
        raise ConfigError(f"task {task.name} reads {' and '.join(columns)}: expected {wanted}")
    for value in given:
        if not value.strip():
            raise ConfigError("--text: expected a text, found nothing")
    return {column: [value] for column, value in zip(columns, given, strict=True)}


def _score(options: argparse.Namespace) -> None:
    from lora_hf.metrics.texts import check_task, score_texts
    from lora_hf.references import read_predictions, read_references

    check_task(options.task)
    references = read_references(options.references)
    predictions = read_predictions(options.predictions, references)
    scores = score_texts(options.task, predictions, references.groups, references.tokenized)
    for name, reason in scores.reasons.items():
        print(f"{name}: {reason}", file=sys.stderr)
    if options.json:
        _json({"task": options.task, "scores": scores.values, "tools": scores.tools, "missing": scores.reasons})
        return
    for name, value in scores.values.items():
        print(f"{name:8}{_shown(value):>8}  {scores.tools[name]}")


def _benchmark(options: argparse.Namespace) -> None:
    from lora_hf.config import RunConfig
    from lora_hf.tasks.table import get_task

    if options.output and not options.output.parent.is_dir():
        raise ConfigError(f"--output {options.output}: there is no folder {options.output.parent}")
    size = options.batch_size
    if size is None:
        size = 8 if get_task(options.task).model_kind == "causal-lm" else 16
    sections: dict[str, dict[str, Any]] = {
        "model": {
            "name": options.model,
            "init": options.init,
            "tokenizer": options.tokenizer,
            "precision": options.precision,
            "dropout": options.base_dropout,
        },
        "task": {"name": options.task, "data_dir": options.data_dir},
        "lora": {"r": 16, "lora_alpha": 16, "lora_dropout": options.dropout, "targets": "all"},
        "train": {"batch_size": size, "group_by_prompt": options.group_by_prompt},
    }
    config = RunConfig.from_dict(sections, "benchmark")
    from lora_hf.benchmark.train import benchmark_train

    result = benchmark_train(config, options.against.split(","), options.steps, options.rounds)
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.json:
        _json(result)
        return
    for name, side in result["sides"].items():
        speed, memory = side["examples_per_second"], side["memory"]["above_base"]
        spread = f"{speed['median']:9.2f} examples/s ({speed['min']:.2f} to {speed['max']:.2f})"
        share = f"{side['share_of_peak']['median']:6.1%} of the matrix peak"
        print(f"{name:13}{spread}  {share}  {(memory or 0) / 1e6:8.1f} MB above the base")
    for name, ratio in result["ratios"].items():
        memory = result["memory_ratios"].get(name)
        print(
            f"{name:18} {ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f})"
            + (f", memory {memory:.2f}x" if memory else "")
        )


def _demo(options: argparse.Namespace) -> None:
    from lora_hf.demo import demo

    report = demo(options.output)
    if options.json:
        _json(report.to_dict())
    else:
        print(report.table())


def _speak_on_standard_error() -> None:
    """Our own messages on standard error; the libraries speak up only where something is wrong."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s: %(message)s")
    logging.getLogger("lora_hf").setLevel(logging.INFO)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Read when torch is loaded. Threads that spin for long while they wait take the core from the one that is late:
    # beside a busy program a step takes twice as long. Threads that sleep at once are woken too late for the next
    # kernel: alone on the machine it takes a third longer. A short spin has little of either.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _progress(items: Any, total: int | None = None) -> Any:
    from tqdm.auto import tqdm

    return tqdm(items, total=total, leave=False, disable=None)  # None: only on a terminal


def _shown(value: float | None) -> str:
    return "null" if value is None else f"{value:.4f}"


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    try:
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written: {error.strerror}") from error


def _json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False))
