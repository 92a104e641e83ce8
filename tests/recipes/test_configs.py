"""Every recipe against what was published, typed here a second time, and the loader against what people mistype.

The paper is LoRA, arXiv 2106.09685, Tables 2, 3, 9, 10 and 11; the repository is microsoft/LoRA, examples/NLU/*.sh and
examples/NLG/README.md.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from lora_hf.core.config.hints import KEY_ALIASES, ROLE_ALIASES
from lora_hf.core.config.loader import load_config
from lora_hf.core.config.schema import LoraConfig, RunConfig
from lora_hf.core.errors import ConfigError
from lora_hf.data.tasks.registry import task_names

REPO = Path(__file__).parents[2]
TARGETS = "q, k, v, o, ffn_up, ffn_gate, ffn_down, attention, ffn, all, embeddings, or a module path with dots"
SCHEDULES = "linear, cosine, constant, constant_with_warmup"
RECIPES = sorted((REPO / "configs").glob("*.yaml"))
GLUE_RECIPES = sorted((REPO / "configs").glob("glue_*.yaml"))
NLG_RECIPES = sorted(file for kind in ("e2e", "dart", "webnlg") for file in (REPO / "configs").glob(f"{kind}_*.yaml"))
TASKS = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")
FROM_MNLI = ("mrpc", "rte", "stsb")

BASE, LARGE, XXL = "FacebookAI/roberta-base", "FacebookAI/roberta-large", "microsoft/deberta-v2-xxlarge"

# file: model, batch, epochs, lr, r, alpha, max_length, weight_decay, warmup_ratio, published score
PAPER = {
    "glue_mnli": (BASE, 16, 30, 5e-4, 8, 8, 512, 0, 0.06, "87.5±.3"),
    "glue_sst2": (BASE, 16, 60, 5e-4, 8, 8, 512, 0, 0.06, "95.1±.2"),
    "glue_mrpc": (BASE, 16, 30, 4e-4, 8, 8, 512, 0, 0.06, "89.7±.7"),
    "glue_cola": (BASE, 32, 80, 4e-4, 8, 8, 512, 0, 0.06, "63.4±1.2"),
    "glue_qnli": (BASE, 32, 25, 4e-4, 8, 8, 512, 0, 0.06, "93.3±.3"),
    "glue_qqp": (BASE, 16, 25, 5e-4, 8, 8, 512, 0, 0.06, "90.8±.1"),
    "glue_rte": (BASE, 32, 80, 5e-4, 8, 8, 512, 0, 0.06, "86.6±.7"),
    "glue_stsb": (BASE, 16, 40, 4e-4, 8, 8, 512, 0, 0.06, "91.5±.2"),
    "glue_mnli_large": (LARGE, 4, 10, 3e-4, 8, 16, 128, 0, 0.06, "90.6±.2"),
    "glue_sst2_large": (LARGE, 4, 10, 4e-4, 8, 16, 128, 0, 0.06, "96.2±.5"),
    "glue_mrpc_large": (LARGE, 4, 20, 3e-4, 8, 16, 512, 0, 0.06, "90.9±1.2"),
    "glue_cola_large": (LARGE, 4, 20, 2e-4, 8, 16, 128, 0, 0.06, "68.2±1.9"),
    "glue_qnli_large": (LARGE, 4, 10, 2e-4, 8, 16, 512, 0, 0.06, "94.9±.3"),
    "glue_qqp_large": (LARGE, 4, 20, 3e-4, 8, 16, 512, 0, 0.06, "91.6±.1"),
    "glue_rte_large": (LARGE, 8, 20, 4e-4, 8, 16, 512, 0, 0.06, "87.4±2.5"),
    "glue_stsb_large": (LARGE, 8, 30, 2e-4, 8, 16, 512, 0, 0.06, "92.6±.2"),
    "glue_mnli_deberta_xxl": (XXL, 8, 5, 1e-4, 8, 8, 256, 0, 0.1, "91.9±.2"),
    "glue_sst2_deberta_xxl": (XXL, 8, 16, 6e-5, 8, 8, 128, 0.01, 0.1, "96.9±.2"),
    "glue_mrpc_deberta_xxl": (XXL, 32, 30, 2e-4, 8, 8, 128, 0.01, 0.1, "92.6±.6"),
    "glue_cola_deberta_xxl": (XXL, 4, 10, 1e-4, 8, 8, 64, 0, 0.1, "72.4±1.1"),
    "glue_qnli_deberta_xxl": (XXL, 6, 8, 1e-4, 8, 8, 512, 0.01, 0.1, "96.0±.1"),
    "glue_qqp_deberta_xxl": (XXL, 8, 11, 1e-4, 8, 8, 320, 0.01, 0.1, "92.9±.1"),
    "glue_rte_deberta_xxl": (XXL, 4, 11, 2e-4, 8, 8, 320, 0.01, 0.1, "94.9±.4"),
    "glue_stsb_deberta_xxl": (XXL, 4, 10, 2e-4, 8, 8, 128, 0.1, 0.1, "93.0±.2"),
}

# file: model, batch as printed in the script, GPUs, epochs, lr, r, alpha, max_length, weight_decay, warm-up
# (a whole number is steps, else a share of all steps)
REPOSITORY = {
    "glue_mnli_repo": (BASE, 16, 8, 30, 5e-4, 8, 16, 512, 0.1, 0.06),
    "glue_sst2_repo": (BASE, 16, 8, 60, 5e-4, 8, 16, 512, 0.1, 0.06),
    "glue_mrpc_repo": (BASE, 16, 8, 30, 4e-4, 8, 16, 512, 0.1, 0.06),
    "glue_cola_repo": (BASE, 32, 2, 80, 4e-4, 8, 16, 512, 0.1, 0.06),
    "glue_qnli_repo": (BASE, 32, 8, 25, 4e-4, 8, 16, 512, 0.1, 0.06),
    "glue_qqp_repo": (BASE, 16, 8, 25, 5e-4, 8, 16, 512, 0.1, 0.06),
    "glue_rte_repo": (BASE, 32, 8, 80, 5e-4, 8, 16, 512, 0.1, 0.06),
    "glue_stsb_repo": (BASE, 16, 8, 40, 4e-4, 8, 16, 512, 0.1, 0.06),
    "glue_cola_large_repo": (LARGE, 4, 8, 20, 3e-4, 8, 16, 128, 0.1, 0.06),
    "glue_mnli_deberta_xxl_repo": (XXL, 8, 8, 5, 1e-4, 16, 32, 256, 0, 1000),
    "glue_sst2_deberta_xxl_repo": (XXL, 8, 8, 16, 6e-5, 16, 32, 128, 0.01, 1000),
    "glue_mrpc_deberta_xxl_repo": (XXL, 32, 8, 30, 2e-4, 16, 32, 128, 0.01, 0.1),
    "glue_cola_deberta_xxl_repo": (XXL, 4, 8, 10, 1.3e-4, 16, 32, 64, 0, 100),
    "glue_qnli_deberta_xxl_repo": (XXL, 6, 8, 8, 1e-4, 16, 32, 512, 0.01, 500),
    "glue_qqp_deberta_xxl_repo": (XXL, 8, 8, 11, 1e-4, 16, 32, 320, 0.01, 10000),
    "glue_rte_deberta_xxl_repo": (XXL, 4, 8, 11, 2.6e-4, 16, 32, 320, 0.01, 50),
    "glue_stsb_deberta_xxl_repo": (XXL, 4, 8, 10, 2e-4, 16, 32, 128, 0.1, 100),
}

SMALL, MEDIUM, LARGER = (f"openai-community/gpt2{size}" for size in ("", "-medium", "-large"))

# file: model, task, weight_decay, lora_dropout, label_smoothing, length_penalty, published BLEU
NLG_PAPER = {
    "e2e_gpt2": (SMALL, "e2e_nlg", 0.01, 0.1, 0.1, 0.9, None),
    "e2e_gpt2_medium": (MEDIUM, "e2e_nlg", 0.01, 0.1, 0.1, 0.9, "70.4±.1"),
    "e2e_gpt2_large": (LARGER, "e2e_nlg", 0.01, 0.1, 0.1, 0.9, "70.4±.1"),
    "webnlg_gpt2": (SMALL, "web_nlg", 0.01, 0.1, 0.1, 0.8, None),
    "webnlg_gpt2_medium": (MEDIUM, "web_nlg", 0.01, 0.1, 0.1, 0.8, "46.7±.4 unseen, 62.1±.2 seen, 55.3±.2 all"),
    "webnlg_gpt2_large": (LARGER, "web_nlg", 0.01, 0.1, 0.1, 0.8, "48.4±.3 unseen, 64.0±.3 seen, 57.0±.1 all"),
    "dart_gpt2": (SMALL, "dart", 0, 0, 0, 0.8, None),
    "dart_gpt2_medium": (MEDIUM, "dart", 0, 0, 0, 0.8, "47.1±.2"),
    "dart_gpt2_large": (LARGER, "dart", 0, 0, 0, 0.8, "47.5±.1"),
}
NLG_REPOSITORY = {"e2e_gpt2_repo": SMALL, "e2e_gpt2_medium_repo": MEDIUM, "e2e_gpt2_large_repo": LARGER}


def recipe(name: str) -> Path:
    return REPO / "configs" / f"{name}.yaml"


def header(file: Path) -> list[str]:
    """The comment lines that a file opens with."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))]


