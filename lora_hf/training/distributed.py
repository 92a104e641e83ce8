"""The processes that train one model together, as torchrun and accelerate launch start them.

Each of them runs the same code on rows of its own. What must be done or decided once, one of them does for all: it
makes the folder, writes the files and tells what went wrong.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from typing import Any

from lora_hf.core.errors import ConfigError, UserError

PATIENCE = timedelta(seconds=1800)  # how long the others are waited for, where a config names no ddp_timeout
REACHED = timedelta(seconds=10)  # in which the store must answer

_calls = count()  # of `from_one`, which all processes make in the same order
_groups: list[Any] = []  # of processes, on the CPU: what they tell each other waits for no GPU


def planned() -> int:
    """How many processes were started together, by what their launcher left in the environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def place() -> int:
    """The number of this process among them; 0 is the first."""
    return int(os.environ.get("RANK", "0"))


def join(cpu: bool = False, backend: str | None = None, timeout: timedelta = PATIENCE) -> int:
    """Waits until all processes are there; returns how many. In a process alone, or a second time, it does nothing.

    Args:
        cpu: leave GPUs alone.
        backend: of torch.distributed; None: nccl with GPUs, gloo without.
        timeout: how long to wait for another process, here and later.

    Raises:
        ConfigError: they did not find each other.
    """
    if planned() == 1 or _groups:
        return planned()
    import torch
    import torch.distributed as dist
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    try:
        PartialState(cpu=cpu, backend=backend, timeout=timeout)
        _groups.append(dist.new_group(timeout=timeout, backend="gloo"))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"process {place()}: expected {planned()} processes to meet at {':'.join(map(str, _address()))}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return planned()


def largest(number: int) -> int:
    """The largest of the numbers that the processes give, each its own; all wait for the last."""
    if not _groups:
        return number
    import torch
    import torch.distributed as dist

    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_groups[0])
    return int(found)


def wait_for_all() -> None:
    """Returns once every process has come here."""
    largest(0)


def from_one(do: Callable[[], Any], chosen: int = 0) -> Any:
    """What `do` returns in one process, the first if none is chosen; the others do nothing and wait for it.

    Args:
        do: gives None, or what JSON can carry.

    Raises:
        UserError: what `do` raised, in all of them.
    """
    if not _groups:
        return do()
    store, key = _store(), f"answer {next(_calls)}"
    if place() != chosen:
        store.wait([key], PATIENCE)
        told = json.loads(store.get(key))
        if "error" in told:
            raise UserError(told["error"])
        return told["answer"]
    try:
        answer = do()
    except UserError as error:
        store.set(key, json.dumps({"error": str(error)}))
        raise
    store.set(key, json.dumps({"answer": answer}))
    return answer


def speaks() -> bool:
    """Whether this process is the one that tells why all of them end: the first to ask.

    One that fails asks before its end lets the others fail.
    """
    if planned() == 1:
        return True
    try:
        return _store().add("told", 1) == 1
    except RuntimeError:  # it ended with the first process: better twice than never
        return True


def refuse(what: str) -> None:
    """Raises ConfigError where several processes would each do the same, over each other's files."""
    if planned() > 1:
        raise ConfigError(
            f"{what}: expected one process, found {planned()} (WORLD_SIZE); start it without torchrun or accelerate "
            "launch: only the training of one config is shared between processes"
        )


def leave() -> None:
    """Parts from the other processes, after all work is done."""
    if _groups:
        import torch.distributed as dist

        _groups.clear()
        dist.destroy_process_group()


def _address() -> tuple[str, int]:
    return os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))


def _store() -> Any:
    """The launcher's store of keys, which it keeps while the processes come and go."""
    import torch.distributed

    dist: Any = torch.distributed  # which exports its stores without saying so
    store = dist.TCPStore(*_address(), is_master=False, wait_for_workers=False, timeout=REACHED)
    return dist.PrefixStore(f"lora_hf {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
