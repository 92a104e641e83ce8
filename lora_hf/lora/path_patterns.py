"""Regular expressions over module paths. They match as in `re`, but a hostile one cannot hang the process.

`regex` can stop a match after some time, which `re` cannot. Where the two read an expression differently, it is
rewritten so that `regex` reads it as `re` does.
"""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from typing import Any

import regex

from lora_hf.core.errors import UserError
from lora_hf.core.formatting import cut

SHOWN = 200  # characters of an expression in a message
MAX_REPEATS = 10_000  # `regex` writes out fixed repetitions: ((a{1000}){1000}){1000} would take gigabytes
# Names and escapes stay as they are. To `re`, a brace that begins no repetition is a brace, and a colon after a bracket
# is a colon; to `regex`, they can begin a fuzzy match and a POSIX class.
_READ_DIFFERENTLY = re.compile(r"\\N\{[^}]*\}|\\.|\{(?!(?:\d+(?:,\d*)?|,\d*)\})|\[:", re.DOTALL)
_REWRITTEN = {"{": r"\{", "[:": r"[\:"}


@dataclass
class MatchBudget:
    """The CPU time for all matches of the expressions that share it. 100,000 ordinary ones take 0.1 s."""

    seconds: float = 2.0


class PathPattern:
    """An expression from a user's file.

    Args:
        where: names the file and field in errors.
        error: the class of the errors: the expression is invalid, or matching it takes too long.
    """

    def __init__(self, expression: str, where: str, error: type[UserError], budget: MatchBudget | None = None) -> None:
        self.expression, self.where, self.error = expression, where, error
        self.budget = budget or MatchBudget()
        try:
            re.compile(expression)
            repeats = math.prod(max(1, int(count)) for count in re.findall(r"\{(\d+)", expression))
            if repeats > MAX_REPEATS:
                raise ValueError(f"expected at most {MAX_REPEATS} repetitions, found {repeats}")
            rewritten = _READ_DIFFERENTLY.sub(lambda found: _REWRITTEN.get(found[0], found[0]), expression)
            self._compiled = regex.compile(rewritten, regex.VERSION0)
        except (re.error, regex.error, TypeError, ValueError, OverflowError, RecursionError) as problem:
            raise error(f"{where}: {cut(repr(expression), SHOWN)} is not a regular expression: {problem}") from problem

    def fullmatch(self, path: str) -> Any:
        return self._within_budget(self._compiled.fullmatch, path)

    def match(self, path: str) -> Any:
        return self._within_budget(self._compiled.match, path)

    def _within_budget(self, match: Any, path: str) -> Any:
        start = time.thread_time()
        try:
            return match(path, timeout=self.budget.seconds)
        except TimeoutError:
            raise self.error(
                f"{self.where}: {cut(repr(self.expression), SHOWN)} takes too long to match module paths; write it "
                "without repetitions inside repetitions"
            ) from None
        finally:
            self.budget.seconds = max(1e-3, self.budget.seconds - (time.thread_time() - start))
