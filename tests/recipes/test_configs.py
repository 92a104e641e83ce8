"""Every recipe against the published values, which are typed here a second time.

The paper is LoRA, arXiv 2106.09685, Tables 2, 3, 9, 10 and 11; the repository is microsoft/LoRA, examples/NLU/*.sh and
examples/NLG/README.md.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from lora_hf.core.config.loader import load_config
from lora_hf.core.config.schema import RunConfig
from lora_hf.data.tasks.registry import task_names

REPO = Path(__file__).parents[2]
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
    """The comment lines that a file opens with, after the one that names the schema."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return lines[1 : next(index for index, line in enumerate(lines) if not line.startswith("#"))]


def test_the_glue_recipes_are_the_published_ones() -> None:
    assert {file.stem for file in GLUE_RECIPES} == {*PAPER, *REPOSITORY}


def test_every_recipe_loads_names_its_source_and_its_own_command() -> None:
    assert RECIPES
    for file in RECIPES:
        config = load_config(file)
        assert config.task.kind or config.task.name in task_names(), file.name
        assert RunConfig.from_dict(config.to_dict()) == config, file.name
        commands = re.findall(r"--config (\S+)", "\n".join(header(file)))
        assert commands == [file.name]


def test_every_glue_recipe_has_a_short_header_and_no_key_twice() -> None:
    for file in GLUE_RECIPES:
        lines = header(file)
        assert 3 <= len(lines) <= 5, file.name
        assert max(map(len, file.read_text(encoding="utf-8").splitlines())) <= 120, file.name
        assert f"# Run: python scripts/train.py --config {file.name}" in lines
        assert file.stem.split("_")[1] == load_config(file).task.name, file.name
        root = yaml.compose(file.read_text(encoding="utf-8"))
        for node in (root, *(section for _, section in root.value)):
            keys = [key.value for key, _ in node.value]
            assert len(keys) == len(set(keys)), file.name  # YAML itself keeps the last of two


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
    assert f"{gpus} GPUs x batch {printed} = {gpus * printed} rows per step" in text


@pytest.mark.parametrize("task", TASKS)
def test_what_starts_from_mnli_says_so_with_a_key_that_exists(task: str) -> None:
    for file in GLUE_RECIPES:
        if file.stem.split("_")[1] == task:
            check_start_from(file)


def check_start_from(file: Path) -> None:
    text, config = "\n".join(header(file)), load_config(file)
    assert config.train.start_from is None, file.name  # the file runs as it stands
    advice = re.search(r"start from your own run of (\S+): (\S+?)=outputs/<run>/adapter\.", text)
    assert (advice is not None) is (config.task.name in FROM_MNLI), file.name
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
