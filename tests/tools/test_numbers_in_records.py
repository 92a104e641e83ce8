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


def test_numbers_of_the_record_are_explained_however_they_are_written() -> None:
    assert unexplained(PAGE, [RECORD]) == []


@pytest.mark.parametrize("number", ["67,349", "0.695", "69.5", "2026", "16", "1e-05", "1.16"])
def test_a_changed_digit_is_found(number: str) -> None:
    place = re.search(r"\d(?!.*\d)", number)
    assert place
    changed = f"{number[: place.start()]}{(int(place.group()) + 3) % 10}{number[place.end() :]}"
    assert unexplained(PAGE.replace(number, changed, 1), [RECORD]) == [changed]


def test_a_sum_that_nobody_recorded_is_found() -> None:
    assert unexplained("2 runs and 3 tasks", [{"runs": 2}]) == ["3"]
