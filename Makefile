# make setup   a virtual environment with everything (first run: a few minutes, most of it torch)
# make demo    end-to-end demo: FSDP2 ranks push through weightsyncd into three engines
# make bench   benchmarks of this machine; make bench-pure  planning, codec, session beside their baseline
# make test    CPU tests but those with real engines;  make test-engines  those;  make style types  style and types
# make test-all  those and the slow ones: more cells of the fault matrices, sizes, numbers of ranks, and random seeds
# make docs    the docs as a site
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# One torch version for all of us. On Linux the wheel of PyPI is the CUDA build, on machines without a GPU, too; PyTorch's
# own index has the smaller CPU build: make setup PIP_ARGS="--index-url https://download.pytorch.org/whl/cpu"
# PIP_ARGS are for torch alone: that index has nothing else of ours.
TORCH ?= torch==2.13.0
PIP_ARGS ?=

.PHONY: setup demo test test-all style types engines test-engines test-engines-all engines-older test-gpu bench bench-pure docs clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,6s/^# //p' Makefile

$(BIN)/.set-up: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev,bench]"
	@touch $@

setup: $(BIN)/.set-up

demo: setup
	$(BIN)/weightsync demo

# a file whole to one process: its engines are started once. Fault tests by themselves: what they break is told by silences,
# and beside others that compute they meet too many; two of them, which wait most of their time, do not disturb each other
test: setup
	$(BIN)/python -m pytest -m "not gpu and not engines and not slow" -n 2 --dist loadfile --ignore tests/faults
	$(BIN)/python -m pytest -m "not slow" tests/faults -n 2 --dist loadfile

test-all: setup
	$(BIN)/python -m pytest -m "not gpu and not engines" -n 2 --dist loadfile --ignore tests/faults --hypothesis-profile=weightsync-random
	$(BIN)/python -m pytest tests/faults -n 2 --dist loadfile

style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

engines:
	PYTHON=$(PYTHON) bash engines/setup.sh

test-engines: setup engines
	$(BIN)/python -m pytest -m "engines and not engines_slow" tests/engines tests/e2e

test-engines-all: setup engines
	$(BIN)/python -m pytest -m engines tests/engines tests/e2e

# one older version of each: WEIGHTSYNC_ENGINES=.engines/older .venv/bin/python -m pytest -m engines tests/engines tests/e2e
engines-older:
	PYTHON=$(PYTHON) bash engines/setup.sh .engines/older engines/pins/older

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

bench: setup
	$(BIN)/python -m bench all --json-dir bench/results

# what is pure, beside the baseline; BASELINE=1 makes this run the baseline
bench-pure: setup
	@mkdir -p bench/results
	$(BIN)/python -m pytest bench/pure --benchmark-enable --benchmark-columns=min,median,max,rounds -p no:cacheprovider \
		--benchmark-json=$(if $(BASELINE),docs/benchmarks/cpu/pure.json,bench/results/pure.json)
	$(if $(BASELINE),,$(BIN)/python -m bench compare bench/results/pure.json)

$(BIN)/.docs-set-up: $(BIN)/.set-up
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	@touch $@

# the diagram of docs/session.md from the code, and the site into site/
docs: $(BIN)/.docs-set-up
	$(BIN)/python docs/make_state_diagram.py
	$(BIN)/python -m bench table
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
