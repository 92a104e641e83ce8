"""The configuration of a run: frozen dataclasses and a strict YAML reader that needs neither torch nor transformers.

A key that is unknown, of the wrong type or out of range is an error; all problems of a file are told in one message.
Recipes live in `configs/`; a bare file name is looked for in the current folder first, then there.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import re
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from lora_hf.core.config.hints import OTHER_NAMES, OURS, ROLE_OF
from lora_hf.core.config.values import Section, bounded, build_section, kind_of
from lora_hf.core.errors import ConfigError, did_you_mean

ROLES = ("q", "k", "v", "o", "ffn_up", "ffn_gate", "ffn_down")
PRESETS = {
    "attention": ("q", "k", "v", "o"),
    "ffn": ("ffn_up", "ffn_gate", "ffn_down"),
    "all": ROLES,
}
INITS = ("default", "gaussian", "pissa", "olora")
FORM = "expected an override of the form section.key=value, such as"
RECIPE_FOLDERS = (Path("configs"), Path(__file__).parents[3] / "configs", Path(__file__).parents[2] / "configs")


def _target_problem(targets: tuple[str, ...]) -> str:
    words = (*ROLES, *PRESETS, "embeddings")
    unknown = [target for target in targets if target not in words and "." not in target]
    if targets and not unknown:
        return ""
    found = ", ".join(
        repr(target) + (f" (did you mean {ROLE_OF[target]}?)" if target in ROLE_OF else did_you_mean(target, words))
        for target in unknown
    )
    return f"expected some of {', '.join(words)}, or a module path with dots, found {found or 'nothing'}"


def _pattern_problem(patterns: dict[str, Any]) -> str:
    return _target_problem(tuple(patterns)) if patterns else ""


def _init_problem(init: str) -> str:
    if init in INITS or re.fullmatch(r"pissa_niter_[1-9]\d*", init):
        return ""
    return f"expected one of {', '.join(INITS)}, pissa_niter_[n], found {init!r}{did_you_mean(init, INITS)}"


def _path_problem(path: str) -> str:
    return "" if path.isprintable() and path else f"expected a folder, found {path!r}"


def _name_problem(name: str | None) -> str:
    """A run folder lies in output.dir and nowhere else."""
    if name is None or (name.isprintable() and name not in ("", ".", "..") and not set(name) & set("/\\")):
        return ""
    return f"expected the name of a folder in output.dir, without a path, found {name!r}"


def _hf_problem(hf: dict[str, Any]) -> str:
    """Names under `train.hf` that are not fields of TrainingArguments, or that have a key of their own here."""
    problems = [f"{name}: set {OURS[name]} instead" for name in hf if name in OURS]
    secret = [name for name in hf if str(name).endswith("_token")]
    problems += [f"{name}: a config is kept with the run, so no token goes into it; set HF_TOKEN" for name in secret]
    rest = [name for name in hf if name not in (*OURS, *secret)]
    known = _training_argument_names() if rest else ()
    problems += [
        f"{name}: not a field of transformers.TrainingArguments{did_you_mean(name, known)}"
        for name in rest
        if name not in known
    ]
    return "; ".join(problems)


@functools.cache
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


@dataclass(frozen=True)
class ModelConfig(Section):
    """The base model: `name` is a hub id, a local folder, or an embedded base (`tiny-roberta`, `tiny-gpt2`)."""

    name: str = "FacebookAI/roberta-base"
    revision: str | None = None
    tokenizer: str | None = None  # a hub id or folder, where it is not the model's own
    init: Literal["pretrained", "random"] = "pretrained"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the base; auto: bf16 where it is faster here
    quantised: Literal["int8", "nf4"] | None = (
        None  # how its projections are held; computed in `precision` all the same
    )
    dropout: float | None = bounded(None, low=0, high=0.99)  # of the base, all kinds of it; without: the model's own


@dataclass(frozen=True)
class TaskConfig(Section):
    """The data: `data_dir` is a local folder, else `$LORA_HF_DATA_DIR`, else the hub.

    With `kind` the rows are a person's own, and the keys after it say which columns of their files hold what.
    """

    name: str = "sst2"
    data_dir: str | None = None
    max_length: int = bounded(512, low=4)
    kind: Literal["classification", "regression", "generation"] | None = None
    text_columns: tuple[str, ...] | None = None  # without: text, or prompt where a text is to be written
    label_column: str | None = None  # without: label, or completion
    label_names: tuple[str, ...] | None = None  # of the classes, in the order of their numbers
    metric: Literal["accuracy", "macro_f1", "matthews_correlation", "pearson", "spearmanr"] | None = None


@dataclass(frozen=True)
class LoraConfig(Section):
    """What to adapt and how strongly: `delta_weight = (lora_alpha / r) * lora_B @ lora_A`.

    Source: LoRA, arXiv 2106.09685, section 4.1.

    `targets` holds roles (`q k v o ffn_up ffn_gate ffn_down`), presets (`attention ffn all`), `embeddings` (of the
    tokens; in no preset), or, for what has no role, anchored module paths in which `*` stands for one segment
    (`encoder.layer.*.output.dense`). The keys of `rank_pattern` and `alpha_pattern` are such words too; the first that
    fits a place gives its number there.
    """

    r: int = bounded(8, low=1)
    lora_alpha: float = bounded(8, above=0)
    lora_dropout: float = bounded(0.0, low=0, high=0.99)
    targets: tuple[str, ...] = field(default=("q", "v"), metadata={"check": _target_problem})
    layers: tuple[int, ...] | None = None  # of the model, -1 is the last; without: all
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"check": _pattern_problem, "low": 1})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"check": _pattern_problem, "above": 0})
    use_rslora: bool = False  # scaling = lora_alpha / sqrt(r): arXiv 2312.03732
    use_dora: bool = False  # magnitude and direction apart: arXiv 2402.09353
    bias: Literal["none", "all", "lora_only"] = "none"  # of the base, which to train beside
    init_lora_weights: str = field(default="default", metadata={"check": _init_problem})


@dataclass(frozen=True)
class TrainConfig(Section):
    """The fine-tuning. `method: head` trains the task head alone, `full` everything: what LoRA is compared with."""

    method: Literal["lora", "full", "head"] = "lora"
    epochs: float = bounded(3.0, above=0, high=1e6)
    max_steps: int | None = bounded(None, low=1)  # overrides epochs
    batch_size: int = bounded(16, low=1)
    eval_batch_size: int = bounded(64, low=1)
    gradient_accumulation: int = bounded(1, low=1)
    lr: float = bounded(5e-4, above=0)
    loraplus_lr_ratio: float | None = bounded(None, above=0)  # of lr, for LoRA's B: arXiv 2402.12354
    weight_decay: float = bounded(0.0, low=0)
    warmup_ratio: float = bounded(0.06, low=0, high=1)
    warmup_steps: int | None = bounded(None, low=0)  # overrides warmup_ratio
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    max_grad_norm: float = bounded(1.0, low=0)  # 0: gradients are not clipped
    label_smoothing: float = bounded(0.0, low=0, high=1)
    group_by_prompt: bool = False  # generation: rows of one input together in a batch, where it is encoded once
    seed: int = bounded(0, low=0, high=2**32 - 1)
    patience: int | None = bounded(None, low=1)  # evaluations without a better score before the run stops early
    start_from: str | None = None  # an adapter whose LoRA weights (not its head) the run starts from
    hf: dict[str, Any] = field(
        default_factory=dict, metadata={"check": _hf_problem}
    )  # any other field of transformers.TrainingArguments


@dataclass(frozen=True)
class GenerateConfig(Section):
    """The decoding: greedy with `num_beams: 1`, beam search above it, sampling with `do_sample: true`."""

    num_beams: int = bounded(1, low=1)
    length_penalty: float = bounded(1.0, low=-10, high=10)  # a beam's score is its log-probability / length ** this
    no_repeat_ngram_size: int = bounded(0, low=0)  # 0: n-grams may repeat
    max_new_tokens: int = bounded(64, low=1)
    do_sample: bool = False
    temperature: float = bounded(1.0, above=0)
    top_p: float = bounded(1.0, above=0, high=1)
    top_k: int = bounded(0, low=0)  # 0: all tokens
    seed: int = bounded(0, low=0, high=2**32 - 1)
    batch_size: int = bounded(16, low=1)


@dataclass(frozen=True)
class OutputConfig(Section):
    """Where the run folder goes: `<dir>/<name>`; without a name, one is made of task, model, method and time."""

    dir: str = field(default="outputs", metadata={"check": _path_problem})
    name: str | None = field(default=None, metadata={"check": _name_problem})
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

    def __post_init__(self) -> None:
        if self.model.quantised and self.train.method == "full":
            raise ConfigError(
                f"model.quantised: {self.model.quantised} weights cannot be trained, and train.method=full trains "
                "them; leave model.quantised out, or set train.method=lora"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML and JSON; `from_dict` of it gives an equal config."""
        plain = dataclasses.asdict(self)
        for section in plain.values():
            section.update({key: list(value) for key, value in section.items() if isinstance(value, tuple)})
        return plain

    @classmethod
    def from_dict(cls, sections: dict[str, Any], source: str = "config") -> RunConfig:
        """Builds a config from nested mappings.

        Raises:
            ConfigError: all problems at once, each with its key, what was expected and what was found.
        """
        config, problems = cls.check(sections)
        if config is None:
            count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
            raise ConfigError("\n  ".join([f"{source}: {count}", *problems]))
        return config

    @classmethod
    def check(cls, sections: dict[str, Any]) -> tuple[RunConfig | None, list[str]]:
        """The config of nested mappings and no problems, or None and everything that is wrong with them."""
        kinds = typing.get_type_hints(cls)
        problems, built = [], {}
        for name, values in sections.items():
            if name not in kinds:
                problems.append(f"{name}: unknown section{did_you_mean(str(name), kinds)}; expected {', '.join(kinds)}")
                continue
            built[name], found = build_section(
                kinds[name], values if values is not None else {}, functools.partial(_hint, name)
            )
            problems += [f"{name}.{problem}" for problem in found]
        if problems:
            return None, problems
        try:
            return cls(**built), []
        except ConfigError as error:
            return None, [str(error)]


