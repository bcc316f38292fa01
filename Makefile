# make quickstart    set up .venv and run the main job (about four minutes after installation)
# make test          set up what is missing, then lint, types and all tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
ARGS ?=

.PHONY: quickstart test lint clean help

help:
	@sed -n 's/^# make/make/p' Makefile

quickstart: $(STAMP)
	$(BIN)/python -m pause_lightning fit --config quickstart $(ARGS)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (the first time takes a few minutes)"
	@$(PYTHON) -m venv $(VENV) || { echo "cannot make a virtual environment: install python3-venv, or give PYTHON=<a Python >= 3.10>"; exit 2; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,smollm2]"
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
