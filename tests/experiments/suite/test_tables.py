from __future__ import annotations

import pytest

from lora_hf.experiments.suite.tables import GLUE, choice, glue_average, resources, scores, storage, texts
from tests.support.suite_records import suite_record, suite_run, two_methods


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_scores_have_mean_spread_seeds_and_the_gap_to_what_was_published() -> None:
    record = two_methods()
    record.published["sst2"]["lora"] = {"score": 79.5, "spread": 0.2, "source": "a paper", "gap": 0.5}
    record.published["rte"]["full"] = {"why_not": "other recipe"}
    assert cells(scores(record)) == [
        ["rte, accuracy", "lora", "55.0", "50.0 to 60.0", "2", "50.0", "other base"],
        ["rte, accuracy", "full", "65.0", "60.0 to 70.0", "2", "50.0", "other recipe"],
        ["sst2, accuracy", "lora", "80.0", "-", "1", "50.0", "+0.5 (79.5±0.2)"],
        ["sst2, accuracy", "full", "79.0", "-", "1", "50.0", "other base"],
    ]


def test_the_glue_average_is_of_all_eight_tasks_or_not_there() -> None:
    runs = [suite_run(task, "lora", 0, 0.1 * place) for place, task in enumerate(GLUE)]
    # More seeds of one task do not make it weigh more: (0 + .1 + ... + .6 + (.7 + 1.1) / 2) / 8.
    runs.append(suite_run(GLUE[-1], "lora", 1, 1.1))
    whole = suite_record(runs)
    assert glue_average(whole, "lora") == pytest.approx((0 + 0.1 + 0.2 + 0.3 + 0.4 + 0.5 + 0.6 + 0.9) / 8)
    assert cells(scores(whole))[-1] == ["**GLUE average**", "lora", "**37.5**", "-", "-", "-", "-"]
    part = suite_record(runs[1:])
    assert glue_average(part, "lora") is None
    assert "average" not in scores(part)


def test_resources_are_the_means_over_the_seeds() -> None:
    assert cells(resources(two_methods()))[:2] == [
        ["rte", "lora", "2,490", "90,000", "1.5 min", "2.0 min", "1,234", "50", "1.00"],
        ["rte", "full", "2,490", "5,000,000", "2.5 min", "3.3 min", "1,234", "90", "20.00"],
    ]


def test_memory_is_the_gpus_where_there_is_one() -> None:
    record = suite_record([suite_run("rte", "lora", 0, 0.5, memory={"rss": 50_000_000, "cuda": 7_000_000})])
    assert cells(resources(record))[0][-2] == "7"


def test_storage_is_a_base_and_adapters_against_full_models_by_their_files() -> None:
    record = two_methods()
    assert cells(storage(record)) == [["lora", "2", "10.0", "2.00", "12.0", "40.0", "3.3x"]]
    without = suite_record([run for run in record.runs if run["method"] == "lora"])
    assert cells(storage(without)) == [["lora", "2", "10.0", "2.00", "12.0", "20.0 (copies of the base)", "1.7x"]]
    # A full run of one of the two tasks says nothing of the other.
    partly = suite_record([run for run in record.runs if (run["task"], run["method"]) != ("sst2", "full")])
    assert cells(storage(partly))[0][-2] == "20.0 (copies of the base)"
    random = suite_record(without.runs, base={"name": "roberta-base", "bytes": None})
    assert cells(storage(random)) == [["lora", "2", "-", "2.00", "-", "-", "-"]]


def test_the_choice_is_over_the_tasks_that_all_have_and_of_one_run_a_task() -> None:
    record = two_methods()
    # LoRA: (0.55 + 0.8) / 2; (120 + 100) s; 4 cores each.
    assert cells(choice(record)) == [
        ["lora", "67.5", "90,000", "0.06", "0.24", "50", "2.00"],
        ["full", "72.0", "5,000,000", "0.11", "0.44", "90", "40.00"],
    ]
    for run in record.runs:
        run["timings"] |= {"cpu": 3.6 * run["timings"]["total"]}
    assert [row[3:5] for row in cells(choice(record))] == [["0.06", "0.22"], ["0.11", "0.40"]], "CPU times, if known"
    record.runs = record.runs[:-1]
    assert "mean score of 1 task," in choice(record)
    assert cells(choice(record))[0][:2] == ["lora", "55.0"]


def test_texts_show_every_score_and_a_dash_where_a_scorer_could_not_run() -> None:
    def run(seed: int, bleu: float, meteor: float | None) -> dict:
        of_all = {"BLEU": bleu, "METEOR": meteor}
        metrics = {"all": of_all, "seen": {"BLEU": 0.7, "METEOR": 0.4}}
        return suite_run("web_nlg", "lora", seed, bleu, majority_value=None, texts={"metrics": metrics, "timings": {}})

    record = suite_record([run(0, 0.5, 0.3), run(1, 0.6, None)])
    assert cells(texts(record)) == [
        ["web_nlg", "lora", "0.5500", "-"],
        ["web_nlg, seen", "lora", "0.7000", "0.4000"],
    ]
    assert cells(scores(record))[0][-2] == "-"
