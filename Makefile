# Everything runs in .venv, which the first target creates; `make PYTHON=python3.12 demo` picks another interpreter.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test style quality bench clean

help:
	@echo "make install   set up .venv with hf_he and everything it needs"
	@echo "make demo      encrypt real review sentences, classify them on ciphertexts, decrypt (ARGS='--backend simulator --seed 1')"
	@echo "make test      the whole test suite"
	@echo "make bench     install the peer libraries into .bench and compare the engine with them (about 40 minutes)"
	@echo "make style     format and fix;   make quality   check only"

$(STAMP): pyproject.toml requirements/constraints.txt
	@test -n "$(PYTHON)" || { echo "hf_he needs Python 3.11 or newer: install it, or run make PYTHON=/path/to/python"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint requirements/constraints.txt --editable '.[dev]'
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	@$(BIN)/hf-he demo $(ARGS)

test: $(STAMP)
	@OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 $(ARGS)

style: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP)
	@recipes/benchmarks/setup_peers.sh .bench
	@$(BIN)/hf-he bench report --peers .bench $(ARGS)

clean:
	rm -rf $(VENV) out .pytest_cache .ruff_cache
