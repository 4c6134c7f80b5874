# Everything below works on a bare machine with Python 3.11+: each target builds .venv first if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all lint format docs benchmark clean help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)  ## GROOD on handwritten digits: a table, a figure, a detector file
	$(BIN)/grood demo --output grood-demo

test: $(INSTALLED)  ## the tests that take seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m 'not slow'

test-all: $(INSTALLED)  ## the slow tests too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m slow

lint: $(INSTALLED)  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## format in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)  ## the site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo open site/index.html

benchmark: $(INSTALLED)  ## the speed of fit, score, gradients and import, as ratios
	$(BIN)/python benchmarks/core.py

clean:  ## remove what the targets above made
	rm -rf $(VENV) build dist site grood-demo .pytest_cache .mypy_cache .ruff_cache
