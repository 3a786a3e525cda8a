# `make demo` and `make test`: each makes .venv when it is not there, then does its job.

PYTHON ?= python3.11
BIN := .venv/bin
SHELL := /bin/bash

.PHONY: demo test lint clean

demo: .venv/installed
	$(BIN)/python train.py --config configs/synthetic.yaml

test: .venv/installed lint
	$(BIN)/python -m pytest -m alone
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not alone" -n auto --maxprocesses 8 --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache

# The stamp is made last, so that an install that was interrupted is done again.
.venv/installed: requirements.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@
