# Every target that needs it sets up .venv by itself, from requirements.lock, once. Another Python: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq
# What `make bench` measures; see python -m tools.benchmark --help.
BENCH ?= train

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full lint docs bench lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## .venv with everything pinned in requirements.lock

demo: $(READY) ## trains and queries a small classifier and a small text generator; no network needed
	@$(BIN)/python scripts/demo.py

test: $(READY) ## the fast tests: everything a change can break, in a few minutes
	@$(BIN)/python -m pytest -m "not full"

test-full: $(READY) ## the rest, which takes longer: recipes, kills, documentation pages, parity sweeps
	@$(BIN)/python -m pytest -m full

lint: $(READY) ## ruff and pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/basedpyright

docs: $(READY) ## the site, in site/, with no network; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(READY) ## measures; make bench BENCH="infer --json" passes arguments on
	@$(BIN)/python -m tools.benchmark $(BENCH)

# The pins already there stay; UPGRADE=--upgrade asks for the newest. torch pins its own CUDA packages exactly, so they
# are left out here: a torch built for the CPU would otherwise be given gigabytes it never opens.
lock: $(READY) ## renews requirements.lock after a change of pyproject.toml
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --extra dev --no-annotate --no-header $(UPGRADE) \
		--output-file requirements.lock pyproject.toml
	@{ echo "# Made by 'make lock' from pyproject.toml with the extra dev, Python 3.10 and newer. Install: pip install -r requirements.lock"; \
		grep -vE '^(nvidia-|cuda-|triton==)' requirements.lock; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock

clean: ## removes .venv and every cache; outputs/ stays
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './outputs/*' -prune -exec rm -rf {} +

$(READY): requirements.lock pyproject.toml
	@command -v $(PYTHON) > /dev/null || { echo "No $(PYTHON) here. Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "lora_hf needs Python 3.10 or newer, but $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12" >&2; exit 2; }
	@echo "Setting up $(VENV) (once, a few minutes)..." >&2
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --use-pep517 --requirement requirements.lock  # pip before 23.1 cannot build seqeval otherwise
	@$(PIP) install --no-deps --editable .
	@touch $@
