# Every target does its own set-up: a virtual environment in .venv, installed from constraints.txt.
# Where torch is installed already and should be kept (an NGC image), use PYTHON=python3 VENV_FLAGS=--system-site-packages.
PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
NAME ?= $(shell date +%Y%m%d-%H%M%S)
# More for the command: make train ARGS='train.steps=50 model=gpt_30m', make test ARGS=tests/unit/data
ARGS ?=
BIN := $(abspath $(VENV))/bin
# From any folder: make -f CHECKOUT/Makefile train. Runs and .venv are made where make was called. pip writes
# into the sources that it installs: of a checkout that cannot be written it gets a copy.
ROOT := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
SOURCE := $(if $(shell test -w $(ROOT) && echo yes),$(ROOT),$(abspath $(VENV))/source)
SOURCES := $(addprefix $(ROOT)/,fp4pretrain kernels configs launch pyproject.toml README.md LICENSE)
PIP := $(BIN)/python -m pip install -q -c $(ROOT)/constraints.txt
# Tests start up to four processes each; more threads would only get in each other's way.
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: train test test-gpu chaos sanitize check docs bench clean

train: $(VENV)/.installed ## FP8 then NVFP4 on this machine, and the gap between them
	$(BIN)/fp4pretrain train precision=nvfp4 baseline=fp8 name=$(NAME) $(ARGS)

test: $(VENV)/.installed-dev ## the whole CPU suite
	cd $(ROOT) && $(THREADS) $(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

test-gpu: $(VENV)/.installed-dev ## kernels, layers and NCCL layouts, on this machine's GPUs
	$(BIN)/python -m pytest tests/gpu

chaos: $(VENV)/.installed-dev ## 30 random kills of four ranks, lost nodes, layouts of eight, every recipe, 400 fuzzed runs (1 to 2 hours)
	$(THREADS) $(BIN)/python -m pytest tests/dist -m long -rP

sanitize: $(VENV)/.installed-dev ## compute-sanitizer over the kernels' GPU tests (minutes)
	compute-sanitizer --error-exitcode 1 --target-processes all \
		$(BIN)/python -m pytest tests/gpu/test_kernels_cuda.py

check: docs ## style, types, import directions, shell scripts, the site, the pins of constraints.txt
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck launch/* scripts/*.sh .ci/run
	$(BIN)/python scripts/resolve_constraints.py

# Not with --quiet: it hides warnings from the strict mode that should count them.
docs: $(VENV)/.installed-dev ## the site, into build/site: open build/site/index.html
	cd $(ROOT) && NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build -d $(abspath build/site)

bench: $(VENV)/.installed ## kernels and linears beside BF16 and a device copy
	$(BIN)/fp4pretrain bench kernels
	$(BIN)/fp4pretrain bench linear

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)

$(VENV)/.installed: $(ROOT)/pyproject.toml $(ROOT)/constraints.txt | $(VENV)/bin/python
	test $(SOURCE) = $(ROOT) || { mkdir -p $(SOURCE) && cp -R $(SOURCES) $(SOURCE) && chmod -R u+w $(SOURCE); }
	$(PIP) -e $(SOURCE)
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '$(SOURCE)[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
