"""Rules for the source code: what each file may import and do, and that the commands on the pages exist."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from lora_hf.core.config.loader import load_config
from lora_hf.experiments.sweep.space import read_sweep
from tests.support.pages import PAGES, blocks

REPO = Path(__file__).parents[2]
PACKAGE = REPO / "lora_hf"
LONGEST_FILE = 400

# A package imports only from itself and those before it. There are no import cycles.
PACKAGES = ("core", "lora", "data", "models", "adapters", "training", "inference", "experiments", "serving", "cli")


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_name(file: Path) -> str:
    """The module of a file, such as `lora_hf.data.tasks.glue`. An `__init__.py` is the module of its folder."""
    parts = list(file.relative_to(REPO).with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def package_of(module: str) -> str:
    return module.split(".")[1]


MODULES = {module_name(file): file for file in source_files()}
TREES = {module: ast.parse(file.read_text(encoding="utf-8")) for module, file in MODULES.items()}


def imports_of(module: str) -> Iterator[tuple[str, int]]:
    """Every module of the package that `module` imports, also inside functions, with the line."""
    is_folder = MODULES[module].name == "__init__.py"
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "lora_hf":
                    yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parts = module.split(".")
                base = parts[: len(parts) - node.level + is_folder]
                origin = ".".join([*base, origin] if origin else base)
            if origin.split(".")[0] == "lora_hf":
                for alias in node.names:
                    inner = f"{origin}.{alias.name}"
                    yield inner if inner in MODULES else origin, node.lineno


def calls_of(module: str) -> Iterator[tuple[str, int]]:
    """The dotted name of every call in `module`, with the line."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno


def test_the_package_contains_its_packages_and_nothing_else() -> None:
    found = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert found == {*PACKAGES, "__init__.py", "py.typed"}


def test_a_package_imports_only_from_those_before_it() -> None:
    imports = [(module, imported, line) for module in MODULES for imported, line in imports_of(module)]
    inside = [each for each in imports if each[0] != "lora_hf"]
    public = [f"{module}:{line}" for module, imported, line in inside if imported == "lora_hf"]
    assert not public, "these import the public names: import the file that defines them"
    later = [
        f"{module}:{line} imports {imported}"
        for module, imported, line in inside
        if PACKAGES.index(package_of(imported)) > PACKAGES.index(package_of(module))
    ]
    assert not later, "a package imports only from those before it: pass the value as an argument, or move the code"


def test_no_import_cycles() -> None:
    graph = {module: {imported for imported, _ in imports_of(module)} - {module} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


def test_every_imported_module_exists() -> None:
    missing = [
        f"{module}:{line} {name}" for module in MODULES for name, line in imports_of(module) if name not in MODULES
    ]
    assert not missing


def test_only_the_command_line_prints() -> None:
    library = [module for module in MODULES if module.split(".")[1:2] != ["cli"]]
    prints = [f"{module}:{line}" for module in library for call, line in calls_of(module) if call == "print"]
    assert not prints, "log it, or return it to cli/"


def test_nothing_is_pickled() -> None:
    reads_pickles = {"lora_hf.adapters.convert.checkpoint"}  # the next test checks it
    found = [each for module in MODULES.keys() - reads_pickles for each in uses_of_pickle(module)]
    assert not found, "use safetensors or json"


def uses_of_pickle(module: str) -> list[str]:
    """Imports of pickling packages, and torch's own pickling."""
    uses = [f"{module}:{line} {call}" for call, line in calls_of(module) if call in ("torch.load", "torch.save")]
    pickling = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found = {alias.name.split(".")[0] for alias in node.names} & pickling
        elif isinstance(node, ast.ImportFrom):
            found = {(node.module or "").split(".")[0]} & pickling
            if [alias.name for alias in node.names] == ["UnpicklingError"]:
                continue  # torch raises it for pickles of anything but tensors
            if node.module == "torch":
                found |= {alias.name for alias in node.names} & {"load", "save"}
        else:
            continue
        uses += [f"{module}:{node.lineno} {name}" for name in sorted(found)]
    return uses


def test_the_one_module_that_reads_pickles_reads_only_tensors() -> None:
    tree = TREES["lora_hf.adapters.convert.checkpoint"]
    loads = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"]
    assert loads
    assert all("weights_only=True" in map(ast.unparse, node.keywords) for node in loads)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "pickle"]
    assert [alias.name for node in imports for alias in node.names] == ["UnpicklingError"]
    assert "pickle" not in {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }


