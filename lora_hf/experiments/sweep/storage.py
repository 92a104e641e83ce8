"""Where the trials of a sweep are kept and shared: an Optuna study in a database."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from lora_hf.core.errors import ConfigError

HEARTBEAT = 10  # seconds between two signs of life of a running trial
GRACE = 60  # seconds without one, after which its process is taken for dead
LOCK_TIMEOUT = 60  # seconds that a process waits for another to finish writing to a SQLite file
TRIES = 10  # of processes that make the tables of one new file at the same time
STARTUP = 5  # complete trials before any is pruned
ERROR = "error"  # the attribute of a trial that says why it failed
ABOUT = "lora_hf"  # the attribute of a study that says what its trials are


@contextmanager
def experimental() -> Iterator[None]:
    """What Optuna calls experimental is what is used here: the heartbeat, the joint TPE, plots by matplotlib."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


@contextmanager
def told(url: URL) -> Iterator[None]:
    """Errors of the database as errors of the option, without the user, password and token that a URL may hold."""
    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        reason = str(getattr(cause, "orig", None) or cause or error).strip().partition("\n")[0]
        for secret in (url.password, *url.query.values()):
            reason = reason.replace(str(secret), "***") if secret else reason
        raise ConfigError(f"--storage {shown(url)}: {reason}") from None


def shown(url: URL) -> str:
    """The URL without what must not be seen: user, password, and the options in which drivers take tokens."""
    return url._replace(username=None, password=None, query={}).render_as_string()  # type: ignore[arg-type]


def check_study(name: str, trials: int) -> None:
    """Raises ConfigError where no study can have this name, or this number of trials."""
    if trials < 1:
        raise ConfigError(f"--trials: expected a whole number >= 1, found {trials}")
    if name in ("", ".", "..") or Path(name).name != name:
        raise ConfigError(f"--study {name}: expected a name for a folder, without slashes")


def parse_url(storage: str) -> URL:
    """The parts of a storage URL.

    Raises:
        ConfigError: it is no URL, or one of a database that keeps nothing.
    """
    try:
        url = make_url(storage)
    except ArgumentError:
        # Not shown: what is no URL may still hold a password.
        raise ConfigError(
            "--storage: expected a URL such as sqlite:///sweep.db or postgresql://user@host/name, found something else"
        ) from None
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise ConfigError(f"--storage {shown(url)}: keeps nothing; name a file: sqlite:///sweep.db")
    return url


def open_study(url: URL, name: str, sampler: BaseSampler, maximise: bool, about: dict[str, Any]) -> optuna.Study:
    """The study of this name, made where there is none.

    Args:
        about: what its trials are: config, space, seed; kept with the study.

    Raises:
        ConfigError: the database cannot be used, or the study is of other trials.
    """
    # Of a failed trial it would show the traceback; a line of ours says why.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=_storage(url),
        sampler=sampler,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP),
        study_name=name,
        direction="maximize" if maximise else "minimize",
        load_if_exists=True,
    )
    if ABOUT not in study.user_attrs:
        if study.get_trials(deepcopy=False):
            raise ConfigError(f"--study {name}: the storage holds a study of this name that no sweep of ours made")
        study.set_user_attr(ABOUT, about)
    different = _different(study.user_attrs[ABOUT], about)
    if different:
        raise ConfigError(
            f"--study {name}: was made with another config, space or seed, so its trials cannot be compared with "
            "these; choose another --study\n  " + "\n  ".join(different)
        )
    return study


def _storage(url: URL) -> RDBStorage:
    for _ in range(TRIES):
        storage = _connect(url)
        if storage is not None:
            return storage
        time.sleep(random.uniform(0.05, 0.3))
    raise ConfigError(f"--storage {shown(url)}: other processes are making its tables; try again")


def _connect(url: URL) -> RDBStorage | None:
    """The database with its tables; None where another process is making them at this moment."""
    sqlite = url.get_backend_name() == "sqlite"
    try:
        with experimental():
            return RDBStorage(
                url.render_as_string(hide_password=False),
                engine_kwargs={"connect_args": {"timeout": LOCK_TIMEOUT}} if sqlite else None,
                heartbeat_interval=HEARTBEAT,
                grace_period=GRACE,
            )
    except ImportError as error:
        raise ConfigError(f"--storage {shown(url)}: {error.__cause__ or error}; install the driver") from None
    except RuntimeError as error:
        raise ConfigError(f"--storage {shown(url)}: {error}") from None  # tables of another version of Optuna
    except (SQLAlchemyError, StorageInternalError) as error:
        # Processes that start together all find a new file empty, and one makes the tables before the others.
        if any(word in str(error.__cause__ or error) for word in ("already exists", "UNIQUE constraint")):
            return None
        raise


def _different(kept: dict[str, Any], wanted: dict[str, Any], path: str = "") -> list[str]:
    """The places where the two differ, a line each."""
    lines = []
    for key in sorted(kept.keys() | wanted.keys()):
        before, now = kept.get(key), wanted.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            lines += _different(before, now, f"{path}{key}.")
        elif before != now:
            lines.append(f"{path.removeprefix('config.')}{key}: {before!r} there, {now!r} here")
    return lines


def finished(trial: FrozenTrial) -> bool:
    """Whether the trial came to its own end. One that was interrupted did not, and is not counted."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or ERROR in trial.user_attrs


class SeededSampler(BaseSampler):
    """TPE whose draws depend on the seed and the trial's number.

    One process repeats itself; several, which never have the same number, never draw the same numbers; and a sweep that
    goes on does not begin again with its first draws.

    Source: TPE, Bergstra et al. 2011; joint over all keys as in BOHB, arXiv 1807.01774.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.tpe = TPESampler()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        seed = int(np.random.SeedSequence([self.seed, trial.number]).generate_state(1)[0])
        with experimental():
            # constant_liar: trials that run in other processes are taken for bad ones, and not tried again beside.
            self.tpe = TPESampler(seed=seed, multivariate=True, constant_liar=True)
        return self.tpe.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self.tpe.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.tpe.sample_independent(study, trial, param_name, param_distribution)
