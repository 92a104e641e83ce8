"""The processes that train one model together, started by torchrun or accelerate launch.

Each process runs the same code on its own rows. One of them does what must happen only once: it creates the folder,
writes the files and reports errors. Importing this module does not import torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any

from lora_hf.core.errors import ConfigError, UserError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

DEFAULT_TIMEOUT = timedelta(seconds=1800)  # to wait for other processes, where the config sets no ddp_timeout
STORE_TIMEOUT = timedelta(seconds=10)  # for the store of keys to answer

_calls = count()  # of `run_on_rank`, which all processes make in the same order
_groups: list[Any] = []  # of processes, on the CPU: small messages need not wait for a GPU


def world_size() -> int:
    """The number of processes that were started together."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """The number of this process, from 0."""
    return _number("RANK", 0)


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default  # `check_environment` reports other values


def check_environment() -> None:
    """Raises ConfigError if the launcher's environment variables are inconsistent."""
    found = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if os.environ.get(name)}
    numbers = all(value.isdecimal() for value in found.values())
    together = "WORLD_SIZE" in found and ("RANK" in found or world_size() == 1)
    if found and not (numbers and together and rank() < world_size()):
        listed = ", ".join(f"{name}={value}" for name, value in found.items())
        raise ConfigError(
            f"expected RANK and WORLD_SIZE together, as torchrun and accelerate launch set them, found {listed}; unset "
            "them to train in one process"
        )


def init_processes(cpu: bool = False, backend: str | None = None, timeout: timedelta = DEFAULT_TIMEOUT) -> int:
    """Waits for all processes and returns their number. Does nothing in a single process, or when called again.

    Args:
        cpu: do not use GPUs.
        backend: the backend of torch.distributed; None chooses nccl with GPUs and gloo without.
        timeout: how long to wait for another process, here and later.

    Raises:
        ConfigError: the processes did not find each other.
    """
    if world_size() == 1 or _groups:
        return world_size()
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
            f"process {rank()}: expected {world_size()} processes to meet at {':'.join(map(str, _address()))}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return world_size()


def all_reduce_max(number: int) -> int:
    """The largest number that any process passes. Waits for all processes."""
    if not _groups:
        return number
    import torch
    import torch.distributed as dist

    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MAX, group=_groups[0])
    return int(value)


def barrier() -> None:
    """Returns once every process has called it."""
    all_reduce_max(0)


def run_on_rank(function: Callable[[], Any], chosen: int = 0) -> Any:
    """Calls `function` in one process and returns its result in all processes.

    Args:
        function: returns None or a value that JSON can represent.

    Raises:
        UserError: raised in all processes if `function` raises it.
    """
    if not _groups:
        return function()
    store, key = _store(), f"answer {next(_calls)}"
    if rank() != chosen:
        store.wait([key], DEFAULT_TIMEOUT)
        message = json.loads(store.get(key))
        if "error" in message:
            raise UserError(message["error"])
        return message["answer"]
    try:
        answer = function()
    except UserError as error:
        store.set(key, json.dumps({"error": str(error)}))
        raise
    store.set(key, json.dumps({"answer": answer}))
    return answer


def claim_error_report() -> bool:
    """Whether this process reports the error that ends all processes. The first one to ask gets True.

    A failing process asks before its exit makes the others fail.
    """
    if world_size() == 1:
        return True
    try:
        return _store().add("told", 1) == 1
    except RuntimeError:  # the store ended with the first process: two reports are better than none
        return True


def require_single_process(action: str) -> None:
    """Raises ConfigError if there are several processes, which would overwrite each other's files."""
    if world_size() > 1:
        raise ConfigError(
            f"{action}: expected one process, found {world_size()} (WORLD_SIZE); start it without torchrun or "
            "accelerate launch: only the training of one config runs in several processes"
        )


def destroy_processes() -> None:
    """Leaves the process group once all work is done."""
    if _groups:
        import torch.distributed as dist

        _groups.clear()
        dist.destroy_process_group()


def _address() -> tuple[str, int]:
    return os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))


def _store() -> Any:
    """The launcher's key-value store, which outlives the processes."""
    import torch.distributed

    dist: Any = torch.distributed  # its stores are not in __all__
    store = dist.TCPStore(*_address(), is_master=False, wait_for_workers=False, timeout=STORE_TIMEOUT)
    return dist.PrefixStore(f"lora_hf {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def configure_fsdp(model: PreTrainedModel, plugin: Any, device: torch.device) -> list[nn.Parameter]:
    """Makes accelerate's FSDP2 plugin shard only the frozen layers, and returns the trained parameters.

    LoRA's parameters are few, so sharding them would save nothing. Unsharded, they keep their own precision next to a
    base in another, and are saved, loaded and updated as in one process. `average_gradients` keeps them in sync.

    Raises:
        ConfigError: nothing is frozen, or FSDP is version 1, which flattens trained and frozen parameters into one.
    """
    if all(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("train.method=full: FSDP shards a frozen base here; use DDP or DeepSpeed, or train LoRA")
    from torch import nn

    from lora_hf.lora.fingerprint import fingerprint, store_fingerprint

    version = getattr(plugin, "fsdp_version", 1)
    if version != 2:
        raise ConfigError(f"FSDP: expected fsdp_version 2, found {version}; see configs/accelerate/fsdp2.yaml")
    store_fingerprint(model, fingerprint(model))  # once sharded, no process holds the whole base
    trained = [
        module
        for module in model.modules()
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    ]
    for module in trained:
        module.to(device)
    plugin.ignored_modules = trained
    if plugin.transformer_cls_names_to_wrap is None:
        # RoBERTa and BERT name their embeddings too, which accelerate would shard a second time.
        lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layers in lists for layer in layers})
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replaces each gradient with its mean over all processes."""
    import torch
    import torch.distributed as dist

    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