def test_no_input_is_executed() -> None:
    """Neither as Python, YAML tags or shell commands, nor as the code of a model."""
    running = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.full_load", "yaml.unsafe_load"}
    found = [f"{module}:{line} {call}" for module in MODULES for call, line in calls_of(module) if call in running]
    for module, tree in TREES.items():
        keywords = [node for node in ast.walk(tree) if isinstance(node, ast.keyword)]
        running_keywords = [node for node in keywords if node.arg in ("shell", "trust_remote_code")]
        found += [f"{module}:{n.lineno} {n.arg}" for n in running_keywords if ast.unparse(n.value) != "False"]
    assert not found


def test_files_stay_short() -> None:
    lengths = {module: len(file.read_text(encoding="utf-8").splitlines()) for module, file in MODULES.items()}
    assert {module: lines for module, lines in lengths.items() if lines > LONGEST_FILE} == {}, "split them"


def test_no_file_has_a_generic_name() -> None:
    generic = [
        str(file.relative_to(REPO)) for file in source_files() if file.stem in ("utils", "helpers", "common", "misc")
    ]
    assert not generic, "name a file after what it does"


@pytest.mark.parametrize(
    "module",
    [
        "lora_hf",
        "lora_hf.adapters.resolve",
        "lora_hf.core.config.loader",
        "lora_hf.core.hub_access",
        "lora_hf.core.records",
        "lora_hf.cli.main",
    ],
)
def test_import_is_light(module: str) -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'evaluate', 'accelerate', 'matplotlib', 'sklearn', 'scipy'}"
    code = f"import sys, {module}; sys.exit(', '.join(sorted({heavy} & set(sys.modules))) or 0)"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"import {module} also imports {result.stderr.strip()}: import it inside a function"


def commands_of(page: Path) -> list[list[str]]:
    """The words of every command in the bash blocks of a page, also of blocks that are not run."""
    texts = (block.text for block in blocks(page) if block.language == "bash")
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_the_commands_of_the_pages_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (REPO / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for page, words in [(each, words) for each in PAGES for words in commands_of(each)]:
        command = f"{page.name}: {' '.join(words)}"
        if words[0] == "make" and len(words) > 1:
            assert words[1] in targets, f"{command}: the Makefile has {targets}"
        for word in words:
            if word.startswith("scripts/"):
                assert (REPO / word).is_file(), f"{command}: there is no {word}"
        if "--config" in words:
            rest = words[words.index("--config") + 1 :]
            if f'Path("{rest[0]}").write_text(' in page.read_text(encoding="utf-8"):
                continue  # a block of the page has created it
            read = read_sweep if "scripts/sweep.py" in words else load_config
            read(rest[0], [word for word in rest[1:] if re.match(r"[a-z_]+\.[a-z_.]+=", word)])


def test_the_readme_shows_the_first_commands() -> None:
    commands = commands_of(REPO / "README.md")
    assert ["make", "demo"] in commands
    assert ["make", "test"] in commands


def tracked_files() -> list[Path]:
    """Files that are tracked by git, or new and not ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip("not a git checkout")
    return [file for name in result.stdout.split("\0") if name and (file := REPO / name).is_file()]


def test_no_file_contains_an_absolute_path_of_a_machine() -> None:
    roots = ["home", "root", "work", "Users", "tmp"]
    path = re.compile(rf"(?<![\w.~-])/(?:{'|'.join(roots)})/")
    found = []
    for file in tracked_files():
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # weights and images
        in_tests = file.is_relative_to(REPO / "tests")
        for number, line in enumerate(lines, start=1):
            if any(not (in_tests and hit.group() == "/tmp/") for hit in path.finditer(line)):
                found.append(f"{file.relative_to(REPO)}:{number}: {line.strip()[:100]}")
    assert not found
