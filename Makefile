# One virtual environment for everything; every target sets it up first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full test-slurm check bench test-gpu clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "soratrain needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: .venv/ready ## make .venv and install everything, pinned

demo: .venv/ready ## the whole chain on the embedded world, to an MP4 and a contact sheet
	$(BIN)/python -m soratrain.demo

test: .venv/ready ## the fast suite
	$(BIN)/python -m pytest -m "not full and not gpu"

test-full: .venv/ready ## the slower tests: many processes, kills, real clips, the README's commands
	$(BIN)/python -m pytest -m "full and not gpu"

test-slurm: .venv/ready ## of these, what starts a real SLURM of two nodes here (root, slurm-wlm and munge)
	$(BIN)/python -m pytest tests/slurm

check: .venv/ready ## linter, formatter, type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready ## the benchmarks, side by side with others; ONLY="plan balance" for some
	$(BIN)/python tests/bench/run.py $(ONLY)

test-gpu: .venv/ready ## the tests that need CUDA
	$(BIN)/python -m pytest -m gpu

clean: ## remove what runs made: outputs/ and data/ (not .venv)
	rm -rf outputs data
