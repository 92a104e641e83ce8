"""The Optuna study of a sweep, in a database that several processes can share."""

from __future__ import annotations

import copy
import random
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from lora_hf.core.config.loader import flatten
from lora_hf.core.errors import ConfigError, did_you_mean

HEARTBEAT = 10  # seconds between two heartbeats of a running trial
GRACE = 60  # seconds without a heartbeat after which the trial's process counts as dead
LOCK_TIMEOUT = 60  # seconds to wait for the lock of a SQLite file
ATTEMPTS = 10  # to open a file while other processes create its tables
STARTUP = 5  # complete trials before the median prunes
REDUCTION = 2  # successive halving keeps one of this many trials, after 1, 2, 4, 8, ... evaluations
ERROR = "error"  # attribute of a failed trial: the reason
MEASURED = "measured"  # attribute of a trial that ended by itself: what it reached, and its cost
PRECISION = "precision"  # attribute of a trial: the resolved `model.precision`
DEFINITION = "lora_hf"  # attribute of a study: what its trials have in common


PRUNERS: dict[str, Callable[[], BasePruner]] = {
    "halving": lambda: SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION),
    "hyperband": lambda: HyperbandPruner(min_resource=1),
    "median": lambda: MedianPruner(n_startup_trials=STARTUP),
    "none": NopPruner,
}


class TrialFailed(Exception):  # noqa: N818
    """A trial that did not finish training; the sweep continues."""


@contextmanager
def ignore_experimental() -> Iterator[None]:
    """Silences Optuna's warnings about experimental features: the heartbeat, multivariate TPE, matplotlib plots."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


@contextmanager
def database_errors(url: URL) -> Iterator[None]:
    """Raises errors of the database as ConfigError, without the secrets that the URL may contain."""
    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        reason = str(getattr(cause, "orig", None) or cause or error).strip().partition("\n")[0]
        for secret in (url.password, *url.query.values()):
            reason = reason.replace(str(secret), "***") if secret else reason
        raise ConfigError(f"storage {without_secrets(url)}: {reason}") from None


def without_secrets(url: URL) -> str:
    """The URL without user, password, and the query, in which drivers take tokens."""
    return url._replace(username=None, password=None, query={}).render_as_string()  # type: ignore[arg-type]


def parse_url(storage: str) -> URL:
    """The parts of a storage URL.

    Raises:
        ConfigError: it is not a URL, or the database is not persistent.
    """
    try:
        url = make_url(storage)
    except ArgumentError:
        # The text is not shown: it may still contain a password.
        raise ConfigError(
            "storage: expected a URL such as sqlite:///sweep.db or postgresql://user@host/name, found something else"
        ) from None
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise ConfigError(f"storage {without_secrets(url)}: not persistent; name a file, such as sqlite:///sweep.db")
    return url


def open_study(
    url: URL, name: str, sampler: BaseSampler, maximize: bool, definition: dict[str, Any], pruner: str = "halving"
) -> optuna.Study:
    """Opens or creates the study of this name.

    Args:
        pruner: one of PRUNERS; what stops trials early.
        definition: what its trials have in common (config, space, seed); stored with the study.

    Raises:
        ConfigError: the database cannot be used, or the study has another definition.
    """
    # Optuna logs the traceback of a failed trial; the sweep logs the reason in one line.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=open_storage(url),
        sampler=sampler,
        pruner=_make_pruner(pruner),
        study_name=name,
        direction="maximize" if maximize else "minimize",
        load_if_exists=True,
    )
    if DEFINITION not in study.user_attrs:
        if study.get_trials(deepcopy=False):
            raise ConfigError(f"study {name!r}: the storage has a study of this name that is not from a sweep")
        study.set_user_attr(DEFINITION, definition)
    old, new = flatten(study.user_attrs[DEFINITION]), flatten(definition)
    if different := sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)):
        lines = [
            f"{key.removeprefix('config.')}: {old.get(key)!r} in the study, {new.get(key)!r} requested"
            for key in different
        ]
        raise ConfigError(
            f"study {name!r}: has another config, space or seed, so its trials cannot be compared with new ones; "
            "choose another study name\n  " + "\n  ".join(lines)
        )
    return study


def _make_pruner(name: str) -> BasePruner:
    if name not in PRUNERS:
        raise ConfigError(f"pruner: expected one of {', '.join(PRUNERS)}, found {name!r}{did_you_mean(name, PRUNERS)}")
    with ignore_experimental():
        return _WithoutInterrupted(PRUNERS[name]())


def open_storage(url: URL) -> RDBStorage:
    """Connects to a database, which is closed with the last reference to the result.

    Raises:
        ConfigError: as `open_study`.
    """
    sqlite = url.get_backend_name() == "sqlite"
    for _ in range(ATTEMPTS):
        try:
            with ignore_experimental():
                storage = RDBStorage(
                    url.render_as_string(hide_password=False),
                    engine_kwargs={"connect_args": {"timeout": LOCK_TIMEOUT}} if sqlite else None,
                    heartbeat_interval=HEARTBEAT,
                    grace_period=GRACE,
                )
            weakref.finalize(storage, _close, storage.scoped_session, storage.engine)
            return storage
        except ImportError as error:
            reason = f"{error.__cause__ or error}; install the driver"
            raise ConfigError(f"storage {without_secrets(url)}: {reason}") from None
        except RuntimeError as error:  # the tables are from another version of Optuna
            raise ConfigError(f"storage {without_secrets(url)}: {error}") from None
        except (SQLAlchemyError, StorageInternalError) as error:
            # Processes that start together all find an empty file; the slower ones fail to create the tables.
            if not any(text in str(error.__cause__ or error) for text in ("already exists", "UNIQUE constraint")):
                raise
        time.sleep(random.uniform(0.05, 0.3))
    raise ConfigError(f"storage {without_secrets(url)}: other processes are creating its tables; try again")


def _close(session: Any, engine: Any) -> None:
    """Closes what Optuna leaves open."""
    session.remove()
    engine.dispose()


def is_finished(trial: FrozenTrial) -> bool:
    """Whether the trial ended by itself. Interrupted trials did not, and do not count."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or ERROR in trial.user_attrs