def keys_called(word: str) -> list[str]:
    """The keys, as `section.key`, that `word` names here or in transformers and peft."""
    kinds = typing.get_type_hints(RunConfig)
    found = [f"{name}.{word}" for name, kind in kinds.items() if word in kind.__dataclass_fields__]
    return list(dict.fromkeys([*found, *([OTHER_NAMES[word]] if word in OTHER_NAMES else [])]))


def _hint(section: str, key: str, known: Iterable[str]) -> str:
    """What an unknown key of a section may mean: the same thing by our name, else the nearest name."""
    meant = keys_called(key)
    here = [full.partition(".")[2] for full in meant if full.startswith(f"{section}.")]
    if not meant and section == "train" and key in _training_argument_names():
        meant = [f"train.hf.{key}"]
    return f" (did you mean {' or '.join(map(repr, here or meant))}?)" if meant else did_you_mean(key, known)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML recipe and applies overrides such as `lora.r=16`.

    Raises:
        ConfigError: a missing or malformed file, or any key that is unknown, mistyped or out of range.
    """
    return RunConfig.from_dict(read_sections(path, overrides), source=str(path))


def read_sections(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a YAML recipe says with the overrides applied, its keys and values not yet checked.

    Raises:
        ConfigError: a missing or malformed file or override.
    """
    file = _find(Path(path))
    try:
        sections = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"{path}: not a readable YAML file: {error}") from error
    if not isinstance(sections, dict):
        raise ConfigError(f"{path}: expected sections such as 'model:' and 'task:', found {kind_of(sections)}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r}: {FORM} lora.r=16")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"{override!r}: the value is not valid YAML: {error}") from error
        set_value(sections, key, value, override)
    return sections


def set_value(sections: dict[str, Any], key: str, value: Any, said: str) -> None:
    """Puts the value where `section.key` points to, in place.

    Raises:
        ConfigError: `key` has no section, or leads through something that holds no keys; opens with what was `said`.
    """
    steps = key.split(".")
    if len(steps) < 2 or not all(steps):
        meant = [f"{full}{said.removeprefix(key)}" for full in keys_called(key)]
        raise ConfigError(f"{said!r}: {FORM} {' or '.join(meant) or 'lora.r=16'}")
    level = sections
    for step in steps[:-1]:
        if not isinstance(level.get(step), dict):
            if level.get(step) is not None:
                raise ConfigError(f"{said!r}: {step} holds {kind_of(level[step])}, not further keys")
            level[step] = {}
        level = level[step]
    level[steps[-1]] = value


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
