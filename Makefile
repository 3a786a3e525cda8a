# `make demo` and `make test` create .venv if it is missing, then do their job.

PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SHELL := /bin/bash

.PHONY: demo test lint clean

# A second `make demo` resumes an interrupted one, and otherwise prints its table again.
demo: .venv/installed
	if test -d runs/demo; then $(BIN)/python train.py --resume runs/demo; \
	else $(BIN)/python train.py --config configs/synthetic.yaml --run runs/demo; fi

test: lint
	$(BIN)/python -m pytest -m alone
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not alone" -n auto --maxprocesses 8 --dist worksteal

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache

# The stamps are made last, so that an interrupted installation is repeated.
.venv/installed: requirements.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@
