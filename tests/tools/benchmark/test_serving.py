"""The server benchmark checks every response, and would notice a wrong one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_hf.core.config.schema import RunConfig, TaskConfig
from lora_hf.core.errors import ConfigError
from tools.benchmark.__main__ import main
from tools.benchmark.serve import TOLERANCES, benchmark_serve, is_close


@pytest.mark.full
def test_every_response_is_checked_while_adapters_are_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "record.json"
    sizes = ["--clients", "4", "--adapters", "2", "--seconds", "2", "--replacements", "4", "--rows", "8"]
    lora = ["--precision", "fp32", "--r", "4", "--targets", "q,v"]
    assert main(["serve", *lora, *sizes, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "4 adapters, 0 failed" in printed
    assert printed.count("0 errors, 0 wrong responses") == 2
    result = json.loads(output.read_text(encoding="utf-8"))
    for part in ("one_at_a_time", "together", "after_the_restart"):
        assert result[part]["requests"] > 0
        assert (result[part]["errors"], result[part]["wrong"]) == (0, 0), result[part]["examples"]
    assert 2 <= result["together"]["versions"] <= 4, "both adapters must have answered"
    assert (result["replaced"]["times"], result["replaced"]["failed"]) == (4, 0)
    assert result["exit_code_after_sigterm"] == 0


@pytest.mark.parametrize(
    ("label", "share", "expected_result"),
    [("yes", 0.7, True), ("yes", 0.70005, True), ("yes", 0.7005, False), ("no", 0.7, False)],
)
def test_a_response_may_differ_by_rounding_only(label: str, share: float, expected_result: bool) -> None:
    expected: dict[str, Any] = {"label": "yes", "probabilities": {"yes": 0.7, "no": 0.3}}
    answer = {"label": label, "probabilities": {"yes": share, "no": 1 - share}}
    assert is_close([answer], expected, TOLERANCES["fp32"]) == expected_result


def test_invalid_numbers_and_tasks_are_reported() -> None:
    with pytest.raises(ConfigError, match=r"--clients 0 .*at least 1"):
        benchmark_serve(RunConfig(task=TaskConfig("rule-sentiment")), clients=0)
    with pytest.raises(ConfigError, match="found rte"):
        benchmark_serve(RunConfig(task=TaskConfig("rte")))