def problem(path: Path | str, *overrides: str) -> str:
    """What the loader says of a config that it must refuse."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A copy of the MNLI recipe, for a test to break."""
    return Path(shutil.copy(recipe("glue_mnli"), tmp_path / "mine.yaml"))


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1
    file.write_text(text.replace(old, new), encoding="utf-8")


# --- the recipes ---


def test_the_glue_recipes_are_the_published_ones() -> None:
    assert {file.stem for file in GLUE_RECIPES} == {*PAPER, *REPOSITORY}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_loads_names_its_source_and_its_own_command(file: Path) -> None:
    config = load_config(file)
    assert config.task.name in task_names()
    assert RunConfig.from_dict(config.to_dict()) == config
    commands = re.findall(r"--config (\S+)", "\n".join(header(file)))
    assert commands == [file.name]


@pytest.mark.parametrize("file", GLUE_RECIPES, ids=lambda file: file.stem)
def test_every_glue_recipe_has_a_short_header_and_no_key_twice(file: Path) -> None:
    lines = header(file)
    assert 3 <= len(lines) <= 5
    assert max(map(len, file.read_text(encoding="utf-8").splitlines())) <= 120
    assert f"# Run: python scripts/train.py --config {file.name}" in lines
    task = load_config(file).task.name
    assert file.stem.split("_")[1] == task
    root = yaml.compose(file.read_text(encoding="utf-8"))
    for node in (root, *(section for _, section in root.value)):
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys))  # YAML itself keeps the last of two


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipe_has_the_papers_values(name: str) -> None:
    config = load_config(recipe(name))
    lora, train = config.lora, config.train
    model, batch, epochs, lr, r, alpha, length, decay, warmup, score = PAPER[name]
    assert (config.model.name, config.task.max_length) == (model, length)
    assert (train.batch_size, train.gradient_accumulation, train.epochs, train.lr) == (batch, 1, epochs, lr)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.targets) == (r, alpha, 0, ("q", "v"))
    assert (train.weight_decay, train.warmup_ratio, train.warmup_steps) == (decay, warmup, None)
    assert (train.method, train.schedule, train.seed, train.max_steps, train.hf) == ("lora", "linear", 0, None, {})
    text = "\n".join(header(recipe(name)))
    assert f"(arXiv 2106.09685, Table {10 if model == XXL else 9})" in text
    assert re.search(rf"# Published \(Table 2, dev set, median of 5 seeds\): [\w() -]+ {re.escape(score)}[. ]", text)


