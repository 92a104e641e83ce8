"""Patterns of adapter files match what `re` matches, and cannot hang."""

from __future__ import annotations

import re
import warnings

import pytest

from lora_hf.core.errors import AdapterError
from lora_hf.lora.path_patterns import MatchBudget, PathPattern

HOSTILE = r"((?P<x>[a-z]|\w|\.)*)*(?P=x)[A-Z]"
PATHS = (
    "roberta.encoder.layer.0.attention.self.query",
    "roberta.encoder.layer.11.output.dense",
    "model.layers.3.self_attn.q_proj",
    "model.layers.3.mlp.experts.10.gate_proj",
    "lm_head",
    "a{e}",
    "a{e<=1}",
    "b",
    "aaa",
    "[:",
    ":]",
    "",
)
PATTERNS = (
    r".*\.(q|v)_proj",
    r".*(query|dense)",
    r"roberta\.encoder\.layer\.(?:0|1)\.attention\.self\.(?:query|value)",
    r"model\.layers\.(?P<idx>\d+)\..*_proj",
    r"(.*\.)?(q_proj)$",
    r".*?\.[^.]*\.(\d+)\.",
    r"(?:^|.*?\.)layers\.(\d+)\.",
    r"(?!.*mlp).*proj",
    r"(?i:.*Q_PROJ)",
    r"\w+",
    r"(\w)\1+",
    r"a{2,3}|a{3}|a{,3}|a{,}",
    # The ones that `regex` alone reads differently.
    r"a{e<=1}",
    r"a{e}",
    r"a\{e}",
    r"a{}",
    r"[[:alpha:]]",
    r"[:\[]+",
    r"[[:\]]+",
    r"\N{LATIN SMALL LETTER B}",
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_what_re_matches(pattern: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # `re` announces sets within sets
        ours = PathPattern(pattern, "here", AdapterError)
        for path in PATHS:
            for method in ("match", "fullmatch"):
                found, wanted = getattr(ours, method)(path), getattr(re, method)(pattern, path)
                assert (found and (found.span(), found.groups())) == (wanted and (wanted.span(), wanted.groups()))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "is not a regular expression"),
        (r"\p{L}", "is not a regular expression"),  # `regex` reads it, `re` and PEFT do not
        ("(" * 50_000 + ")" * 50_000, "is not a regular expression"),
        ("a{99999999999999}", "is not a regular expression"),
        ("((a{1000}){1000}){1000}", "at most 10000 repetitions"),
    ],
)
def test_a_pattern_that_cannot_be_compiled_is_one_error(pattern: str, message: str) -> None:
    with pytest.raises(AdapterError, match=message) as error:
        PathPattern(pattern, "here", AdapterError)
    assert str(error.value).startswith("here: ")
    assert len(str(error.value)) < 400


def test_a_match_that_takes_too_long_is_one_error() -> None:
    with pytest.raises(AdapterError, match="takes too long"):
        PathPattern(HOSTILE, "here", AdapterError, MatchBudget(0.05)).fullmatch(PATHS[0])


def test_the_patterns_of_one_file_share_their_time() -> None:
    budget = MatchBudget(0.05)
    patterns = [PathPattern(HOSTILE, "here", AdapterError, budget) for _ in range(2)]
    with pytest.raises(AdapterError):
        patterns[0].match(PATHS[0])
    assert budget.seconds < 0.01
    with pytest.raises(AdapterError):
        patterns[1].match(PATHS[0])
