"""The pictures of a sweep: how much each key mattered, which values gave which score, how the best one came."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState, create_trial

from lora_hf.experiments.sweep.space import Choice, Range, Space
from lora_hf.experiments.sweep.storage import experimental

logger = logging.getLogger(__name__)

IMPORTANCE, PARALLEL, HISTORY = "importance.png", "parallel.png", "history.png"
SIZE = (10, 5)  # inches
BINARY = 100  # a logarithmic axis that spans less is marked at powers of two, else of ten


def draw_plots(
    trials: Sequence[FrozenTrial], space: Space, maximise: bool, score: str, folder: Path
) -> dict[str, float]:
    """Writes the three pictures; returns the importance of each key.

    Importance is the share of the scores' variance that a key explains by itself, by a forest of regression trees with
    a fixed seed: fANOVA, Hutter et al. 2014. The shares are scaled to the sum 1.

    Where there are not two complete trials with different values and different scores, nothing is drawn.

    Args:
        score: what the values are, as the axes name it.
    """
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if len({trial.value for trial in complete}) < 2 or len({tuple(trial.params.items()) for trial in complete}) < 2:
        logger.info("no pictures: they need two complete trials that differ in values and in score")
        return {}
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as pictures

    study = _as_typed(complete, space, maximise)
    evaluator = FanovaImportanceEvaluator(seed=0)
    with experimental(), pyplot.style.context("default"):
        importance = get_param_importances(study, evaluator=evaluator)
        parallel: Any = pictures.plot_parallel_coordinate(study, target_name=score)
        _make_legible(parallel, maximise)
        for name, axes in (
            (PARALLEL, parallel),
            (IMPORTANCE, pictures.plot_param_importances(study, evaluator=evaluator, target_name=score)),
            (HISTORY, pictures.plot_optimization_history(study, target_name=score)),
        ):
            figure: Any = axes.figure
            figure.set_size_inches(*SIZE)
            figure.savefig(folder / name, dpi=110, bbox_inches="tight")
            pyplot.close(figure)
    return importance


def _make_legible(axes: Any, maximise: bool) -> None:
    """Colours that show on white, from cyan to magenta for the best; numbers on logarithmic axes written out."""
    axes.collections[0].set_cmap("cool" if maximise else "cool_r")
    axes.tick_params(axis="x", rotation=0)
    for other in axes.figure.axes:
        if other.get_yscale() == "log":
            low, high = other.get_ylim()
            other.set_yscale("log", base=2 if high / low < BINARY else 10)
            other.set_ylim(low, high)
            other.yaxis.set_major_formatter("{x:g}")
            other.yaxis.set_minor_formatter("")


def _as_typed(trials: Sequence[FrozenTrial], space: Space, maximise: bool) -> optuna.Study:
    """The trials in a study of their own, with powers of two instead of the exponents that the sampler drew."""
    study = optuna.create_study(direction="maximize" if maximise else "minimize")
    for trial in trials:
        study.add_trial(
            create_trial(
                params={dimension.key: _shown(dimension, trial.params) for dimension in space.dimensions},
                distributions={dimension.key: _distribution(dimension) for dimension in space.dimensions},
                value=trial.value,
            )
        )
    return study


def _shown(dimension: Range | Choice, drawn: Mapping[str, Any]) -> Any:
    return drawn[dimension.key] if isinstance(dimension, Choice) else dimension.value(drawn)


def _distribution(dimension: Range | Choice) -> BaseDistribution:
    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.texts)
    low, high = dimension.ends()
    kind = IntDistribution if dimension.whole else FloatDistribution
    return kind(low, high, log=dimension.scale != "linear")
