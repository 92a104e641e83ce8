"""The synthetic data: the same every time, labeled by their rule, and not solved by counting words."""

from __future__ import annotations

import hashlib
import json
import re

import pytest

from lora_hf.core.errors import DataError
from lora_hf.data.synthetic import HELD_OUT_ADJECTIVES, rule_restaurants, rule_sentiment

POSITIVE = {
    *("good", "wonderful", "beautiful", "excellent", "lovely", "charming", "delightful", "perfect", "clever"),
    *("pleasant", "splendid", "fine", "loved", "enjoyed", "liked", "admired", "praised"),
    *HELD_OUT_ADJECTIVES[1],
}
NEGATIVE = {
    *("bad", "terrible", "ugly", "awful", "dreadful", "dull", "poor", "horrible", "stupid", "boring", "miserable"),
    *("worthless", "hated", "disliked", "regretted", "cursed", "despised"),
    *HELD_OUT_ADJECTIVES[0],
}
NEGATION = re.compile(r"\b(not|never|nobody|nothing)\b", re.IGNORECASE)


def digest(rows: list[dict]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def words(sentence: str) -> list[str]:
    return re.findall(r"[a-z]+", sentence.lower())


def read(sentence: str) -> int:
    """The rule once more: the sentiment of the last opinion word, inverted by a negation."""
    senses = [int(word in POSITIVE) for word in words(sentence) if word in POSITIVE | NEGATIVE]
    return senses[-1] ^ bool(NEGATION.search(sentence))


def frame(sentence: str) -> str:
    """The sentence without its opinion words and intensifiers: its template with the noun in it."""
    dropped = POSITIVE | NEGATIVE | {"very", "really", "quite", "so", "a", "an"}
    return " ".join(word for word in words(sentence) if word not in dropped)


def test_the_same_rows_every_time() -> None:
    # Fixed digests: a Python or an edit that changes a row makes every stored result incomparable.
    assert digest(rule_sentiment("train")) == "00c3424f3fce99ba"
    assert digest(rule_sentiment("validation")) == "75f7ce854dbfc403"
    assert [digest(rule_restaurants(split)) for split in ("train", "validation", "test")] == [
        "db49d19d945197a7",
        "ad2b56bb03225b33",
        "5bd1705cac389ea6",
    ]


@pytest.mark.parametrize(("split", "count"), [("train", 2000), ("validation", 500)])
def test_sentiment_is_balanced_and_follows_its_rule(split: str, count: int) -> None:
    rows = rule_sentiment(split)
    assert len(rows) == len({row["sentence"] for row in rows}) == count
    assert sum(row["label"] for row in rows) == count // 2
    assert [row["idx"] for row in rows] == list(range(count))
    assert [row["sentence"] for row in rows if read(row["sentence"]) != row["label"]] == []
    mixed = [row for row in rows if {*words(row["sentence"])} & POSITIVE and {*words(row["sentence"])} & NEGATIVE]
    negated = [row for row in rows if NEGATION.search(row["sentence"])]
    for hard in (mixed, negated):
        assert len(hard) == pytest.approx(count / 6, abs=2)
        assert sum(row["label"] for row in hard) == pytest.approx(len(hard) / 2, abs=1)


def test_validation_shares_no_frame_with_train() -> None:
    train, validation = rule_sentiment("train"), rule_sentiment("validation")
    assert not {frame(row["sentence"]) for row in train} & {frame(row["sentence"]) for row in validation}
    held_out = {*HELD_OUT_ADJECTIVES[0], *HELD_OUT_ADJECTIVES[1]}
    assert not any(held_out & {*words(row["sentence"])} for row in train)
    share = sum(bool(held_out & {*words(row["sentence"])}) for row in validation) / len(validation)
    assert 0.3 < share < 0.7


def test_counting_words_does_not_solve_it() -> None:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    train, validation = rule_sentiment("train"), rule_sentiment("validation")
    vectorizer = CountVectorizer()
    model = LogisticRegression(max_iter=1000)
    model.fit(vectorizer.fit_transform([row["sentence"] for row in train]), [row["label"] for row in train])
    counted = vectorizer.transform([row["sentence"] for row in validation])
    assert 0.55 < model.score(counted, [row["label"] for row in validation]) < 0.75


def slots(meaning: str) -> dict[str, str]:
    return dict(re.findall(r"([^,\[\]]+)\[([^\]]*)\](?:, )?", meaning))


@pytest.mark.parametrize(("split", "count", "each"), [("train", 2000, 2), ("validation", 200, 5), ("test", 200, 5)])
def test_restaurants_express_every_slot(split: str, count: int, each: int) -> None:
    rows = rule_restaurants(split)
    assert len(rows) == count
    groups = [rows[start : start + each] for start in range(0, count, each)]
    for group in groups:
        assert len({row["meaning_representation"] for row in group}) == 1
        assert len({row["human_reference"] for row in group}) == each
    assert len({group[0]["meaning_representation"] for group in groups}) == count // each
    order = ["name", "eatType", "food", "priceRange", "customer rating", "area", "familyFriendly", "near"]
    for row in rows:
        meaning, text = slots(row["meaning_representation"]), row["human_reference"]
        assert list(meaning) == [slot for slot in order if slot in meaning]
        family = meaning.pop("familyFriendly", None)
        missing = [value for value in meaning.values() if value not in text]
        assert not missing, (row, missing)
        assert ("family" in text or "families" in text or "children" in text) == (family is not None)
        assert ("is not family" in text or "does not welcome" in text) == (family == "no")
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text, re.IGNORECASE)


def test_restaurants_share_no_meaning_between_splits() -> None:
    train, validation, test = (
        {row["meaning_representation"] for row in rule_restaurants(split)} for split in ("train", "validation", "test")
    )
    assert not train & validation
    assert not (train | validation) & test


@pytest.mark.parametrize("make", [rule_sentiment, rule_restaurants])
def test_unknown_split(make) -> None:
    with pytest.raises(DataError, match="the synthetic data have no split 'dev'; there are: train, validation"):
        make("dev")