@pytest.mark.parametrize("name", REPOSITORY)
def test_repository_recipe_has_the_scripts_values(name: str) -> None:
    config = load_config(recipe(name))
    lora, train = config.lora, config.train
    model, printed, gpus, epochs, lr, r, alpha, length, decay, warmup = REPOSITORY[name]
    assert (config.model.name, config.task.max_length) == (model, length)
    assert train.batch_size * train.gradient_accumulation == printed * gpus
    assert (train.batch_size, train.epochs, train.lr) == (printed, epochs, lr)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.targets) == (r, alpha, 0, ("q", "v"))
    assert (train.weight_decay, train.method, train.schedule, train.seed) == (decay, "lora", "linear", 0)
    assert (train.warmup_steps or train.warmup_ratio) == warmup
    assert train.hf.get("fp16", False) is (model == XXL)
    kind = {BASE: "roberta_base", LARGE: "roberta_large", XXL: "deberta_v2_xxlarge"}[model]
    text = "\n".join(header(recipe(name)))
    assert f"microsoft/LoRA, examples/NLU/{kind}_{config.task.name}.sh" in text
    assert f"{gpus} GPUs x batch {printed} = {gpus * printed} rows a step" in text


@pytest.mark.parametrize("file", GLUE_RECIPES, ids=lambda file: file.stem)
def test_what_starts_from_mnli_says_so_with_a_key_that_exists(file: Path) -> None:
    text, config = "\n".join(header(file)), load_config(file)
    assert config.train.start_from is None  # the file runs as it stands
    advice = re.search(r"start from your own run of (\S+): (\S+?)=outputs/<run>/adapter\.", text)
    assert (advice is not None) is (config.task.name in FROM_MNLI)
    if advice:
        mnli = load_config(REPO / "configs" / advice[1])
        assert (mnli.task.name, mnli.model, mnli.lora) == ("mnli", config.model, config.lora)
        assert load_config(file, [f"{advice[2]}=outputs/mine/adapter"]).train.start_from == "outputs/mine/adapter"


