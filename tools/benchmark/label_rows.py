"""Rows with several labels, written by rule: a label's words are in a text exactly where the row has the label."""

from __future__ import annotations

import random
from typing import Any

WORDS = {
    "billing": ("the invoice is wrong", "I was charged twice", "please send the refund"),
    "network": ("the router restarts", "there is no signal", "the connection drops"),
    "account": ("I cannot log in", "my password expired", "the profile shows another name"),
    "delivery": ("the parcel is late", "the courier never came", "the box was open"),
    "praise": ("your team is kind", "thanks for the quick answer", "I like the new app"),
}
LABELS = tuple(WORDS)
SHARES = (0.45, 0.35, 0.25, 0.15, 0.05)  # of the rows that have each label
FILLERS = ("I write again about order", "Since Monday, order", "Regarding my last message, order", "Hello, order")


def label_rows(count: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
    """Rows {text, labels}; some texts also say that a label's problem is solved, and have no label for it."""
    generator = random.Random(f"label rows {seed}")
    rows = []
    for number in range(count):
        labels = [name for name, share in zip(LABELS, SHARES, strict=True) if generator.random() < share]
        parts = [generator.choice(WORDS[name]) for name in labels]
        others = [name for name in LABELS if name not in labels]
        if generator.random() < 0.3:
            parts.append(f"it is no longer true that {generator.choice(WORDS[generator.choice(others or LABELS[:1])])}")
            labels = [name for name in labels if others or name != LABELS[0]]
        generator.shuffle(parts)
        text = f"{generator.choice(FILLERS)} {1000 + number}: {', and '.join(parts) or 'nothing to report'}."
        rows.append({"text": text, "labels": labels})
    return rows
