"""The configuration of a run: frozen dataclasses and a strict YAML reader that needs neither torch nor transformers.

A key that is unknown, of the wrong type or out of range is an error; all problems of a file are told in one message.
Recipes live in `configs/`; a bare file name is looked for in the current folder first, then there.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from lora_hf.errors import ConfigError, did_you_mean

ROLES = ("q", "k", "v", "o", "ffn_up", "ffn_gate", "ffn_down")
PRESETS = {
    "attention": ("q", "k", "v", "o"),
    "ffn": ("ffn_up", "ffn_gate", "ffn_down"),
    "all": ROLES,
}
INITS = ("default", "gaussian", "pissa", "olora")
RECIPE_FOLDERS = (Path("configs"), Path(__file__).parent.parent / "configs", Path(__file__).parent / "configs")


def _value(default: Any, low: float | None = None, high: float | None = None, above: float | None = None) -> Any:
    """A field with its range: `low <= value <= high`, and `value > above`."""
    return field(default=default, metadata={"low": low, "high": high, "above": above})


def _target_problem(targets: tuple[str, ...]) -> str:
    words = (*ROLES, *PRESETS, "embeddings")
    unknown = [target for target in targets if target not in words and "." not in target]
    if targets and not unknown:
        return ""
    found = ", ".join(repr(target) + did_you_mean(target, words) for target in unknown) or "nothing"
    return f"expected some of {', '.join(words)}, or a module path with dots, found {found}"


def _pattern_problem(patterns: dict[str, Any]) -> str:
    return _target_problem(tuple(patterns)) if patterns else ""


def _init_problem(init: str) -> str:
    if init in INITS or re.fullmatch(r"pissa_niter_[1-9]\d*", init):
        return ""
    return f"expected one of {', '.join(INITS)}, pissa_niter_[n], found {init!r}{did_you_mean(init, INITS)}"


OURS = {
    "learning_rate": "train.lr",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "per_device_train_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "train.eval_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "weight_decay": "train.weight_decay",
    "warmup_steps": "train.warmup_steps",
    "warmup_ratio": "train.warmup_ratio",
    "lr_scheduler_type": "train.schedule",
    "max_grad_norm": "train.max_grad_norm",
    "label_smoothing_factor": "train.label_smoothing",
    "seed": "train.seed",
    "output_dir": "output.dir",
}


def _hf_problem(hf: dict[str, Any]) -> str:
    """Names under `train.hf` that are not fields of TrainingArguments, or that have a key of their own here."""
    problems = [f"{name}: set {OURS[name]} instead" for name in hf if name in OURS]
    rest = [name for name in hf if name not in OURS]
    known = _training_argument_names() if rest else ()
    problems += [
        f"{name}: not a field of transformers.TrainingArguments{did_you_mean(name, known)}"
        for name in rest
        if name not in known
    ]
    return "; ".join(problems)


def _training_argument_names() -> tuple[str, ...]:
    # Importing TrainingArguments takes seconds and pulls in torch; its source says the same in milliseconds.
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise ConfigError("transformers is not installed; install lora-hf with its dependencies")
    source = (Path(spec.origin).parent / "training_args.py").read_text(encoding="utf-8")
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    fields = next(node for node in classes if node.name == "TrainingArguments").body
    return tuple(
        node.target.id for node in fields if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    )


class _Section:
    """Checks its own values when built, so that a config made in Python is held to the same rules as a file."""

    def __post_init__(self) -> None:
        kinds = typing.get_type_hints(type(self))
        problems = []
        for entry in dataclasses.fields(self):  # type: ignore[arg-type]
            value, problem = _checked(getattr(self, entry.name), kinds[entry.name], entry.metadata)
            if problem:
                problems.append(f"{entry.name}: {problem}")
            else:
                object.__setattr__(self, entry.name, value)
        if problems:
            raise ConfigError("; ".join(problems))


@dataclass(frozen=True)
class ModelConfig(_Section):
    """The base model: `name` is a hub id, a local folder, or an embedded base (`tiny-roberta`, `tiny-gpt2`)."""

    name: str = "FacebookAI/roberta-base"
    revision: str | None = None
    tokenizer: str | None = None  # a hub id or folder, where it is not the model's own
    init: Literal["pretrained", "random"] = "pretrained"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the base; auto: bf16 where it is faster here
    dropout: float | None = _value(None, low=0, high=0.99)  # of the base, all kinds of it; without: the model's own


@dataclass(frozen=True)
class TaskConfig(_Section):
    """The data: `data_dir` is a local folder, else `$LORA_HF_DATA_DIR`, else the hub."""

    name: str = "sst2"
    data_dir: str | None = None
    max_length: int = _value(512, low=4)


@dataclass(frozen=True)
class LoraConfig(_Section):
    """What to adapt and how strongly: `delta_weight = (lora_alpha / r) * lora_B @ lora_A`.

    Source: LoRA, arXiv 2106.09685, section 4.1.

    `targets` holds roles (`q k v o ffn_up ffn_gate ffn_down`), presets (`attention ffn all`), `embeddings` (of the
    tokens; in no preset), or, for what has no role, anchored module paths in which `*` stands for one segment
    (`encoder.layer.*.output.dense`). The keys of `rank_pattern` and `alpha_pattern` are such words too; the first that
    fits a place gives its number there.
    """

    r: int = _value(8, low=1)
    lora_alpha: float = _value(8, above=0)
    lora_dropout: float = _value(0.0, low=0, high=0.99)
    targets: tuple[str, ...] = field(default=("q", "v"), metadata={"check": _target_problem})
    layers: tuple[int, ...] | None = None  # of the model, -1 is the last; without: all
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"check": _pattern_problem, "low": 1})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"check": _pattern_problem, "above": 0})
    use_rslora: bool = False  # scaling = lora_alpha / sqrt(r): arXiv 2312.03732
    use_dora: bool = False  # magnitude and direction apart: arXiv 2402.09353
    bias: Literal["none", "all", "lora_only"] = "none"  # of the base, which to train beside
    init_lora_weights: str = field(default="default", metadata={"check": _init_problem})


@dataclass(frozen=True)
class TrainConfig(_Section):
    """The fine-tuning. `method: head` trains the task head alone, `full` everything: what LoRA is compared with."""

    method: Literal["lora", "full", "head"] = "lora"
    epochs: float = _value(3.0, above=0)
    max_steps: int | None = _value(None, low=1)  # overrides epochs
    batch_size: int = _value(16, low=1)
    eval_batch_size: int = _value(64, low=1)
    gradient_accumulation: int = _value(1, low=1)
    lr: float = _value(5e-4, above=0)
    loraplus_lr_ratio: float | None = _value(None, above=0)  # of lr, for LoRA's B: arXiv 2402.12354
    weight_decay: float = _value(0.0, low=0)
    warmup_ratio: float = _value(0.06, low=0, high=1)
    warmup_steps: int | None = _value(None, low=0)  # overrides warmup_ratio
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    max_grad_norm: float = _value(1.0, low=0)  # 0: gradients are not clipped
    label_smoothing: float = _value(0.0, low=0, high=1)
    group_by_prompt: bool = False  # generation: rows of one input together in a batch, where it is encoded once
    seed: int = _value(0, low=0)
    patience: int | None = _value(None, low=1)  # evaluations without a better score before the run stops early
    start_from: str | None = None  # an adapter whose LoRA weights (not its head) the run starts from
    hf: dict[str, Any] = field(
        default_factory=dict, metadata={"check": _hf_problem}
    )  # any other field of transformers.TrainingArguments


@dataclass(frozen=True)
class GenerateConfig(_Section):
    """The decoding: greedy with `num_beams: 1`, beam search above it, sampling with `do_sample: true`."""

    num_beams: int = _value(1, low=1)
    length_penalty: float = _value(1.0, low=-10, high=10)  # a beam's score is its log-probability / length ** this
    no_repeat_ngram_size: int = _value(0, low=0)  # 0: n-grams may repeat
    max_new_tokens: int = _value(64, low=1)
    do_sample: bool = False
    temperature: float = _value(1.0, above=0)
    top_p: float = _value(1.0, above=0, high=1)
    top_k: int = _value(0, low=0)  # 0: all tokens
    seed: int = _value(0, low=0)
    batch_size: int = _value(16, low=1)


@dataclass(frozen=True)
class OutputConfig(_Section):
    """Where the run folder goes: `<dir>/<name>`; without a name, one is made of task, model, method and time."""

    dir: str = "outputs"
    name: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on besides code, data and machine."""

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML and JSON; `from_dict` of it gives an equal config."""
        plain = dataclasses.asdict(self)
        for key in ("targets", "layers"):
            value = plain["lora"][key]
            plain["lora"][key] = list(value) if value is not None else None
        return plain

    @classmethod
    def from_dict(cls, sections: dict[str, Any], source: str = "config") -> RunConfig:
        """Builds a config from nested mappings.

        Raises:
            ConfigError: all problems at once, each with its key, what was expected and what was found.
        """
        kinds = typing.get_type_hints(cls)
        problems, built = [], {}
        for name, values in sections.items():
            if name not in kinds:
                problems.append(f"{name}: unknown section{did_you_mean(str(name), kinds)}; expected {', '.join(kinds)}")
                continue
            built[name], found = _build(kinds[name], values if values is not None else {})
            problems += [f"{name}.{problem}" for problem in found]
        if problems:
            count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
            raise ConfigError("\n  ".join([f"{source}: {count}", *problems]))
        return cls(**built)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML recipe and applies overrides such as `lora.r=16`.

    Raises:
        ConfigError: a missing or malformed file, or any key that is unknown, mistyped or out of range.
    """
    file = _find(Path(path))
    try:
        sections = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not a readable YAML file: {error}") from error
    if not isinstance(sections, dict):
        raise ConfigError(f"{path}: expected sections such as 'model:' and 'task:', found {_kind_of(sections)}")
    for override in overrides:
        _apply(override, sections)
    return RunConfig.from_dict(sections, source=str(path))


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    bare = path.name == str(path)
    places = [folder / path for folder in RECIPE_FOLDERS] if bare else []
    for place in places:
        if place.is_file():
            return place
    known = sorted({file.name for folder in RECIPE_FOLDERS for file in folder.glob("*.yaml")})
    where = "the current folder and configs/" if bare else "that place"
    hint = did_you_mean(path.name, known) or (f"; recipes: {', '.join(known)}" if bare else "")
    raise ConfigError(f"{path}: no such config file in {where}{hint}")


