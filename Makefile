# make repro   set everything up and run the pipeline        make test   set everything up and run the tests
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install repro test lint

install: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python >= 3.11 is needed; say which: make PYTHON=python3.12"'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c requirements.lock -e '.[dev]'
	touch .venv/installed

repro: install
	dvc repro
	scaling4d table

test: install
	ruff check . && ruff format --check .
	python -m pytest

lint: install
	ruff check --fix . && ruff format .
