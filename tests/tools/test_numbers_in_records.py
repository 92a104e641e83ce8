"""`numbers_in_records` finds the numbers that no record explains, and no others."""

from __future__ import annotations

import re

import pytest

from tests.support.numbers_in_records import unexplained

RECORD = {"rows": 67349, "score": 0.694821, "bytes": 1158622, "history": [{"lr": 1e-05}], "note": "r=16 of 2026-11-21"}
PAGE = """# Results of tiny-gpt2

67,349 rows gave 0.695 (69.5 %), on 2026-11-21 with r=16 and lr 1e-05; the file has 1.16 MB. See [here](run-17.json).

> Row 99 of the data says 1234.

```bash
lora-hf train --seed 55
```
"""


def test_numbers_of_a_record_are_explained_in_every_rendering() -> None:
    assert unexplained(PAGE, [RECORD]) == []


@pytest.mark.parametrize("number", ["67,349", "0.695", "69.5", "2026", "16", "1e-05", "1.16"])
def test_a_changed_digit_is_found(number: str) -> None:
    last = re.search(r"\d(?!.*\d)", number)
    assert last
    changed = f"{number[: last.start()]}{(int(last.group()) + 3) % 10}{number[last.end() :]}"
    assert unexplained(PAGE.replace(number, changed, 1), [RECORD]) == [changed]


def test_a_number_without_a_record_is_found() -> None:
    assert unexplained("2 runs and 3 tasks", [{"runs": 2}]) == ["3"]
