"""The official scores of generated texts as an `evaluate.Metric`, without a script downloaded at run time."""

from __future__ import annotations

import datasets
import evaluate

from lora_hf.data.metrics.texts import check_task, score_texts


class NlgMetric(evaluate.Metric):
    """The scores of one task: `NlgMetric("e2e_nlg").compute(predictions=[...], references=[[..., ...], ...])`.

    The references are a list of texts for each prediction. e2e_nlg has BLEU, NIST, METEOR, ROUGE_L and CIDEr as the
    official E2E scorer computes them; dart and web_nlg have BLEU, METEOR and TER. All but NIST and CIDEr are fractions
    of 1. For `tokenized` see `score_texts`.

    A score is None if its scorer cannot run: METEOR, ROUGE_L and CIDEr need Java, all need the extra `nlg`. After
    `compute`, `reasons` says why and what to install, and `tools` names the script that gives the same number.

    Raises:
        ConfigError: not a generation task.
        DataError: from `compute`, no predictions, or a prediction without a reference.

    Source: Dusek et al. 2020 (E2E), section 4; Nan et al. 2021 (DART), section 4; Gardent et al. 2017 (WebNLG).
    """

    def __init__(self, task: str, tokenized: bool = False) -> None:
        check_task(task)
        super().__init__(config_name=task, keep_in_memory=True)
        self.tokenized = tokenized
        self.tools: dict[str, str] = {}
        self.reasons: dict[str, str] = {}

    def _build_data_dir(self) -> str:
        return self._data_dir_root  # the base class would create a folder; this metric keeps nothing on disk

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="The official scores of texts generated for E2E NLG, DART or WebNLG.",
            citation="https://github.com/tuetschek/e2e-metrics, https://github.com/Yale-LILY/dart",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float | None]:
        scores = score_texts(self.config_name, predictions, references, self.tokenized)
        self.tools, self.reasons = scores.tools, scores.reasons
        return scores.values
