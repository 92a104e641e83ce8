"""The configuration of a run: frozen dataclasses and a strict YAML reader that needs neither torch nor transformers.

A key that is unknown, of the wrong type or out of range is an error; all problems of a file are told in one message.
Recipes live in `configs/`; a bare file name is looked for in the current folder first, then there.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_hf.core.config.fields import Section, bounded, build_section
from lora_hf.core.config.hints import OWN_KEYS, ROLE_ALIASES, hint_for_key
from lora_hf.core.errors import ConfigError, did_you_mean

ROLES = ("q", "k", "v", "o", "ffn_up", "ffn_gate", "ffn_down")
PRESETS = {
    "attention": ("q", "k", "v", "o"),
    "ffn": ("ffn_up", "ffn_gate", "ffn_down"),
    "all": ROLES,
}
INITS = ("default", "gaussian", "pissa", "olora")


def _target_problem(targets: tuple[str, ...]) -> str:
    words = (*ROLES, *PRESETS, "embeddings")
    unknown = [target for target in targets if target not in words and "." not in target]
    if targets and not unknown:
        return ""
    found = ", ".join(
        repr(target)
        + (f" (did you mean {ROLE_ALIASES[target]}?)" if target in ROLE_ALIASES else did_you_mean(target, words))
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
    """Names under `train.hf` that have a key of their own here, and secrets."""
    problems = [f"{name}: set {OWN_KEYS[name]} instead" for name in hf if name in OWN_KEYS]
    secret = [name for name in hf if str(name).endswith("_token")]
    problems += [f"{name}: the config is saved with the run, so no token may be in it; set HF_TOKEN" for name in secret]
    return "; ".join(problems)


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
                kinds[name],
                values if values is not None else {},
                lambda key, _, name=name: hint_for_key(name, key, known_keys()),
            )
            problems += [f"{name}.{problem}" for problem in found]
        if problems:
            return None, problems
        try:
            return cls(**built), []
        except ConfigError as error:
            return None, [str(error)]


def known_keys() -> dict[str, tuple[str, ...]]:
    """The keys of each section."""
    kinds = typing.get_type_hints(RunConfig)
    return {name: tuple(entry.name for entry in dataclasses.fields(kind)) for name, kind in kinds.items()}
