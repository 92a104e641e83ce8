"""Numbers and tables as the pages show them."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table; the first `text_columns` columns hold text, the others numbers."""
    lines = [" | ".join(head), " | ".join("---" if index < text_columns else "---:" for index in range(len(head)))]
    return "\n".join(f"| {line} |" for line in [*lines, *(" | ".join(row) for row in rows)])


def percent(value: float) -> str:
    """A share as a number of percent."""
    return f"{100 * value:.1f}"


def minutes(seconds: float) -> str:
    """A duration."""
    return f"{seconds / 60:.1f} min"
