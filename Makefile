# Two commands matter: make demo and make test. Both set .venv up on first use and reuse it afterwards.
PYTHON ?= python3
# Extra words for pip, for instance another index that has torch without CUDA.
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := src tests recipes bench
DEMO_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test bare matrix check format clean

help: ## what can be made
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20

setup: $(READY) ## .venv with everything that the rest needs, made once

# The stamp is newer than what it was made from, or pip runs again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Tessella needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Say make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[train,data,serve,ui,multitask,test]'
	@touch $@

demo: $(READY) ## ask, teach, convert, compare, chat with both: the whole story on this machine's CPU
	$(BIN)/tessella demo $(DEMO_ARGS)

test: $(READY) ## every test that this machine can run
	$(BIN)/python -m pytest -n 2 -q

# An environment of its own, since what must be missing there is needed elsewhere.
bare: pyproject.toml constraints.txt ## the tests that need neither transformers nor PEFT, in an environment without them
	test -x .matrix/bare/bin/python || $(PYTHON) -m venv .matrix/bare
	.matrix/bare/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[test]'
	.matrix/bare/bin/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("transformers") is not None)'
	.matrix/bare/bin/python -m pytest -n 2 -q

matrix: $(READY) ## our native export in several versions of transformers, each in an environment of its own
	PIP_ARGS="$(PIP_ARGS)" $(BIN)/python tests/matrix/run.py

check: $(READY) ## style, types, floors
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_floors.py

format: $(READY) ## put the style right
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean: ## take .venv and what the tools left away
	rm -rf $(VENV) .matrix .pytest_cache .mypy_cache .ruff_cache .hypothesis
