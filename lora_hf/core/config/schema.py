"""The config of a run: frozen dataclasses with strict checks.

A key that is unknown, of the wrong type or out of range is an error, and one message reports all problems of a config.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import InitVar, dataclass, field
from functools import partial
from typing import Any, Literal

from lora_hf.core.config.fields import Section, build_section, field_types, setting
from lora_hf.core.config.hints import OWN_KEYS, REFUSED_FIELDS, hint_for_key, hint_for_section
from lora_hf.core.errors import ConfigError, did_you_mean

ROLES = ("q", "k", "v", "o", "ffn_up", "ffn_gate", "ffn_down")
PRESETS = {
    "attention": ("q", "k", "v", "o"),
    "ffn": ("ffn_up", "ffn_gate", "ffn_down"),
    "all": ROLES,
}
MAX_NAME, MAX_PATH = 200, 4000  # bytes of a folder's name, and characters of a path: file systems take 255 and 4096
INITS = ("default", "gaussian", "pissa", "olora")
TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")  # PEFT's
Metric = Literal[
    "accuracy",
    "macro_f1",
    "matthews_correlation",
    "micro_f1",
    "mean_average_precision",
    "pearson",
    "spearmanr",
    "f1",
    "exact_match",
]


def _target_problem(targets: tuple[str, ...]) -> str:
    # Whether a module has such a name is known once the model is there (`lora.target_modules`).
    return "" if targets and all(targets) else "expected at least one target, found none"


def _init_problem(init: str) -> str:
    if init in INITS or re.fullmatch(r"pissa_niter_[1-9]\d*", init):
        return ""
    return f"expected one of {', '.join(INITS)}, pissa_niter_[n], found {init!r}{did_you_mean(init, INITS)}"


def _path_problem(path: str) -> str:
    if not path.isprintable() or not path:
        return f"expected a folder, found {path!r}"
    longest = max(re.split(r"[/\\]", path), key=_byte_length)
    return _length_problem(longest) or ("" if len(path) < MAX_PATH else f"expected a shorter path, found {path!r:.60}")


def _length_problem(name: str) -> str:
    length = _byte_length(name)
    return "" if length <= MAX_NAME else f"expected a name of at most {MAX_NAME} bytes, found {name!r:.60} of {length}"


def _byte_length(name: str) -> int:
    return len(name.encode("utf-8", "surrogatepass"))


def _name_problem(name: str | None) -> str:
    # A name with a path would put the run folder outside output.dir.
    if name is None or (name.isprintable() and name not in ("", ".", "..") and not set(name) & set("/\\")):
        return "" if name is None else _length_problem(name)
    return f"expected the name of a folder in output.dir, without a path, found {name!r}"


def _hf_problem(hf: dict[str, Any]) -> str:
    # `training.validation` checks the names against transformers.TrainingArguments.
    problems = [f"{name}: set {OWN_KEYS[name]} instead" for name in hf if name in OWN_KEYS]
    problems += [f"{name}: {REFUSED_FIELDS[name]}; leave it out" for name in hf if name in REFUSED_FIELDS]
    tokens = [name for name in hf if name.endswith("_token")]
    problems += [f"{name}: the run folder would hold the token; set HF_TOKEN instead" for name in tokens]
    return "; ".join(problems)


@dataclass(frozen=True)
class ModelConfig(Section):
    """The base model."""

    name: str = setting(
        "FacebookAI/roberta-base", "a hub id, a local folder, or a bundled base (tiny-roberta, tiny-gpt2)"
    )
    revision: str | None = setting(None, "a branch, tag or commit of the hub repository")
    tokenizer: str | None = setting(None, "a hub id or folder; by default the model's own")
    init: Literal["pretrained", "random"] = setting("pretrained", "random draws all weights from train.seed")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", "of the base; auto is bf16 where it is faster")
    quantised: Literal["int8", "nf4"] | None = setting(None, "storage of the projections; they compute in precision")
    dropout: float | None = setting(None, "all dropouts of the base; by default the model's own", low=0, high=0.99)


@dataclass(frozen=True)
class TaskConfig(Section):
    """The data. `kind` declares a custom task; the keys after it describe the columns of its files."""

    name: str = setting("sst2", "a built-in task, or with kind the name of your own")
    data_dir: str | None = setting(None, "folder with the rows; by default $LORA_HF_DATA_DIR, else the hub")
    max_length: int = setting(512, "tokens of a row; longer ones are truncated", low=4)
    kind: (
        Literal[
            "classification",
            "multi_label",
            "regression",
            "generation",
            "chat",
            "tokens",
            "question_answering",
            "seq2seq",
        ]
        | None
    ) = setting(None, "what your own task is")
    text_columns: tuple[str, ...] | None = setting(
        None, "columns of the inputs; by default those of the kind, such as text or prompt", names=True
    )
    label_column: str | None = setting(
        None, "column of the answers; by default that of the kind, such as label", names=True
    )
    label_names: tuple[str, ...] | None = setting(
        None, "the classes, in the order of their ids; by default those of the training rows", names=True
    )
    label_separator: str | None = setting(None, "multi_label: between the labels, if the column holds text")
    label_columns: tuple[str, ...] | None = setting(
        None, "multi_label: a column of 0 and 1 for each label, instead of label_column", names=True
    )
    thresholds: tuple[float, ...] | None = setting(
        None, "multi_label: from which probability each label is predicted; a run chooses them", low=0, high=1
    )
    metric: Metric | None = setting(None, "what chooses the best checkpoint; by default the kind's first metric")
    validation: float | None = setting(
        None, "your own task: fraction of the train rows to validate on instead of a file", above=0, high=0.9
    )
    train_rows: int | None = setting(None, "how many of the training rows to train on; by default all", low=1)
    split_seed: int = setting(0, "seed of validation and train_rows; train.seed does not change the rows", low=0)
    stride: int | None = setting(
        None,
        "tokens, question_answering: tokens that two windows of a long row share; by default max_length / 3",
        low=0,
    )
    null_score_threshold: float | None = setting(
        None, "question_answering: allows questions without an answer; 'no answer' must lead by more than this"
    )
    prefix: str = setting("", "seq2seq: text before each source, such as 'summarize: '")
    source_lang: str | None = setting(None, "seq2seq: the tokenizer's code for the sources' language, such as en_XX")
    target_lang: str | None = setting(None, "seq2seq: the tokenizer's code for the targets' language")
    train_on: Literal["all", "last"] = setting("all", "chat: every assistant turn, or the last one of a conversation")
    chat_template: str | None = setting(
        None, "chat: chatml, or a file with a Jinja template; by default the tokenizer's own"
    )
    drop_unlearnable: bool = setting(False, "chat: skip conversations with nothing left to train on")


@dataclass(frozen=True)
class LoraConfig(Section):
    """The adapter: `delta_weight = (lora_alpha / r) * lora_B @ lora_A`.

    Source: LoRA, arXiv 2106.09685, section 4.1.

    `targets` holds roles (`q k v o ffn_up ffn_gate ffn_down`), presets (`attention ffn all`), `embeddings` (token
    embeddings, in no preset), module paths in which `*` matches one segment (`encoder.layer.*.output.dense`), and what
    PEFT's target_modules takes: `all-linear`, ends of paths (`q_proj`) and a regular expression. `rank_pattern` and
    `alpha_pattern` have such targets as keys; the first key that matches a module sets its rank or alpha.

    In Python, PEFT's names work too: `target_modules` for `targets`, `layers_to_transform` for `layers`, None for what
    is empty, True for the default of `init_lora_weights`, and a `task_type`, which `inject` compares with the model.
    """

    r: int = setting(8, "rank of A and B", low=1)
    lora_alpha: float = setting(8, "the adapter is scaled by lora_alpha / r", above=0)
    lora_dropout: float = setting(0.0, "dropout of the adapter's input", low=0, high=0.99)
    targets: tuple[str, ...] = setting(
        ("all",), "adapted modules: roles, presets, paths, or PEFT's target_modules", check=_target_problem
    )
    layers: tuple[int, ...] | None = setting(None, "numbers of the adapted layers, -1 is the last; by default all")
    modules_to_save: tuple[str, ...] = setting((), "modules to train fully besides the head: paths or ends of paths")
    rank_pattern: dict[str, int] = setting({}, "rank of single targets", low=1)
    alpha_pattern: dict[str, float] = setting({}, "lora_alpha of single targets", above=0)
    use_rslora: bool = setting(False, "scale by lora_alpha / sqrt(r): arXiv 2312.03732")
    use_dora: bool = setting(False, "train magnitude and direction separately: arXiv 2402.09353")
    bias: Literal["none", "all", "lora_only"] = setting("none", "which biases of the base are trained")
    init_lora_weights: str = setting("default", f"start of A and B: {', '.join(INITS)}", check=_init_problem)
    target_modules: InitVar[str | Iterable[str] | None] = None
    layers_to_transform: InitVar[int | Iterable[int] | None] = None
    task_type: InitVar[str | None] = None

    def __post_init__(  # type: ignore[override]
        self,
        target_modules: str | Iterable[str] | None,
        layers_to_transform: int | Iterable[int] | None,
        task_type: str | None,
    ) -> None:
        given = {"targets": ("target_modules", target_modules), "layers": ("layers_to_transform", layers_to_transform)}
        for name, (other, value) in given.items():
            if value is None:
                continue
            if getattr(self, name) != getattr(type(self), name):
                raise ConfigError(f"{name} and {other} mean the same; give one of them")
            object.__setattr__(self, name, value if isinstance(value, (str, int)) else tuple(value))
        for name in ("modules_to_save", "rank_pattern", "alpha_pattern"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, () if name == "modules_to_save" else {})
        init: Any = self.init_lora_weights
        if init is False:
            raise ConfigError(
                "init_lora_weights: False draws B at random in PEFT, so the model changes before it is trained; "
                f"lora_hf starts with B = 0: expected True or one of {', '.join(INITS)}"
            )
        if init is True:
            object.__setattr__(self, "init_lora_weights", "default")
        super().__post_init__()
        if task_type is not None and task_type not in TASK_TYPES:
            raise ConfigError(f"task_type: expected one of {', '.join(TASK_TYPES)}, found {task_type!r}")
        object.__setattr__(self, "task_type", task_type)


@dataclass(frozen=True)
class TrainConfig(Section):
    """The fine-tuning."""

    method: Literal["lora", "full", "head"] = setting("lora", "full trains all weights, head the task head alone")
    epochs: float = setting(3.0, "passes over the training rows", above=0, high=1e6)
    max_steps: int | None = setting(None, "overrides epochs", low=1)
    batch_size: int = setting(16, "training rows per step and process", low=1)
    eval_batch_size: int = setting(64, "rows per evaluation batch", low=1)
    gradient_accumulation: int = setting(1, "batches per optimizer step", low=1)
    lr: float = setting(5e-4, "peak learning rate", above=0)
    loraplus_lr_ratio: float | None = setting(None, "learning rate of B / lr (LoRA+, arXiv 2402.12354)", above=0)
    weight_decay: float = setting(0.0, "of AdamW", low=0)
    warmup_ratio: float = setting(0.06, "share of the steps with a rising learning rate", low=0, high=1)
    warmup_steps: int | None = setting(None, "overrides warmup_ratio", low=0)
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = setting(
        "linear", "the learning rate after warm-up"
    )
    max_grad_norm: float = setting(1.0, "gradient clipping; 0 turns it off", low=0)
    label_smoothing: float = setting(0.0, "share of a label that is spread over all classes", low=0, high=1)
    class_weights: Literal["balanced"] | dict[str, float] | None = setting(
        None, "of the classes in the loss: balanced, or a weight by name, 1 for the others", above=0, names=True
    )
    group_by_prompt: bool = setting(False, "generation: batch the rows of one prompt, which is computed once")
    seed: int = setting(0, "of weights, row order and dropout", low=0, high=2**32 - 1)
    patience: int | None = setting(None, "stop after this many evaluations without a better score", low=1)
    start_from: str | None = setting(None, "start from the LoRA weights of this adapter, but not from its head")
    hf: dict[str, Any] = setting({}, "other fields of transformers.TrainingArguments", check=_hf_problem)


@dataclass(frozen=True)
class GenerateConfig(Section):
    """Decoding: greedy with `num_beams: 1`, beam search with more, sampling with `do_sample: true`.

    A seq2seq task decodes as the base's generation_config says; the settings that a config gives take precedence.
    """

    num_beams: int = setting(1, "beams of beam search; 1 is greedy", low=1)
    length_penalty: float = setting(1.0, "a beam's score is log-probability / length ** this", low=-10, high=10)
    no_repeat_ngram_size: int = setting(0, "no n-gram of this size occurs twice; 0 turns it off", low=0)
    max_new_tokens: int = setting(64, "longest text, in tokens", low=1)
    do_sample: bool = setting(False, "sample tokens instead of taking the most likely one")
    temperature: float = setting(1.0, "sampling temperature", above=0)
    top_p: float = setting(1.0, "sample from the likeliest tokens with this total probability", above=0, high=1)
    top_k: int = setting(0, "sample from this many likeliest tokens; 0 is all", low=0)
    seed: int = setting(0, "random seed of sampling", low=0, high=2**32 - 1)
    batch_size: int = setting(16, "prompts per batch", low=1)
    from_base: tuple[str, ...] | None = setting(
        None, "seq2seq: settings to take from the base's generation_config; by default those you do not set"
    )

    def override(self, **values: Any) -> GenerateConfig:
        """Returns the config with these values, which the base's own settings do not replace."""
        kept = None if self.from_base is None else tuple(name for name in self.from_base if name not in values)
        return dataclasses.replace(self, **values, from_base=kept)

    def with_base_settings(self, given: Iterable[str] | None = None) -> GenerateConfig:
        """Returns the config with `from_base`: what is not in `given`, by default what has its default value."""
        if self.from_base is not None:
            return self
        plain = GenerateConfig()
        names = [name for name in vars(plain) if name not in ("seed", "batch_size", "from_base")]
        if given is None:
            given = [name for name in names if getattr(self, name) != getattr(plain, name)]
        return dataclasses.replace(self, from_base=tuple(name for name in names if name not in given))


