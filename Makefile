# make serve   creates .venv, installs, serves the shipped models; HOST and PORT choose the address
# make test    creates .venv, installs, runs the tests
# make check   lint, format and types

HOST ?= 127.0.0.1
PORT ?= 8000
PYTHON ?= python3
BIN = .venv/bin

.PHONY: serve test check clean

serve: .venv/installed
	@exec $(BIN)/python -m app --host $(HOST) --port $(PORT)

test: .venv/installed-dev
	$(BIN)/python -m pytest

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv; PyTorch is large, this takes a few minutes"
	@$(BIN)/pip install --quiet --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	@$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info
