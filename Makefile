# One verb a task. `make demo` on a fresh machine needs python3 (3.11 or later) and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
THREADS := OMP_NUM_THREADS=1
PYTEST := $(THREADS) $(BIN)/python -m pytest

.PHONY: demo test test-all lint format docs bench setup clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@echo "make demo      fit Old Faithful and wine, write pictures to demo-output/"
	@echo "make test      the fast tests, on two cores"
	@echo "make test-all  every test, the slow ones too"
	@echo "make lint      ruff and mypy"
	@echo "make docs      the manual, pages executed, warnings are errors"
	@echo "make bench     side-by-side measurements"
	@echo "PYTHON=...     which Python (3.11 or later) builds .venv"

# Torch goes in first and alone: it is the one download worth seeing, and pip then settles on it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "bayesgen needs Python 3.11 or later; say PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,lint,docs]'
	@touch $@

setup: $(STAMP)

demo: setup
	$(BIN)/bayesgen demo --out demo-output --force

test: setup
	$(PYTEST) -n 2

# The peer tests skip, saying so, unless `.venv/bin/pip install -c constraints.txt -e '.[peer]'` was run.
test-all: setup
	$(PYTEST) -n 2 -m "not gpu"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(THREADS) $(BIN)/sphinx-build -W --keep-going -j 2 -b html docs docs/_build/html

bench: setup
	for script in benchmarks/*.py; do $(BIN)/python "$$script" || exit 1; done

clean:
	rm -rf build dist docs/_build