@dataclass(frozen=True)
class OutputConfig(Section):
    """The run folder `<dir>/<name>`."""

    dir: str = setting("outputs", "parent of the run folders", check=_path_problem)
    name: str | None = setting(None, "by default made of task, model, method and time", check=_name_problem)
    overwrite: bool = setting(False, "replace the results of an earlier run of this name")
    plots: bool = setting(True, "draw the curves, and a classifier's confusion matrix and reliability")


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
                f"model.quantised={self.model.quantised}: train.method=full cannot train quantized weights; leave "
                "model.quantised out, or set train.method=lora"
            )
        if self.task.kind == "seq2seq":
            object.__setattr__(self, "generate", self.generate.with_base_settings())

    def to_dict(self) -> dict[str, Any]:
        """Returns values for YAML and JSON, which `from_dict` turns into an equal config."""
        sections = dataclasses.asdict(self)
        for section in sections.values():
            section.update({key: list(value) for key, value in section.items() if isinstance(value, tuple)})
        generate = sections["generate"]
        for name in generate.pop("from_base") or ():  # what is not given, is the base's own
            del generate[name]
        return sections

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
        """Returns the config of nested mappings and no problems, or None and all problems."""
        kinds = field_types(cls)
        problems, built = [], {}
        for name, values in sections.items():
            if name not in kinds:
                problems.append(f"{name}: unknown section{hint_for_section(str(name), known_keys())}")
                continue
            hint = partial(hint_for_key, name, known=known_keys())
            built[name], wrong = build_section(kinds[name], {} if values is None else values, hint)
            problems += [f"{name}.{problem}" for problem in wrong]
        if problems:
            return None, problems
        if "task" in built and built["task"].kind == "seq2seq":
            generate = built.get("generate") or GenerateConfig()
            built["generate"] = generate.with_base_settings(sections.get("generate") or ())
        try:
            return cls(**built), []
        except ConfigError as error:
            return None, [str(error)]


def known_keys() -> dict[str, tuple[str, ...]]:
    """Returns the keys of each section."""
    kinds = field_types(RunConfig)
    return {name: tuple(entry.name for entry in dataclasses.fields(kind)) for name, kind in kinds.items()}
