# Everything runs in .venv, which the first target creates; `make PYTHON=python3.12 demo` picks another interpreter.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test install-fhelium test-fhelium style quality bench clean

# FHElium needs Python 3.12 with its headers and a C++ compiler. FHELIUM_BACKENDS=CPU+CUDA takes nvcc of torch's CUDA version from CUDA_HOME or else from
# wheels; CUDAARCHS=90, say, compiles for one architecture only; CMAKE_BUILD_PARALLEL_LEVEL=2 limits the compilers at a time.
PYTHON312 ?= $(shell for p in python3.12 $$HOME/.pyenv/versions/3.12*/bin/python; do $$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && echo $$p && break; done)
FHELIUM_VENV := .venv-fhelium
FHELIUM_BACKENDS ?= CPU
FHELIUM := fhelium-0.30.0
# 18 C++ files that each read all of torch's headers, at most 7 together: more have names in common.
FHELIUM_OPTIONS = -DFHELIUM_NATIVE_BACKENDS=$(FHELIUM_BACKENDS) -DCMAKE_UNITY_BUILD=ON -DCMAKE_UNITY_BUILD_BATCH_SIZE=7
FHELIUM_COMPILED := $(FHELIUM_VENV)/.compiled-$(FHELIUM_BACKENDS)
ifneq ($(findstring CUDA,$(FHELIUM_BACKENDS)),)
CUDA_WHEELS := $(CURDIR)/$(FHELIUM_VENV)/lib/python3.12/site-packages/nvidia/cu13
CUDA_HOME ?= $(CUDA_WHEELS)
export CUDA_HOME
endif

help:
	@echo "make install   set up .venv with hf_he and everything it needs"
	@echo "make demo      encrypt real review sentences, classify them on ciphertexts, decrypt (ARGS='--refresh client': quicker)"
	@echo "make test      the whole test suite"
	@echo "make install-fhelium   the FHElium backend in an environment of its own (6 GB with torch's CUDA libraries); FHELIUM_BACKENDS=CPU+CUDA for GPUs"
	@echo "make test-fhelium   the same, its contract suite and a small demo"
	@echo "make bench     install the peer libraries into .bench and compare the engine with them (20 to 35 minutes)"
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

$(FHELIUM_VENV)/.installed: pyproject.toml requirements/constraints.txt requirements/fhelium.txt requirements/fhelium-build.txt
	@test -n "$(PYTHON312)" || { echo "FHElium needs Python 3.12: install it, or run make PYTHON312=/path/to/python3.12 install-fhelium"; exit 1; }
	@$(PYTHON312) -m venv $(FHELIUM_VENV)
	@echo "Installing into $(FHELIUM_VENV) (a few minutes)"
	@$(FHELIUM_VENV)/bin/python -m pip install -qq --disable-pip-version-check --constraint requirements/constraints.txt --editable '.[all,test]'
	@$(FHELIUM_VENV)/bin/python -m pip install -qq --disable-pip-version-check -r requirements/fhelium.txt -r requirements/fhelium-build.txt
	@touch $@

$(FHELIUM_COMPILED): requirements/fhelium-build.txt requirements/fhelium-cuda.txt | $(FHELIUM_VENV)/.installed
ifdef CUDA_WHEELS
ifeq ($(CUDA_HOME),$(CUDA_WHEELS))
	@$(FHELIUM_VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps -r requirements/fhelium-cuda.txt
	@for file in $(CUDA_WHEELS)/lib/*.so.*; do ln -sf $$(basename $$file) $${file%%.so.*}.so; done; ln -sfn lib $(CUDA_WHEELS)/lib64
endif
endif
	@echo "Compiling FHElium for $(FHELIUM_BACKENDS): minutes; interrupted, the same command goes on"
	@rm -f $(FHELIUM_VENV)/.compiled-*
	@test -d $(FHELIUM_VENV)/$(FHELIUM) || { $(FHELIUM_VENV)/bin/python -m pip download -qq --disable-pip-version-check --no-deps --no-binary=fhelium \
		--no-build-isolation --dest $(FHELIUM_VENV) $(subst -,==,$(FHELIUM)) && tar -xzf $(FHELIUM_VENV)/$(FHELIUM).tar.gz -C $(FHELIUM_VENV); }
	@CMAKE_ARGS="$(FHELIUM_OPTIONS)" $(FHELIUM_VENV)/bin/python -m pip install -v --disable-pip-version-check \
		--force-reinstall --no-deps --no-build-isolation --config-settings=build.verbose=false $(FHELIUM_VENV)/$(FHELIUM)
	@touch $@

install-fhelium: $(FHELIUM_COMPILED)

test-fhelium: $(FHELIUM_COMPILED)
	@$(FHELIUM_VENV)/bin/python -m pytest -q tests/backends -k "fhelium or device" $(ARGS)
	@$(FHELIUM_VENV)/bin/hf-he demo --backend fhelium

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
	rm -rf $(VENV) $(FHELIUM_VENV) out .pytest_cache .ruff_cache
