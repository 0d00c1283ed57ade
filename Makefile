# `make demo` and `make test` work from nothing: Python 3.11 or later with pip is all that a machine needs.
# Options for pip (another index, say) go into PIP_FLAGS.

PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_FLAGS)
SOURCES := pyproject.toml constraints.txt

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test lint format clean
.DEFAULT_GOAL := help

help: ## List the targets
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

demo: .venv/.demo ## Compress the packaged all-MiniLM-L6-v2 to 8 MB, offline
	$(BIN)/hpr compress --budget 8MB --output out/demo

test: lint ## Install and run every check
	$(BIN)/python -m pytest --numprocesses auto

lint: .venv/.dev ## Style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/.dev ## Mend what can be mended of style and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## Remove the environment, outputs and caches
	rm -rf .venv out build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	  f"Python 3.11 or later is needed, {sys.executable} is {sys.version.split()[0]}: make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv .venv

.venv/.demo: $(SOURCES) | $(BIN)/python
	$(INSTALL) --editable '.[demo]'
	@touch $@

.venv/.dev: $(SOURCES) | $(BIN)/python
	$(INSTALL) --editable '.[dev]'
	@touch .venv/.demo $@