@pytest.mark.parametrize("task", TASKS)
def test_repository_and_paper_differ_only_where_the_header_says(task: str) -> None:
    paper, repository = load_config(recipe(f"glue_{task}")), load_config(recipe(f"glue_{task}_repo"))
    flat = [
        {f"{section}.{key}": value for section, values in config.to_dict().items() for key, value in values.items()}
        for config in (paper, repository)
    ]
    assert {key for key in flat[0] if flat[0][key] != flat[1][key]} == {
        "lora.lora_alpha",
        "train.weight_decay",
        "train.gradient_accumulation",
    }


def test_the_generation_recipes_are_the_published_ones() -> None:
    assert {file.stem for file in NLG_RECIPES} == {*NLG_PAPER, *NLG_REPOSITORY}


@pytest.mark.parametrize("name", [*NLG_PAPER, *NLG_REPOSITORY])
def test_every_generation_recipe_has_what_both_sources_share(name: str) -> None:
    config = load_config(recipe(name))
    lora, train, generate = config.lora, config.train, config.generate
    assert (config.model.dropout, config.task.max_length) == (0, 512)
    assert (lora.r, lora.lora_alpha, lora.targets) == (4, 32, ("q", "v"))
    assert (train.batch_size, train.gradient_accumulation, train.epochs, train.lr) == (8, 1, 5, 2e-4)
    assert (train.warmup_steps, train.schedule, train.max_grad_norm, train.method) == (500, "linear", 0, "lora")
    assert (generate.num_beams, generate.no_repeat_ngram_size, generate.max_new_tokens) == (10, 4, 64)
    assert not generate.do_sample
    lines = header(recipe(name))
    assert 3 <= len(lines) <= 5
    assert max(map(len, recipe(name).read_text(encoding="utf-8").splitlines())) <= 120
    assert f"# Run: python scripts/train.py --config {name}.yaml" in lines


@pytest.mark.parametrize("name", NLG_PAPER)
def test_generation_paper_recipe_has_the_papers_values(name: str) -> None:
    config = load_config(recipe(name))
    train = config.train
    model, task, decay, dropout, smoothing, penalty, score = NLG_PAPER[name]
    assert (config.model.name, config.task.name) == (model, task)
    assert (train.weight_decay, config.lora.lora_dropout, train.label_smoothing) == (decay, dropout, smoothing)
    assert (config.generate.length_penalty, train.seed, train.hf) == (penalty, 0, {})
    text = "\n".join(header(recipe(name)))
    assert "(arXiv 2106.09685, Table 11)" in text
    assert f"BLEU {score}" in text if score else "nothing in the paper for this size" in text


@pytest.mark.parametrize("name", NLG_REPOSITORY)
def test_generation_repository_recipe_differs_where_its_header_says(name: str) -> None:
    assert load_config(recipe(name)).model.name == NLG_REPOSITORY[name]
    ours, papers = (
        {f"{section}.{key}": value for section, values in config.to_dict().items() for key, value in values.items()}
        for config in (load_config(recipe(name)), load_config(recipe(name.removesuffix("_repo"))))
    )
    different = {key: value for key, value in ours.items() if papers[key] != value}
    assert different == {"generate.length_penalty": 0.8, "train.seed": 110, "train.hf": {"adam_epsilon": 1e-6}}
    text = "\n".join(header(recipe(name)))
    assert "microsoft/LoRA, examples/NLG/README.md" in text
    assert "length penalty 0.8, seed 110, and Adam with epsilon 1e-6" in text


# --- the loader ---


