"""The plots of a sweep: scores and losses, and the importance and values of each key."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState, create_trial

from lora_hf.core.parsing import parse_json
from lora_hf.core.records import SweepRecord
from lora_hf.experiments.plots import load_pyplot, save, series_style
from lora_hf.experiments.sweep.space import RANK, RATE, Choice, Space
from lora_hf.experiments.sweep.storage import ignore_experimental
from lora_hf.training.run_dir import LOG_FILE

logger = logging.getLogger(__name__)

SIZE = (10, 5)  # inches
END_MARKERS = {"pruned": "o", "diverged": "X"}
LEGEND = 12  # trials that a legend still names
Entry = dict[str, Any]  # an entry of `SweepRecord.trials`
BINARY_SPAN = 100  # a logarithmic axis with a smaller span has ticks at powers of two, otherwise of ten


def draw_importance(
    trials: Sequence[FrozenTrial], space: Space, maximize: bool, score: str, folder: Path
) -> dict[str, float]:
    """Writes `importance.png`, `parallel.png` and `history.png`, and returns the importance of each key.

    Importance is the share of the variance of the scores that a key explains by itself: fANOVA, Hutter et al. 2014,
    with a fixed seed. The shares sum to 1.

    Draws nothing if there are fewer than two complete trials with different values and different scores.

    Args:
        score: the label of the scores on the axes.
    """
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if len({trial.value for trial in complete}) < 2 or len({tuple(trial.params.items()) for trial in complete}) < 2:
        logger.info("no plots: they need two complete trials with different values and scores")
        return {}
    pyplot = load_pyplot()
    from optuna.visualization import matplotlib as plots

    study = _to_study(complete, space, maximize)
    evaluator = FanovaImportanceEvaluator(seed=0)
    with ignore_experimental(), pyplot.style.context("default"):
        importance = get_param_importances(study, evaluator=evaluator)
        parallel: Any = plots.plot_parallel_coordinate(study, target_name=score)
        _improve_parallel(parallel, maximize)
        for name, axes in (
            ("parallel.png", parallel),
            ("importance.png", plots.plot_param_importances(study, evaluator=evaluator, target_name=score)),
            ("history.png", plots.plot_optimization_history(study, target_name=score)),
        ):
            figure: Any = axes.figure
            figure.set_size_inches(*SIZE)
            save(figure, folder / name, bbox_inches="tight")
    return importance


def draw_learning_rates(record: SweepRecord, path: Path) -> None:
    """Draws score and loss against the learning rate with a line for each rank, if the sweep tried several rates."""
    trials = [trial for trial in record.trials if RATE in trial["values"]]
    if len({trial["values"][RATE] for trial in trials}) < 2:
        return
    figure, panels = load_pyplot().subplots(1, 2, figsize=SIZE, sharex=True)
    ranks = sorted({trial["values"].get(RANK, 0) for trial in trials})
    for axes, label, measure in zip(
        panels, (f"{record.split} {record.metric}", "loss"), (last_score, lambda trial: trial.get("loss")), strict=True
    ):
        for index, rank in enumerate(ranks):
            own = [trial for trial in trials if trial["values"].get(RANK, 0) == rank]
            own.sort(key=lambda trial: trial["values"][RATE])
            style = series_style(index)
            alone = {"color": style["color"], "linestyle": "", "markersize": 9}
            _plot(axes, own, "complete", measure, **style, label=f"rank {rank}" if rank else None)
            _plot(axes, own, "pruned", measure, **alone, marker=style["marker"], markerfacecolor="none")
            bottom = {"transform": axes.get_xaxis_transform(), "clip_on": False}
            _plot(axes, own, "diverged", lambda _: 0.0, **alone, marker="X", **bottom)
        axes.set(xscale="log", xlabel="learning rate", ylabel=label)
        axes.grid(alpha=0.3)
    if ranks != [0]:
        panels[0].legend()
    figure.suptitle("Hollow: the last evaluation of a pruned trial. Cross: diverged.", fontsize="small")
    save(figure, path, bbox_inches="tight")


def _plot(
    axes: Any, trials: Sequence[Entry], state: str, measure: Callable[[Entry], float | None], **style: Any
) -> None:
    """Plots the trials that ended in this state."""
    points = [(trial["values"][RATE], measure(trial)) for trial in trials if trial["state"] == state]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def last_score(trial: Entry) -> float | None:
    """The score of a trial, or that of the last evaluation before it was stopped."""
    return next(iter(trial["evaluations"][-1:]), None) if trial["score"] is None else trial["score"]


def draw_losses(record: SweepRecord, folder: Path, path: Path) -> None:
    """Draws the training loss of every trial; a circle ends one that was pruned, and a cross one that diverged."""
    figure, axes = load_pyplot().subplots(figsize=SIZE)
    first = 0.0
    for index, trial in enumerate(sorted(record.trials, key=lambda trial: trial["values"].get(RATE, 0))):
        log = folder / f"trial-{trial['number']}" / LOG_FILE
        entries = map(parse_json, log.read_text(encoding="utf-8").splitlines()) if log.exists() else ()
        points = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
        if not points:
            continue
        first = max(first, points[0][1])
        values = ", ".join(f"{key.partition('.')[2]}={_short(value)}" for key, value in trial["values"].items())
        style = series_style(index) | {"marker": None}
        axes.plot(*zip(*points, strict=True), **style, label=values)
        if trial["state"] in END_MARKERS:
            marker = {"marker": END_MARKERS[trial["state"]], "markerfacecolor": "none", "markersize": 9}
            axes.plot(*points[-1], color=style["color"], **marker)
    axes.set(xlabel="step", ylabel="training loss")
    axes.grid(alpha=0.3)
    if first:
        axes.set_ylim(top=min(axes.get_ylim()[1], 2 * first))
    if first and len(record.trials) <= LEGEND:
        axes.legend(fontsize="small")
    save(figure, path, bbox_inches="tight")


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def _improve_parallel(axes: Any, maximize: bool) -> None:
    """Uses colors that are visible on white, magenta for the best, and plain numbers on logarithmic axes."""
    axes.collections[0].set_cmap("cool" if maximize else "cool_r")
    axes.tick_params(axis="x", rotation=0)
    for other in axes.figure.axes:
        if other.get_yscale() == "log":
            low, high = other.get_ylim()
            other.set_yscale("log", base=2 if high / low < BINARY_SPAN else 10)
            other.set_ylim(low, high)
            other.yaxis.set_major_formatter("{x:g}")
            other.yaxis.set_minor_formatter("")


def _to_study(trials: Sequence[FrozenTrial], space: Space, maximize: bool) -> optuna.Study:
    """An in-memory study of the trials with the values of the keys: powers of two instead of their exponents."""
    study = optuna.create_study(direction="maximize" if maximize else "minimize")
    distributions: dict[str, BaseDistribution] = {}
    for each in space.dimensions:
        if isinstance(each, Choice):
            distributions[each.key] = CategoricalDistribution(each.texts)
        else:
            kind = IntDistribution if each.is_int else FloatDistribution
            distributions[each.key] = kind(*each.bounds(), log=each.scale != "linear")
    for trial in trials:
        params = {
            each.key: trial.params[each.key] if isinstance(each, Choice) else each.value(trial.params)
            for each in space.dimensions
        }
        study.add_trial(create_trial(params=params, distributions=distributions, value=trial.value))
    return study
