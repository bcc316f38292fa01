# make quickstart    set up .venv and run the main job (about five minutes after installation)
# make test          set up what is missing, then lint, types and all tests
# make lint          ruff and mypy only
# make clean         remove .venv, caches and build outputs (runs/ and models/ stay)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
ARGS ?=

.PHONY: help quickstart test lint clean

help:
	@sed -n 's/^# make/make/p' Makefile

quickstart: $(STAMP)
	$(BIN)/python -m pause_lightning fit --config quickstart $(ARGS)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

# The pinned numpy and pandas need Python 3.11 (on 3.10: install without the constraints).
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "$(PYTHON) is missing or older than 3.11: give another one, make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "$(PYTHON) cannot make virtual environments: install python3-venv, or give another PYTHON=..." >&2; exit 2; }
	@echo "setting up $(VENV) (first time: a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]" \
	  || { echo "installing into $(VENV) failed (see above); fix it and run make again" >&2; exit 2; }
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