def _apply(override: str, sections: dict[str, Any]) -> None:
    key, equals, text = override.partition("=")
    steps = key.split(".")
    if not equals or len(steps) < 2 or not all(steps):
        raise ConfigError(f"{override!r}: expected an override of the form section.key=value, such as lora.r=16")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not valid YAML: {error}") from error
    level = sections
    for step in steps[:-1]:
        if not isinstance(level.get(step), dict):
            if level.get(step) is not None:
                raise ConfigError(f"{override!r}: {step} holds {_kind_of(level[step])}, not further keys")
            level[step] = {}
        level = level[step]
    level[steps[-1]] = value


def _build(kind: type, values: Any) -> tuple[Any, list[str]]:
    """One section from its mapping, with the problems found; the section is None where there are any."""
    if not isinstance(values, dict):
        return None, [f"*: expected keys and values, found {_kind_of(values)}"]
    known = {entry.name: entry for entry in dataclasses.fields(kind)}
    kinds = typing.get_type_hints(kind)
    problems = []
    for key, value in values.items():
        if key not in known:
            problems.append(f"{key}: unknown key{did_you_mean(str(key), known)}")
            continue
        _, problem = _checked(value, kinds[key], known[key].metadata)
        if problem:
            problems.append(f"{key}: {problem}")
    return (None if problems else kind(**values)), problems


