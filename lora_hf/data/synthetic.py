"""Synthetic data for machines without the hub.

`rule_sentiment` makes short opinions whose label follows from words and grammar; `rule_restaurants` makes meaning
representations in the form of E2E (Novikova et al. 2017, arXiv 1706.09254) with sentences that express them. The rows
are the same every time, on every Python.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from lora_hf.core.errors import DataError

# --- sentiment ---------------------------------------------------------------------------------------------------

SENTIMENT_ROWS = {"train": 2000, "validation": 500}

_NOUNS = (
    "film", "story", "ending", "music", "book", "play", "song", "picture", "speech", "dance",
    "meal", "soup", "bread", "coffee", "service", "table", "room", "garden", "hotel", "bed",
    "coat", "chair", "lamp", "clock", "knife", "radio", "camera", "box", "bag", "toy",
)  # fmt: skip

# By label. Validation alone has the held-out ones: a pretrained base can know their sentiment.
_ADJECTIVES = {
    1: ("good", "wonderful", "beautiful", "excellent", "lovely", "charming",
        "delightful", "perfect", "clever", "pleasant", "splendid", "fine"),
    0: ("bad", "terrible", "ugly", "awful", "dreadful", "dull",
        "poor", "horrible", "stupid", "boring", "miserable", "worthless"),
}  # fmt: skip
HELD_OUT_ADJECTIVES = {
    1: ("great", "amazing", "superb", "magnificent", "brilliant", "admirable"),
    0: ("nasty", "disgusting", "hateful", "dreary", "foolish", "shabby"),
}
_VERBS = {
    1: ("loved", "enjoyed", "liked", "admired", "praised"),
    0: ("hated", "disliked", "regretted", "cursed", "despised"),
}

# Sentence frames by kind; `same` has the sentiment of the label, `other` the opposite one.
_PLAIN = (
    "The {noun} was {very}{same}.",
    "I found the {noun} {very}{same}.",
    "It was a {noun} that everyone called {same}.",
    "We said that the {noun} was {very}{same} and {same2}.",
    "The {noun} we saw on Monday looked {very}{same}.",
    "My sister {verb} the {noun}.",
    "All of us {verb} the {noun} from the first day.",
    "They told us that the new {noun} was {very}{same}.",
    "In the evening I thought about the {noun}, and it was {same}.",
    "My friends {verb} the {noun} because it was {same}.",
)
_NEGATED = (
    "The {noun} was not at all {other}.",
    "I never thought the {noun} was {other}.",
    "Nobody said that the {noun} was {other}.",
    "There was nothing {other} about the {noun}.",
    "It was a {noun} that was not {very}{other}.",
    "We did not think that the {noun} was {other}.",
)
_CONTRASTED = (
    "The {noun} was {other} at first, but in the end it was {same}.",
    "I expected a {other} {noun}, but it was {very}{same}.",
    "Although my brother called the {noun} {other}, it was {same}.",
    "The {noun} had been {other} before, but now it was {very}{same}.",
    "It looked {other}, but the {noun} was {same}.",
    "The {noun} was {very}{other} last year; this year it was {same}.",
)
_INTENSIFIERS = ("", "", "very ", "really ", "quite ", "so ")


def rule_sentiment(split: str) -> list[dict]:
    """Returns the rows {sentence, label, idx} of `split`, "train" (2,000) or "validation" (500), half of each label.

    Single words do not solve a third of the sentences: a sixth mean the opposite of their only opinion word ("not at
    all dull"), a sixth have words of both sentiments and mean the last ("dull at first, but in the end charming").
    Validation has no pair of frame and noun of train, and half of its adjectives never occur in train.

    Raises:
        DataError: another split.
    """
    _check_split(split, SENTIMENT_ROWS)
    rng = random.Random(f"rule_sentiment {split} 0")
    rows, seen = [], set()
    while len(rows) < SENTIMENT_ROWS[split]:
        # The label alternates, and each kind comes twice in a row, so that every kind has half of each label.
        label = len(rows) % 2
        frames = (_PLAIN, _PLAIN, _PLAIN, _PLAIN, _NEGATED, _CONTRASTED)[len(rows) // 2 % 6]
        sentence = _opinion(rng, frames, label, split)
        if sentence not in seen:
            seen.add(sentence)
            rows.append({"sentence": sentence, "label": label})
    rng.shuffle(rows)
    return [{**row, "idx": index} for index, row in enumerate(rows)]


def _opinion(rng: random.Random, frames: Sequence[str], label: int, split: str) -> str:
    frame = rng.randrange(len(frames))
    # Validation has every fifth noun, others for each frame.
    nouns = [noun for index, noun in enumerate(_NOUNS) if ((index + frame) % 5 == 0) == (split == "validation")]
    same, same2 = rng.sample(_adjectives(rng, label, split), 2)
    sentence = frames[frame].format(
        noun=rng.choice(nouns),
        same=same,
        same2=same2,
        other=rng.choice(_adjectives(rng, 1 - label, split)),
        verb=rng.choice(_VERBS[label]),
        very=rng.choice(_INTENSIFIERS),
    )
    return _with_articles(sentence)


def _adjectives(rng: random.Random, label: int, split: str) -> tuple[str, ...]:
    held_out = split == "validation" and rng.random() < 0.5
    return (HELD_OUT_ADJECTIVES if held_out else _ADJECTIVES)[label]


# --- restaurants -------------------------------------------------------------------------------------------------

RESTAURANT_ROWS = {"train": 2000, "validation": 200, "test": 200}
_REFERENCES_EACH = {"train": 2, "validation": 5, "test": 5}

_FIRST_NAMES = ("Copper", "Willow", "Silver", "Maple", "Harbour", "Winter", "Orchard", "Lantern", "Marble", "Falcon")
_LAST_NAMES = ("Kettle", "Spoon", "Oven", "Kitchen", "Cellar", "House")
_SLOTS = {
    "eatType": ("restaurant", "pub", "coffee shop"),
    "food": ("Chinese", "English", "French", "Indian", "Italian", "Japanese"),
    "priceRange": ("cheap", "moderate", "high", "less than £20", "£20-25", "more than £30"),
    "customer rating": ("low", "average", "high", "1 out of 5", "3 out of 5", "5 out of 5"),
    "area": ("riverside", "city centre"),
    "familyFriendly": ("yes", "no"),
    "near": ("Old Mill", "Stone Bridge", "Market Hall", "Clock Tower", "Rose Garden", "Railway Inn"),
}

_OPENINGS = (
    "{name} is a {food}{eat}{location}.",
    "There is a {food}{eat} called {name}{location}.",
    "{name}, a {food}{eat}, can be found{location}.",
    "If you want a {food}{eat}, try {name}{location}.",
)
_PRICES = ("has {} prices", "offers {} prices")
_AMOUNTS = ("costs {}", "asks {} for a meal")
_RATINGS = ("has a customer rating of {}", "is rated {} by customers")
_FAMILY = {
    "yes": ("is family friendly", "welcomes families with children"),
    "no": ("is not family friendly", "does not welcome children"),
}


def rule_restaurants(split: str) -> list[dict[str, str]]:
    """Returns the rows {meaning_representation, human_reference}: 2,000 of "train", 200 of "validation" and of "test".

    A meaning representation is repeated on consecutive rows, once for each of its references: 2 in train, 5 in the
    others. Splits share none, and each reference expresses all of its slots. The names are invented.

    Raises:
        DataError: another split.
    """
    _check_split(split, RESTAURANT_ROWS)
    meanings: set[str] = set()
    for current in RESTAURANT_ROWS:  # all splits up to `split`: a meaning belongs to the first that draws it
        rng = random.Random(f"rule_restaurants {current} 0")
        rows: list[dict[str, str]] = []
        while len(rows) < RESTAURANT_ROWS[current]:
            slots = _restaurant(rng)
            meaning = ", ".join(f"{slot}[{value}]" for slot, value in slots.items())
            if meaning in meanings:
                continue
            meanings.add(meaning)
            references: dict[str, None] = {}
            while len(references) < _REFERENCES_EACH[current]:
                references[_reference(rng, slots)] = None
            rows += [{"meaning_representation": meaning, "human_reference": reference} for reference in references]
        if current == split:
            return rows
    raise AssertionError("unreachable: the split was checked")


def _restaurant(rng: random.Random) -> dict[str, str]:
    """Draws a name, an eatType, and three to six other slots: with fewer there are not five different references."""
    optional = [slot for slot in _SLOTS if slot != "eatType"]
    chosen = {"eatType", *rng.sample(optional, rng.randint(3, len(optional)))}
    name = f"The {rng.choice(_FIRST_NAMES)} {rng.choice(_LAST_NAMES)}"
    return {"name": name, **{slot: rng.choice(values) for slot, values in _SLOTS.items() if slot in chosen}}


def _reference(rng: random.Random, slots: dict[str, str]) -> str:
    in_area = f" in the {slots['area']} area" if "area" in slots else ""
    near = f" near {slots['near']}" if "near" in slots else ""
    location = in_area + near if rng.random() < 0.5 else near + in_area
    openings = _OPENINGS if location else tuple(frame for frame in _OPENINGS if "found" not in frame)
    food = f"{slots['food']} " if "food" in slots else ""
    opening = rng.choice(openings).format(name=slots["name"], food=food, eat=slots["eatType"], location=location)

    facts = []
    if price := slots.get("priceRange"):
        facts.append(rng.choice(_AMOUNTS if "£" in price else _PRICES).format(price))
    if rating := slots.get("customer rating"):
        facts.append(rng.choice(_RATINGS).format(rating))
    if friendly := slots.get("familyFriendly"):
        facts.append(rng.choice(_FAMILY[friendly]))
    rng.shuffle(facts)
    subject = rng.choice(("It", "This place"))
    if len(facts) > 1 and rng.random() < 0.5:
        facts = [f"{', '.join(facts[:-1])} and {facts[-1]}"]
    return _with_articles(" ".join([opening, *(f"{subject} {fact}." for fact in facts)]))


# --- both --------------------------------------------------------------------------------------------------------


def _with_articles(sentence: str) -> str:
    """Replaces "a" with "an" before a vowel letter, which is right for all words above."""
    return re.sub(r"\ba (?=[aeiouAEIOU])", "an ", sentence)


def _check_split(split: str, known: dict[str, int]) -> None:
    if split not in known:
        raise DataError(f"the synthetic data have no split {split!r}; there are: {', '.join(known)}")