class _WithoutInterrupted(BasePruner):
    """Lets a pruner compare a trial with all others but those interrupted, which run again under another number.

    Their values would count twice; where the two differ in the last digit, the better one would stop the other.
    """

    def __init__(self, pruner: BasePruner) -> None:
        self.pruner = pruner

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        shown = copy.copy(study)
        shown.get_trials = lambda *args, **options: list(filter(_counts, study.get_trials(*args, **options)))
        return self.pruner.prune(shown, trial)


def _counts(trial: FrozenTrial) -> bool:
    """Whether the trial is running or ended by itself."""
    return not trial.state.is_finished() or is_finished(trial)


class GridSampler(RandomSampler):
    """Draws each point of a grid once, in their order and not at random; those of interrupted trials are drawn again.

    Args:
        grid: the points, as parameters of a trial.
    """

    def __init__(self, grid: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self.grid = grid
        self.points: dict[int, Mapping[str, Any]] = {}  # by the number of the trial

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        others = [each for each in study.get_trials(deepcopy=False) if each.number != trial.number and _counts(each)]
        taken = [each.params for each in others if each.params]
        # Other processes may have started trials that have not drawn their points yet.
        starting = sum(not each.params and each.number < trial.number for each in others)
        free = [point for point in self.grid if point not in taken]
        self.points[trial.number] = free[min(starting, len(free) - 1)] if free else self.grid[0]

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.points[trial.number][param_name]


class SeededSampler(TPESampler):
    """TPE whose draws depend only on the seed, the number of the trial and the earlier trials.

    A sweep in one process is reproducible, several processes never draw the same random numbers, and a resumed sweep
    does not repeat its first draws.

    Source: TPE, Bergstra et al. 2011; multivariate as in BOHB, arXiv 1807.01774.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._start(seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._start(int(np.random.SeedSequence([self.seed, trial.number]).generate_state(1)[0]))
        super().before_trial(study, trial)

    def _start(self, seed: int) -> None:
        with ignore_experimental():
            # constant_liar: assumes bad scores for running trials, so that processes do not try similar values.
            super().__init__(seed=seed, multivariate=True, constant_liar=True)
