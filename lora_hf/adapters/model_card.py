"""The model card of an adapter: what its files and the record of its run say, and what is unknown.

Every number is read from a record. Nothing identifies the machine: a local folder appears with its base name only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_hf.adapters.format import AdapterMetadata, base_of
from lora_hf.adapters.infer_task import auto_class
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.formatting import table
from lora_hf.core.records import RunRecord, ScoreRecord
from lora_hf.data.tasks.base import Task
from lora_hf.data.tasks.generation import TextGeneration
from lora_hf.data.tasks.registry import get_task, task_names, task_of
from lora_hf.data.tasks.sources import Bundled, LocalOrHub
from lora_hf.models.model_ids import BUNDLED, HUB_IDS, base_name, is_local

# The hub's pipeline by PEFT's task_type.
_PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
}
# An input for the hub's widget by built-in task. Its field holds one text, and rows of a user's own task are private.
_EXAMPLES = {
    **dict.fromkeys(("sst2", "rule-sentiment"), "A moving, funny and wise film."),
    "cola": "They drank the pub dry.",
    **dict.fromkeys(("e2e_nlg", "rule-restaurants"), "name[The Vaults], eatType[pub], food[Italian]"),
    **dict.fromkeys(("dart", "web_nlg"), "Alan_Bean : occupation : Test_pilot"),
}
_RECIPE = ("task.max_length", "model.precision", "model.dropout", "lora.", "train.")  # the settings that the card lists


@dataclass(frozen=True)
class Facts:
    """The sources of a card: the two files of the adapter, and its run if the folder above holds one.

    `config` is the content of adapter_config.json, `run` the resolved config of the run without local paths.
    """

    config: Mapping[str, Any]
    metadata: AdapterMetadata
    run: RunConfig | None = None
    record: RunRecord | None = None
    scores: Sequence[ScoreRecord] = ()

    @property
    def base(self) -> str:
        return base_of(self.config, self.metadata)

    @property
    def hub_base(self) -> str | None:
        """The hub id of the base; None for a local folder and for a bundled base, which are not on the hub."""
        if not self.base or self.base in BUNDLED or is_local(self.base):
            return None
        return HUB_IDS.get(self.base, self.base)

    @property
    def task(self) -> Task | None:
        """The task, if it is a built-in one or the config of the run describes it."""
        if self.run is not None and self.run.task.kind is not None and self.run.task.name == self.metadata.task:
            return task_of(self.run.task)
        return get_task(self.metadata.task) if self.metadata.task in task_names() else None

    @property
    def score_rows(self) -> list[tuple[str, str, str, float]]:
        """Split, subset, metric and value of every score, those of the run record first."""
        metrics = self.record.metrics if self.record else {}
        rows = [(split, "all", name, value) for split, scores in metrics.items() for name, value in scores.items()]
        for record in self.scores:
            for subset, scores in record.metrics.items():
                rows += [(record.split, subset, name, value) for name, value in scores.items() if value is not None]
        return rows


def model_card(repo_id: str, facts: Facts) -> str:
    """The README.md of repository `repo_id`: the YAML header that the hub reads, then Markdown."""
    name = repo_id.split("/")[1]
    parts = [f"---\n{_yaml_header(name, facts)}\n---", f"# {name}", _summary(facts)]
    if facts.record is None:
        parts.append(
            "**Not known:** no record of a run came with this adapter. Its data, scores, library versions and "
            "hyperparameters beyond those above are not stated here."
        )
    else:
        parts += ["## Results", _results(facts, facts.record), "## Data", _data(facts, facts.record)]
    if facts.run is not None:
        parts += ["## Recipe", _recipe(facts.run)]
    if facts.record is not None:
        parts += ["## Parameters", _parameters(facts.record), "## Versions", _versions(facts.record)]
    return "\n\n".join([*parts, "## Use", _usage(repo_id, facts)]) + "\n"


def _yaml_header(name: str, facts: Facts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task, task_type = facts.task, facts.config.get("task_type")
    pipeline = _PIPELINES.get(task_type or "")
    source = task.source if task else None
    dataset = source.hub_id if isinstance(source, LocalOrHub) else None
    results = [
        EvalResult(
            task_type=pipeline or "other",
            dataset_type=dataset or task.name,
            dataset_name=task.name,
            dataset_config=source.hub_config if isinstance(source, LocalOrHub) else None,
            dataset_split=split,
            metric_type=metric.lower(),
            metric_name=metric if subset == "all" else f"{metric}, {subset}",
            metric_value=value,
        )
        for split, subset, metric, value in facts.score_rows
        if task is not None
    ]
    data = ModelCardData(
        library_name="peft",
        base_model=facts.hub_base,
        base_model_relation="adapter" if facts.hub_base else None,
        datasets=[dataset] if dataset and facts.record else None,
        pipeline_tag=pipeline,
        tags=["lora", "lora-hf", *([task.name] if task else [])],
        metrics=list(dict.fromkeys(metric.lower() for _, _, metric, _ in facts.score_rows)) or None,
        model_name=name if results else None,
        eval_results=results or None,
        task_type=task_type,
        widget=_widget(task),
    )
    return data.to_yaml()


def _widget(task: Task | None) -> list[dict[str, str]] | None:
    example = _EXAMPLES.get(task.name) if task else None
    if task is None or example is None:
        return None
    return [{"text": task.context(example) if isinstance(task, TextGeneration) else example}]


def _summary(facts: Facts) -> str:
    base = f"[`{facts.hub_base}`](https://huggingface.co/{facts.hub_base})" if facts.hub_base else "a base"
    if facts.base in BUNDLED:
        base = f"`{facts.base}`, a small base that comes with lora_hf,"
    elif facts.base and not facts.hub_base:
        base = f"`{base_name(facts.base)}`, a base from a local folder that is not known on the hub,"
    if facts.run is not None and facts.run.model.init == "random":
        base += f" with random weights drawn from seed {facts.run.train.seed}"
    metadata = facts.metadata
    task = f" for the task `{metadata.task}`" if metadata.task else ""
    rank = f"r={facts.config.get('r')}, lora_alpha={facts.config.get('lora_alpha')}"
    lines = [f"A LoRA adapter ([arXiv 2106.09685](https://arxiv.org/abs/2106.09685)) on {base}{task}: {rank}."]
    if metadata.labels:
        lines.append(f"Labels, in the order of the logits: {', '.join(f'`{label}`' for label in metadata.labels)}.")
    if metadata.fingerprint:
        lines.append(
            f"The weights of the base had the dtype {metadata.fingerprint['dtype']} and the sha256 "
            f"`{metadata.fingerprint['sha256'][:12]}`. lora_hf loads the adapter on the same weights in any precision, "
            "and refuses other weights."
        )
    return "\n".join(lines)


def _results(facts: Facts, record: RunRecord) -> str:
    rows = []
    for split, subset, metric, value in facts.score_rows:
        majority = record.majority.get(split, {}).get(metric) if subset == "all" else None
        name = split if subset == "all" else f"{split}, {subset}"
        rows.append((name, metric, f"{value:.4f}", "" if majority is None else f"{majority:.4f}"))
    parts = [table(("split", "metric", "value", "majority class"), rows, text_columns=2)]
    best = record.best
    checkpoint = f", of the checkpoint at step {best['step']}, chosen by {best['metric']}" if "step" in best else ""
    parts.append(f"One run, seed {record.seed}{checkpoint}.")
    for scores in facts.scores:
        decoding = ", ".join(f"{key} {value}" for key, value in scores.decoding.items() if key != "batch_size")
        parts.append(f"The texts of {scores.split} ({scores.inputs:,} inputs) were generated with {decoding}.")
    return "\n\n".join([*parts, *(f"**Note:** {warning}" for warning in record.warnings)])


def _data(facts: Facts, record: RunRecord) -> str:
    source = facts.task.source if facts.task else None
    rows = ", ".join(f"{count:,} {split}" for split, count in record.rows.items())
    if isinstance(source, LocalOrHub):
        subset = f" (`{source.hub_config}`)" if source.hub_config else ""
        return f"[`{source.hub_id}`](https://huggingface.co/datasets/{source.hub_id}){subset}: {rows} rows."
    origin = "generated by rules in lora_hf" if isinstance(source, Bundled) else "the author's own data"
    return f"Task `{record.task}`, {origin}: {rows} rows."


def _recipe(run: RunConfig) -> str:
    settings = {f"{section}.{key}": value for section, values in run.to_dict().items() for key, value in values.items()}
    rows = [
        (f"`{key}`", ", ".join(map(str, value)) if isinstance(value, list) else f"{value}")
        for key, value in settings.items()
        if key.startswith(_RECIPE) and value not in (None, {}, "")
    ]
    return (
        f"{table(('setting', 'value'), rows, text_columns=2)}\n\n`config.yaml` in this repository holds all settings."
    )


def _parameters(record: RunRecord) -> str:
    counts = record.parameters
    share = f" ({100 * counts['trainable'] / counts['total']:.2f} %)" if counts.get("total") else ""
    parts = ", ".join(
        f"{counts[part]:,} {word}" for part, word in (("lora", "LoRA"), ("head", "head")) if part in counts
    )
    return f"{counts.get('trainable', 0):,} of {counts.get('total', 0):,} parameters were trained{share}: {parts}."


def _versions(record: RunRecord) -> str:
    known = ", ".join(f"{name} {version}" for name, version in record.versions.items() if version != "not installed")
    commit = record.git.get("commit")
    changed = " and changes since" if record.git.get("changed") else ""
    return f"{known}{f'; lora_hf at commit `{commit[:12]}`{changed}' if commit else ''}."


def _usage(repo_id: str, facts: Facts) -> str:
    if facts.run is not None and facts.run.model.init == "random":
        return f"Only lora_hf can draw the same random base again: `lora-hf eval --adapter {repo_id}`."
    blocks = [
        ("lora_hf", "from lora_hf import load_adapter", f'load_adapter(model, "{repo_id}")'),
        ("peft", "from peft import PeftModel", f'model = PeftModel.from_pretrained(model, "{repo_id}")'),
        ("transformers, which needs peft for this", "", f'model.load_adapter("{repo_id}")'),
    ]
    parts = [f"With {name}:\n\n```python\n{_code(facts, imported, load)}\n```" for name, imported, load in blocks]
    if (task := facts.task) is not None:
        given = "--text TEXT" if task.verb == "predict" and len(task.text_columns) == 1 else "--input FILE"
        parts.append(f"From the command line, with lora_hf: `lora-hf {task.verb} {given} --adapter {repo_id}`.")
    return "\n\n".join(parts)


def _code(facts: Facts, imported: str, load: str) -> str:
    name = auto_class(facts.config.get("task_type")) or "AutoModel"
    lines = [imported, f"from transformers import {name}"]
    base = f'"{facts.hub_base}"' if facts.hub_base else f'"path/to/{base_name(facts.base) or "the-base"}"'
    if facts.base in BUNDLED:
        lines.insert(1, "from lora_hf.models.load import BUNDLED_FOLDER")
        base = f'BUNDLED_FOLDER / "{facts.base}"'
    options = ['dtype="float32"']
    if facts.metadata.num_labels:
        options.append(f"num_labels={facts.metadata.num_labels}")
    if facts.hub_base and facts.metadata.revision:
        options.append(f'revision="{facts.metadata.revision}"')
    call = f"model = {name}.from_pretrained({base}, {', '.join(options)})"
    return "\n".join([*filter(None, lines), "", call, load, "model.eval()"])
