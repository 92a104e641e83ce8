"""What holds for any shape, rank, slice and precision of a projection, and for any text as a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from lora_hf.core.config.loader import load_config
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError
from lora_hf.lora.kernels.fused import lora_linear
from lora_hf.lora.kernels.reference import add_lora
from tests.tolerances import FUSED_RTOL

# The same cases in every run and on every machine.
FIXED = settings(
    derandomize=True,
    deadline=None,
    max_examples=150,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def slices(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """The width of a projection, and 1 to 3 parts of it, in order and apart."""
    widths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    start, found = draw(st.integers(0, 2)), []
    for width in widths:
        found.append((start, start + width))
        start += width + draw(st.integers(0, 2))
    return max(found[-1][1], start), found


@FIXED
@given(
    parts=slices(),
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    features=st.integers(1, 9),
    r=st.integers(1, 6),
    scaling=st.floats(-4, 4, allow_nan=False),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_the_fused_projection_is_its_definition(
    parts: tuple[int, list[tuple[int, int]]],
    shape: list[int],
    features: int,
    r: int,
    scaling: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    out, places = parts
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(kind)

    master = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias, upstream = draw(out, features), draw(out), draw(*shape, out)
    given_inputs = (
        draw(*shape, features),
        draw(r * len(places), features, kind=master),
        draw(sum(stop - start for start, stop in places), r, kind=master),
    )

    def results(fused: bool) -> list[torch.Tensor]:
        x, a, b = (tensor.clone().requires_grad_() for tensor in given_inputs)
        if fused:
            y = lora_linear(x, weight, bias, a, b, scaling, places)
        else:
            y = add_lora(linear(x, weight, bias), x, a, b, scaling, places)
        y.backward(upstream)
        return [y.detach(), *(tensor.grad for tensor in (x, a, b))]  # type: ignore[list-item]

    for ours, defined in zip(results(True), results(False), strict=True):
        assert ours.dtype == defined.dtype
        largest = defined.abs().max().item() if defined.numel() else 0.0
        assert torch.allclose(ours, defined, rtol=0, atol=FUSED_RTOL[dtype] * max(1.0, largest))


SECTIONS = RunConfig().to_dict()
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.dates()
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PLAIN, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def recipes(draw: st.DrawFn) -> Any:
    """A mapping of mostly known sections and keys to anything at all."""
    found: dict[Any, Any] = {}
    for section in draw(st.lists(st.sampled_from(sorted(SECTIONS)), max_size=3, unique=True)):
        keys = draw(st.lists(st.sampled_from(sorted(SECTIONS[section])) | st.text(max_size=5), max_size=3, unique=True))
        found[section] = {key: draw(VALUES) for key in keys} if draw(st.booleans()) else draw(VALUES)
    return found


def config_or_mistake(text: str, folder: Path) -> RunConfig | None:
    """Raises whatever is not a ConfigError."""
    place = folder / "recipe.yaml"
    place.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        config = load_config(place)
    except ConfigError:
        return None
    assert RunConfig.from_dict(config.to_dict()) == config
    assert RunConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    return config


@FIXED
@given(text=st.text(max_size=60) | st.text("{}[]:-&*!?|>\"'% \n#a1,~.@`", max_size=40))
def test_any_text_is_a_config_or_a_mistake(text: str, tmp_path: Path) -> None:
    config_or_mistake(text, tmp_path)


@FIXED
@given(recipe=recipes() | VALUES)
def test_anything_under_the_known_keys_is_a_config_or_a_mistake(recipe: Any, tmp_path: Path) -> None:
    config_or_mistake(yaml.safe_dump(recipe, allow_unicode=True), tmp_path)


def test_such_a_recipe_can_be_a_config(tmp_path: Path) -> None:
    config = config_or_mistake("train: {lr: 5e-4}\nlora: {r: 4, targets: [q]}", tmp_path)
    assert config is not None
    assert config.train.lr == 5e-4
