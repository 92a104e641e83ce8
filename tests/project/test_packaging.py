"""pyproject.toml, requirements.lock and the installed package agree."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections import defaultdict
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from lora_hf.core.errors import how_to_install
from tests.support.pages import PAGES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

REPO = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
NOT_LOCKED = {"trackio", "wandb"}  # trackers: forty packages more for whoever clones, and no test needs them
WANTED = [
    Requirement(line)
    for line in [*PROJECT["dependencies"], *(line for name in EXTRAS.keys() - NOT_LOCKED for line in EXTRAS[name])]
]
THIRD_PARTY = [requirement for requirement in WANTED if requirement.name != PROJECT["name"]]
LOCK_LINES = [
    line for line in (REPO / "requirements.lock").read_text(encoding="utf-8").splitlines() if not line.startswith("#")
]


def locked() -> dict[str, list[Requirement]]:
    """The pins of each package: one, or one per range of Python versions."""
    pins: dict[str, list[Requirement]] = defaultdict(list)
    for line in LOCK_LINES:
        requirement = Requirement(line)
        pins[canonicalize_name(requirement.name)].append(requirement)
    return pins


def test_each_requirement_has_one_lower_bound_and_the_lock_satisfies_it() -> None:
    locks = locked()
    for requirement in THIRD_PARTY:
        bounds = [each for each in requirement.specifier if each.operator == ">="]
        assert len(bounds) == 1, f"{requirement}: expected exactly one `>=`, with the oldest version that CI installs"
        pins = locks[canonicalize_name(requirement.name)]
        assert pins, f"{requirement.name} is not in requirements.lock: run `make lock`"
        for pin in pins:
            (version,) = (each.version for each in pin.specifier)
            assert requirement.specifier.contains(Version(version)), f"the lock's {pin} is outside {requirement}"


def test_each_line_of_the_lock_is_one_exact_public_version() -> None:
    wanted = re.compile(r"[a-z0-9][a-z0-9-]*==[0-9][0-9a-z.]*( ; .+)?")
    assert [line for line in LOCK_LINES if not wanted.fullmatch(line)] == [], "expected name==version, with no +tag"


def test_pages_install_existing_extras_with_the_command_of_the_messages() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert "lora-hf[" not in text, f"{page}: lora-hf is on no package index: expected errors.how_to_install"
        for extras in re.findall(r"\.\[([\w,]+)\]", text):
            assert how_to_install(*extras.split(",")) in text, page
            assert set(extras.split(",")) <= set(EXTRAS), page


def test_each_python_version_gets_at_most_one_version_of_a_package() -> None:
    for python in ("3.10", "3.11", "3.12", "3.13"):
        environment = {"python_version": python, "python_full_version": f"{python}.5", "sys_platform": "linux"}
        for name, pins in locked().items():
            matching = [str(pin) for pin in pins if pin.marker is None or pin.marker.evaluate(environment)]
            assert len(matching) <= 1, f"Python {python} would install {matching} of {name}"


def test_the_installed_version_is_the_project_version() -> None:
    assert importlib.metadata.version(PROJECT["name"]) == PROJECT["version"], "run `make setup`"


def test_the_console_script_exists() -> None:
    module, function = PROJECT["scripts"]["lora-hf"].split(":")
    source = (REPO / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8")
    assert re.search(rf"^def {function}\(", source, flags=re.MULTILINE)