def test_a_mistyped_key_is_named_with_its_near_name(broken: Path) -> None:
    replace(broken, "lora_alpha: 8", "lora_alfa: 8")
    assert problem(broken) == f"{broken}: 1 problem\n  lora.lora_alfa: unknown key (did you mean 'lora_alpha'?)"


def test_a_value_out_of_range_says_the_range(broken: Path) -> None:
    replace(broken, "lr: 5e-4", "lr: -1")
    assert problem(broken) == f"{broken}: 1 problem\n  train.lr: expected a number > 0, found -1"


def test_all_problems_are_told_in_one_message(broken: Path) -> None:
    replace(broken, "lr: 5e-4", "lr: -1")
    replace(broken, "  r: 8", "  rank: 8")
    replace(broken, "schedule: linear", "schedule: liner")
    replace(broken, "targets: [q, v]", "targets: [q, vv]")
    replace(broken, "model:", "modl:")
    assert problem(broken).splitlines() == [
        f"{broken}: 5 problems",
        "  modl: unknown section (did you mean 'model'?); expected model, task, lora, train, generate, output",
        "  lora.rank: unknown key (did you mean 'r'?)",
        f"  lora.targets: expected some of {TARGETS}, found 'vv' (did you mean 'v'?)",
        "  train.lr: expected a number > 0, found -1",
        f"  train.schedule: expected one of {SCHEDULES}, found 'liner' (did you mean 'linear'?)",
    ]


@pytest.mark.parametrize("text", ["5e-4", "5.0e-4", "0.0005", "'5e-4'"])
def test_a_learning_rate_is_read_however_it_is_written(broken: Path, text: str) -> None:
    replace(broken, "lr: 5e-4", f"lr: {text}")
    assert load_config(broken).train.lr == 5e-4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.r=true", "lora.r: expected a whole number >= 1, found true"),
        ("lora.r=8.0", "lora.r: expected a whole number >= 1, found 8.0"),
        ("lora.r=0", "lora.r: expected a whole number >= 1, found 0"),
        ("lora.lora_dropout=1", "lora.lora_dropout: expected a number >= 0 and <= 0.99, found 1"),
        ("train.lr=false", "train.lr: expected a number > 0, found false"),
        ("train.lr=fast", "train.lr: expected a number > 0, found 'fast'"),
        ("train.lr=.nan", "train.lr: expected a number > 0, found nan"),
        ("train.lr=.inf", "train.lr: expected a number > 0, found inf"),
        ("train.lr=", "train.lr: expected a number > 0, found nothing"),
        ("task.name=1", "task.name: expected text, found 1"),
        ("output.overwrite=1", "output.overwrite: expected true or false, found 1"),
        ("train.max_grad_norm=-1", "train.max_grad_norm: expected a number >= 0, found -1"),
        ("train.label_smoothing=2", "train.label_smoothing: expected a number >= 0 and <= 1, found 2"),
        ("model.dropout=1", "model.dropout: expected a number >= 0 and <= 0.99, found 1"),
        ("generate.num_beams=0", "generate.num_beams: expected a whole number >= 1, found 0"),
        ("generate.num_beam=4", "generate.num_beam: unknown key (did you mean 'num_beams'?)"),
        ("generate.length_penalty=11", "generate.length_penalty: expected a number >= -10 and <= 10, found 11"),
        ("generate.no_repeat_ngram_size=-1", "generate.no_repeat_ngram_size: expected a whole number >= 0, found -1"),
        ("generate.max_new_tokens=0", "generate.max_new_tokens: expected a whole number >= 1, found 0"),
        ("generate.do_sample=1", "generate.do_sample: expected true or false, found 1"),
        ("generate.temperature=0", "generate.temperature: expected a number > 0, found 0"),
        ("generate.top_p=0", "generate.top_p: expected a number > 0 and <= 1, found 0"),
        ("generate.top_k=-1", "generate.top_k: expected a whole number >= 0, found -1"),
        ("generate.seed=-1", "generate.seed: expected a whole number >= 0 and <= 4294967295, found -1"),
        ("generate.batch_size=0", "generate.batch_size: expected a whole number >= 1, found 0"),
        ("model.precision=int4", "model.precision: expected one of auto, fp32, bf16, fp16, found 'int4'"),
        ("train.hf=fast", "train.hf: expected keys and values, found 'fast'"),
        ("lora.targets=[]", f"lora.targets: expected some of {TARGETS}, found nothing"),
    ],
)
def test_a_wrong_value_says_what_was_expected_and_found(override: str, message: str) -> None:
    assert problem("glue_mnli.yaml", override) == f"glue_mnli.yaml: 1 problem\n  {message}"


