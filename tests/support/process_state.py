"""What a test may change in its process, so that commands can run in it: `main([...])` instead of a new process."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from lora_hf.lora import active_adapter

LOGGERS = (None, "lora_hf", "transformers", "bitsandbytes.backends.cpu.ops")  # that commands change; None is the root
PYTEST_VARIABLE = "PYTEST_CURRENT_TEST"


@contextmanager
def restored_process_state() -> Iterator[None]:
    """Restores logging, environment, working directory, random generators, torch settings and the active adapters.

    pytest itself restores the warning filters after each test.
    """
    loggers = [(logger, logger.level, logger.handlers[:]) for logger in map(logging.getLogger, LOGGERS)]
    environment, folder = dict(os.environ), Path.cwd()
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - users draw from it
    threads, dtype, gradients = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    adapters = active_adapter._overrides.get()
    try:
        yield
    finally:
        for logger, level, handlers in loggers:
            if logger.level != level:  # setting it clears the caches of thousands of loggers
                logger.setLevel(level)
            for handler in logger.handlers[:]:
                if handler not in handlers:
                    logger.removeHandler(handler)
        _restore_environment(environment)
        os.chdir(folder)
        random.setstate(generators[0])
        np.random.set_state(generators[1])  # noqa: NPY002
        torch.set_rng_state(generators[2])
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        active_adapter._overrides.set(adapters)


def _restore_environment(before: dict[str, str]) -> None:
    for name in (os.environ.keys() | before.keys()) - {PYTEST_VARIABLE}:
        if name not in before:
            del os.environ[name]
        elif os.environ.get(name) != before[name]:
            os.environ[name] = before[name]
