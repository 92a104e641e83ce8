"""The plots of a sweep: the importance of each key, the values of each trial, and the scores in order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState, create_trial

from lora_hf.experiments.plots import load_pyplot, save
from lora_hf.experiments.sweep.space import Choice, Space
from lora_hf.experiments.sweep.storage import ignore_experimental

logger = logging.getLogger(__name__)

SIZE = (10, 5)  # inches
BINARY_SPAN = 100  # a logarithmic axis with a smaller span has ticks at powers of two, otherwise of ten


def draw_plots(
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
