"""The server benchmark checks every response, and would notice a wrong one."""

from __future__ import annotations

from typing import Any

import pytest

from lora_hf.core.config.schema import LoraConfig, ModelConfig, RunConfig, TaskConfig
from lora_hf.core.errors import ConfigError
from tools.benchmark.serve import TOLERANCES, benchmark_serve, is_close

pytestmark = pytest.mark.usefixtures("forked")

CONFIG = RunConfig(
    ModelConfig(name="tiny-roberta", precision="fp32"),
    TaskConfig("rule-sentiment"),
    LoraConfig(r=4, targets=("q", "v")),
)


@pytest.mark.full
def test_every_response_is_checked_while_adapters_are_replaced() -> None:
    result = benchmark_serve(CONFIG, clients=4, adapters=2, seconds=2.0, replacements=4, rows=8)
    for part in ("one_at_a_time", "together", "after_the_restart"):
        assert result[part]["requests"] > 0
        assert (result[part]["errors"], result[part]["wrong"]) == (0, 0), result[part]["examples"]
    assert result["together"]["versions"] == 4, "both versions of both adapters must have answered"
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
        benchmark_serve(CONFIG, clients=0)
    with pytest.raises(ConfigError, match="found rte"):
        benchmark_serve(RunConfig(task=TaskConfig("rte")))
