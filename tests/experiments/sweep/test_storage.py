"""The storage of trials: which URLs are valid, which parts of them are secret, and how the sampler draws."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from lora_hf.core.errors import ConfigError
from lora_hf.experiments.sweep.space import read_sweep
from lora_hf.experiments.sweep.storage import (
    ERROR,
    GridSampler,
    SeededSampler,
    database_errors,
    open_storage,
    open_study,
    parse_url,
    without_secrets,
)
from lora_hf.experiments.sweep.study import SweepSettings, sweep
from tests.tolerances import SAMPLER_GAIN

SECRET = "hunter2"


def opened(url: str, name: str = "s", **definition: Any) -> optuna.Study:
    parsed = parse_url(url)
    with database_errors(parsed):
        return open_study(parsed, name, SeededSampler(0), maximize=True, definition=definition)


def test_secrets_in_a_url_are_not_shown() -> None:
    url = parse_url(f"postgresql://me:{SECRET}@db.example/sweeps?sslpassword={SECRET}")
    assert without_secrets(url) == "postgresql://db.example/sweeps"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (SECRET, "storage: expected a URL such as sqlite:///sweep.db"),
        (f"nosuch://me:{SECRET}@host/name", "storage nosuch://host/name: Can't load plugin"),
        (f"oracle://me:{SECRET}@host/name", "install the driver"),
        ("sqlite://", "not persistent; name a file"),
        ("sqlite:///:memory:", "not persistent; name a file"),
        ("sqlite:///nowhere/at/all.db", "unable to open database file"),
    ],
)
def test_an_unusable_storage_is_reported_without_its_secrets(url: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        opened(url)
    assert said in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.filterwarnings("ignore:unclosed database")  # which Optuna leaves to the garbage collector
def test_a_file_that_is_not_a_database(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_text("a text " * 50)
    with pytest.raises(ConfigError, match="file is not a database"):
        opened(f"sqlite:///{tmp_path}/x.db")
    gc.collect()


def test_a_study_of_other_trials_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/x.db"
    opened(url, config={"train": {"lr": 1, "seed": 0}}, space=["lora.r=4..8"], seed=0)
    opened(url, config={"train": {"lr": 1, "seed": 0}}, space=["lora.r=4..8"], seed=0)
    with pytest.raises(ConfigError, match="choose another study name") as caught:
        opened(url, config={"train": {"lr": 2, "seed": 0}}, space=["lora.r=4..16"], seed=0)
    assert str(caught.value).splitlines()[1:] == [
        "  train.lr: 1 in the study, 2 requested",
        "  space: ['lora.r=4..8'] in the study, ['lora.r=4..16'] requested",
    ]


def test_a_study_that_somebody_else_made_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/x.db"
    optuna.create_study(storage=open_storage(parse_url(url)), study_name="s", direction="maximize").add_trial(
        optuna.trial.create_trial(value=0.5)
    )
    with pytest.raises(ConfigError, match="not from a sweep"):
        opened(url)


def draws(seed: int, trials: int) -> list[dict[str, Any]]:
    """The values of trials; more than the sampler's random ones, so that it also models what it saw."""
    study = optuna.create_study(sampler=SeededSampler(seed), direction="maximize")
    for _ in range(trials):
        trial = study.ask()
        x, _ = trial.suggest_float("x", 0, 1), trial.suggest_int("y", 1, 64, log=True)
        study.tell(trial, -((x - 0.5) ** 2))
    return [trial.params for trial in study.trials]


def test_a_seed_repeats_itself_and_another_does_not() -> None:
    first = draws(3, 14)
    assert draws(3, 14) == first
    assert all(ours != theirs for ours, theirs in zip(first, draws(4, 14), strict=True))
    assert len({trial["x"] for trial in first}) == 14


def test_processes_of_one_seed_never_draw_the_same(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/x.db"
    one, two = opened(url, seed=0), opened(url, seed=0)
    values = []
    for study in (one, two, one, two):
        study.optimize(lambda trial: values.append(trial.suggest_float("x", 0, 1)) or 0.0, n_trials=1)
    assert len(set(values)) == 4


def test_the_sampler_learns_from_what_it_saw() -> None:
    early, late = [], []
    for seed in range(8):
        errors = [(trial["x"] - 0.5) ** 2 for trial in draws(seed, 40)]
        early += errors[:10]
        late += errors[20:]
    assert sum(late) / len(late) < SAMPLER_GAIN * sum(early) / len(early)


def test_each_point_of_a_grid_is_drawn_once_and_an_interrupted_one_again() -> None:
    _, space = read_sweep("tiny_sst2.yaml", ["lora.r=4..8:log2", "train.lr=1e-3,1e-4"])
    study, drawn = optuna.create_study(sampler=GridSampler(space.grid())), []
    for outcome in ("complete", "interrupted", "failed", "complete", "complete"):
        trial = study.ask()
        space.draw(trial)
        drawn.append(space.values(trial.params))
        if outcome == "complete":
            study.tell(trial, 1.0)
        else:
            if outcome == "failed":
                trial.set_user_attr(ERROR, "out of memory")
            study.tell(trial, state=TrialState.FAIL)
    points = [{"lora.r": r, "train.lr": lr} for r in (4, 8) for lr in (1e-3, 1e-4)]
    assert drawn == [points[0], points[1], points[1], points[2], points[3]]


def test_two_processes_that_start_together_draw_different_points() -> None:
    _, space = read_sweep("tiny_sst2.yaml", ["train.lr=1e-3,1e-4,1e-5"])
    study = optuna.create_study(sampler=GridSampler(space.grid()))
    started = [study.ask(), study.ask()]  # neither has drawn yet
    for trial in started:
        space.draw(trial)
    assert [trial.params["train.lr"] for trial in started] == ["1e-3", "1e-4"]


def test_a_grid_needs_values() -> None:
    config, space = read_sweep("tiny_sst2.yaml", ["train.lr=1e-4..1e-3:log", "lora.r=4,8"])
    with pytest.raises(
        ConfigError, match=r"train.lr=0.0001..0.001:log: a grid needs single values, such as train.lr=0.0001,0.001"
    ):
        sweep(SweepSettings(config, space, "s", sampler="grid"))
    config, space = read_sweep("tiny_sst2.yaml", ["lora.r=4,8"])
    with pytest.raises(ConfigError, match="the grid has 2 points, found 3"):
        sweep(SweepSettings(config, space, "s", 3, sampler="grid"))
    with pytest.raises(ConfigError, match="did you mean 'grid'"):
        sweep(SweepSettings(config, space, "s", 3, sampler="gird"))
    with pytest.raises(ConfigError, match="trials: expected a whole number"):
        sweep(SweepSettings(config, space, "s"))


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_an_interrupted_trial_prunes_no_other(tmp_path: Path) -> None:
    url = parse_url(f"sqlite:///{tmp_path / 's.db'}")
    study = open_study(url, "s", GridSampler([{}]), maximize=True, definition={})
    pruned = []
    for value, state in ((0.9, TrialState.FAIL), (0.5, TrialState.COMPLETE), (0.4, TrialState.PRUNED)):
        trial = study.ask()
        trial.report(value, 1)
        pruned.append(trial.should_prune())
        study.tell(trial, value if state == TrialState.COMPLETE else None, state=state)
    assert pruned == [False, False, True], "0.9 was interrupted, 0.4 is below 0.5"