def _checked(value: Any, kind: Any, rules: typing.Mapping[str, Any]) -> tuple[Any, str]:
    """The value in its field's type, and what is wrong with it (an empty string where nothing is)."""
    value, problem = _typed(value, kind, rules)
    if not problem and "check" in rules:
        problem = rules["check"](value)
    return value, problem


def _typed(value: Any, kind: Any, bounds: typing.Mapping[str, Any]) -> tuple[Any, str]:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and types.NoneType in options:
        return None, ""
    kind = next(option for option in options if option is not types.NoneType)
    origin = typing.get_origin(kind)
    if origin is Literal:
        words = typing.get_args(kind)
        near = did_you_mean(str(value), words)
        return value, "" if value in words else f"expected one of {', '.join(words)}, found {value!r}{near}"
    if origin is tuple:
        item = typing.get_args(kind)[0]
        noun, nouns = ("a word", "words") if item is str else ("a whole number", "whole numbers")
        value = [value] if type(value) is item else value
        good = isinstance(value, (list, tuple)) and all(type(entry) is item for entry in value)
        return (tuple(value), "") if good else (value, f"expected {noun} or a list of {nouns}, found {_kind_of(value)}")
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            return value, f"expected keys and values, found {_kind_of(value)}"
        inner = typing.get_args(kind)[1]
        if inner is Any:
            return value, ""
        typed = {key: _typed(entry, inner, bounds) for key, entry in value.items()}
        problems = [f"{key}: {problem}" for key, (_, problem) in typed.items() if problem]
        return {key: entry for key, (entry, _) in typed.items()}, "; ".join(problems)
    if kind is float:
        return _number(_as_float(value), value, "a number", bounds)
    if kind is int:
        whole = value if isinstance(value, int) and not isinstance(value, bool) else None
        return _number(whole, value, "a whole number", bounds)
    expected = {str: "text", bool: "true or false"}[kind]
    return value, "" if isinstance(value, kind) else f"expected {expected}, found {_kind_of(value)}"


def _as_float(value: Any) -> float | None:
    # PyYAML reads 5e-4 as text (YAML 1.1 wants 5.0e-4), and everybody writes 5e-4.
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def _number(number: Any, value: Any, noun: str, bounds: typing.Mapping[str, Any]) -> tuple[Any, str]:
    low, high, above = bounds.get("low"), bounds.get("high"), bounds.get("above")
    wanted = noun
    if above is not None:
        wanted += f" > {above}"
    if low is not None:
        wanted += f" >= {low}"
    if high is not None:
        wanted += f" and <= {high}"
    if number is None:
        return value, f"expected {wanted}, found {_kind_of(value)}"
    inside = (
        math.isfinite(number)
        and (low is None or number >= low)
        and (high is None or number <= high)
        and (above is None or number > above)
    )
    return number, "" if inside else f"expected {wanted}, found {value}"


def _kind_of(value: Any) -> str:
    words = {dict: "keys and values", list: "a list", type(None): "nothing", bool: f"{str(value).lower()}"}
    return words.get(type(value), repr(value))
