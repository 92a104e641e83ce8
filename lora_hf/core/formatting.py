"""Markdown tables, percentages, durations and long texts as reports, progress lines and messages show them."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[object]], text_columns: int = 1) -> str:
    """Returns a Markdown table whose columns after the first `text_columns` are right-aligned numbers."""
    rule = ["---" if index < text_columns else "---:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, rule, *rows))


def count(number: int, noun: str) -> str:
    """Such as "1 run" and "2 runs"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def cut(text: str, longest: int) -> str:
    """Returns the text, or the first `longest` characters of a longer one and an ellipsis."""
    return text if len(text) <= longest else f"{text[:longest]}..."


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


def duration(seconds: float) -> str:
    """Returns whole seconds below a minute, at least one; otherwise minutes."""
    rounded = max(round(seconds), 1)
    return f"{rounded} s" if rounded < 60 else minutes(seconds)
