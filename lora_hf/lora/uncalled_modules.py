"""Projections that their model never calls: it reads the weight and multiplies by itself, so an adapter has no effect.

torch's MultiheadAttention does so with `out_proj`, and WavLM with all projections of its attention.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterable, Iterator
from types import CodeType

from torch import nn
from transformers import PreTrainedModel

_NOT_RUN = ("__init__", "_init_weights", "_reset_parameters", "reset_parameters")


def uncalled_modules(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """Those of the paths whose module the class around it only reads, with the name of that class."""
    found = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        kind = type(model.get_submodule(parent))
        if name in _only_read(kind):
            found[path] = kind.__name__
    return found


@functools.cache
def _only_read(kind: type[nn.Module]) -> frozenset[str]:
    """The attributes of which the methods of a class read `weight`, and that they use in no other way."""
    read, used = set[str](), set[str]()
    for code in _codes(kind):
        instructions = list(dis.get_instructions(code))
        for owner, each, following in zip(instructions, instructions[1:], instructions[2:], strict=False):
            names = owner.argval if isinstance(owner.argval, tuple) else (owner.argval,)  # two at once in Python 3.13
            if names[-1:] != ("self",) or not each.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")):
                continue
            is_field = following.opname.startswith("LOAD_ATTR") and following.argval in ("weight", "bias")
            (read if is_field else used).add(each.argval)
    return frozenset(read - used)


def _codes(kind: type[nn.Module]) -> Iterator[CodeType]:
    """The code of the methods of a class and its bases below nn.Module, with the functions inside them."""
    methods = [
        inspect.unwrap(member)
        for each in kind.__mro__
        if issubclass(each, nn.Module) and each not in (nn.Module, PreTrainedModel)
        for name, member in vars(each).items()
        if inspect.isfunction(member) and name not in _NOT_RUN
    ]
    codes = [method.__code__ for method in methods]
    while codes:
        code = codes.pop()
        yield code
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