def test_an_unknown_section_is_named(broken: Path) -> None:
    broken.write_text("optimiser:\n  lr: 1\n", encoding="utf-8")
    assert problem(broken) == (
        f"{broken}: 1 problem\n  optimiser: unknown section; expected model, task, lora, train, generate, output"
    )


def test_a_section_that_is_no_mapping_is_told(broken: Path) -> None:
    broken.write_text("lora: [8, 16]\ntrain: fast\n", encoding="utf-8")
    assert problem(broken).splitlines() == [
        f"{broken}: 2 problems",
        "  lora.*: expected keys and values, found a list",
        "  train.*: expected keys and values, found 'fast'",
    ]


def test_an_unknown_trainer_argument_is_named_with_its_near_name() -> None:
    assert problem("glue_mnli.yaml", "train.hf.label_smoothing=0.1") == (
        "glue_mnli.yaml: 1 problem\n  train.hf: label_smoothing: not a field of transformers.TrainingArguments "
        "(did you mean 'label_smoothing_factor'?)"
    )


@pytest.mark.parametrize(
    ("argument", "key"), [("learning_rate", "train.lr"), ("label_smoothing_factor", "train.label_smoothing")]
)
def test_a_trainer_argument_with_its_own_key_points_there(argument: str, key: str) -> None:
    assert problem("glue_mnli.yaml", f"train.hf.{argument}=1e-3") == (
        f"glue_mnli.yaml: 1 problem\n  train.hf: {argument}: set {key} instead"
    )


def test_a_trainer_argument_without_its_own_key_is_kept() -> None:
    assert load_config("glue_mnli.yaml", ["train.hf.adam_beta2=0.98"]).train.hf == {"adam_beta2": 0.98}


def test_the_base_keeps_its_own_dropout_unless_a_config_says_otherwise() -> None:
    assert load_config("glue_mnli.yaml").model.dropout is None
    assert load_config("glue_mnli.yaml", ["model.dropout=0"]).model.dropout == 0
    assert load_config("e2e_gpt2.yaml", ["model.dropout=null"]).model.dropout is None


def test_overrides_win_over_the_file_and_the_last_over_the_first() -> None:
    config = load_config("glue_mnli.yaml", ["lora.r=4", "train.lr=1e-3", "lora.r=16", "lora.targets=[q, k, v]"])
    assert (config.lora.r, config.train.lr, config.lora.targets) == (16, 1e-3, ("q", "k", "v"))
    assert config.train.epochs == 30
    assert load_config("glue_mnli.yaml", ["lora.targets=attention"]).lora.targets == ("attention",)
    assert load_config("glue_mnli.yaml", ["output.name=a=b"]).output.name == "a=b"


@pytest.mark.parametrize("override", ["lora.r", "r=16", "=16", "lora.=16", ".r=16", "lora..r=16", ""])
def test_a_malformed_override_says_the_form(override: str) -> None:
    assert problem("glue_mnli.yaml", override) == (
        f"{override!r}: expected an override of the form section.key=value, such as lora.r=16"
    )


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("epochs=3", "train.epochs=3"),
        ("data_dir=x", "task.data_dir=x"),
        ("learning_rate=1e-3", "train.lr=1e-3"),
        ("seed=1", "train.seed=1 or generate.seed=1"),
        ("nothing=1", "lora.r=16"),
    ],
)
def test_a_bare_key_is_told_with_its_section(override: str, meant: str) -> None:
    expected = f"{override!r}: expected an override of the form section.key=value, such as {meant}"
    assert problem("glue_mnli.yaml", override) == expected


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.num_train_epochs", "epochs"),
        ("train.per_device_train_batch_size", "batch_size"),
        ("train.per_device_eval_batch_size", "eval_batch_size"),
        ("train.gradient_accumulation_steps", "gradient_accumulation"),
        ("train.lr_scheduler_type", "schedule"),
        ("train.gradient_checkpointing", "train.hf.gradient_checkpointing"),
        ("train.max_seq_length", "task.max_length"),
        ("train.output_dir", "output.dir"),
        ("lora.alpha", "lora_alpha"),
        ("lora.dropout", "lora_dropout"),
        ("lora.target_modules", "targets"),
        ("lora.lr", "train.lr"),
        ("model.model_name_or_path", "name"),
        ("generate.num_beam", "num_beams"),
    ],
)
def test_a_key_by_another_name_is_told_by_ours(key: str, meant: str) -> None:
    expected = f"glue_mnli.yaml: 1 problem\n  {key}: unknown key (did you mean {meant!r}?)"
    assert problem("glue_mnli.yaml", f"{key}=1") == expected


def test_a_module_of_peft_is_told_by_its_role() -> None:
    assert problem("glue_mnli.yaml", "lora.targets=[query, c_attn]") == (
        f"glue_mnli.yaml: 1 problem\n  lora.targets: expected some of {TARGETS}, "
        "found 'query' (did you mean q?), 'c_attn' (did you mean q, k, v?)"
    )
    for meant in ROLE_ALIASES.values():
        LoraConfig(targets=tuple(meant.split(", ")))


def test_every_other_name_leads_to_a_key() -> None:
    known = {f"{section}.{key}" for section, keys in RunConfig().to_dict().items() for key in keys}
    assert set(KEY_ALIASES.values()) <= known


def test_an_override_below_a_value_is_told() -> None:
    assert problem("glue_mnli.yaml", "lora.r.x=1") == "'lora.r.x=1': r holds 8, not further keys"


def test_an_override_that_is_no_yaml_is_told() -> None:
    message = problem("glue_mnli.yaml", "lora.targets=[q")
    assert message.startswith("'lora.targets=[q': the value is not valid YAML: ")


def test_an_unknown_key_in_an_override_is_named_with_its_near_name() -> None:
    assert problem("glue_mnli.yaml", "train.learning_rate=1e-3", "train.epoch=3") == (
        "glue_mnli.yaml: 2 problems\n  train.learning_rate: unknown key (did you mean 'lr'?)\n"
        "  train.epoch: unknown key (did you mean 'epochs'?)"
    )


def test_a_missing_file_is_told_with_the_nearest_recipe(tmp_path: Path) -> None:
    assert problem("glue_sst.yaml") == (
        "glue_sst.yaml: no such config file in the current folder and configs/ (did you mean 'glue_sst2.yaml'?)"
    )
    elsewhere = tmp_path / "glue_sst2.yaml"
    assert problem(elsewhere) == f"{elsewhere}: no such config file in that place (did you mean 'glue_sst2.yaml'?)"


def test_a_missing_file_near_no_recipe_lists_them_all() -> None:
    message = problem("qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqq")
    assert message.partition("; recipes: ")[2].split(", ") == [file.name for file in RECIPES]


def test_a_bare_name_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("glue_cola.yaml") == load_config(recipe("glue_cola"))


def test_the_current_folder_comes_before_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "glue_cola.yaml").write_text("lora: {r: 3}", encoding="utf-8")
    assert load_config("glue_cola.yaml").lora.r == 3
    (tmp_path / "glue_cola.yaml").write_text("lora: {r: 2}", encoding="utf-8")
    assert load_config("glue_cola.yaml").lora.r == 2


@pytest.mark.parametrize(
    ("text", "found"),
    [("- lora\n- train\n", "a list"), ("lora\n", "'lora'"), ("7\n", "7"), ("true\n", "true")],
)
def test_a_file_that_is_no_mapping_is_told(broken: Path, text: str, found: str) -> None:
    broken.write_text(text, encoding="utf-8")
    assert problem(broken) == f"{broken}: expected sections such as 'model:' and 'task:', found {found}"


@pytest.mark.parametrize("content", [b"lora: [q, v\ntrain:\n", b"lora:\n\tr: 8\n", b"lora: \xff\xfe\n"])
def test_a_file_that_is_no_yaml_is_told(broken: Path, content: bytes) -> None:
    broken.write_bytes(content)
    assert problem(broken).startswith(f"{broken}: not a readable YAML file: ")


def test_an_empty_file_is_the_defaults(broken: Path) -> None:
    broken.write_text("# nothing yet\ntrain:\n", encoding="utf-8")
    assert load_config(broken) == RunConfig()


def test_the_resolved_config_of_a_run_loads_as_it_is(tmp_path: Path) -> None:
    for file in RECIPES:
        resolved = tmp_path / file.name
        resolved.write_text(yaml.safe_dump(load_config(file).to_dict(), sort_keys=False), encoding="utf-8")
        assert load_config(resolved) == load_config(file)
