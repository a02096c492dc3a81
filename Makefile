# Two commands need nothing beforehand but Python, pip and a C++ compiler: `make bench`, `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The real names, where they lie beside the checkout; else a download, else the sample.
ifneq ($(wildcard ../shared/data/names),)
export NAMERNN_FAST_DATA ?= $(abspath ../shared/data/names)
endif

SOURCES := $(wildcard csrc/*.h csrc/*.cpp) setup.py pyproject.toml

.PHONY: setup test test-all bench bench-peers roofline check format clean

setup: $(VENV)/installed

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "setuptools>=77" "torch>=2.10"
	touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[bench,check,test]"
	touch $@

test: setup
	$(BIN)/python -m pytest

test-all: setup
	$(BIN)/python -m pytest -m ""

bench: setup
	$(BIN)/python benchmarks/run.py

# What docs/performance.md shows, measured anew; others are raced where pip can install them.
bench-peers: setup
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[bench-peers]"
	$(BIN)/python -m benchmarks.peers --write
	$(BIN)/python -m benchmarks.peers --write --threads 1
	$(BIN)/python -m benchmarks.peers --write --odd
	$(BIN)/python -m benchmarks.peers --write --odd --threads 1
	$(BIN)/python -m benchmarks.sixteen_bits --write
	$(BIN)/python -m benchmarks.layers --write

roofline: setup
	$(BIN)/python -m benchmarks.roofline --write
	$(BIN)/python -m benchmarks.threads --write

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i csrc/*.h csrc/*.cpp

clean:
	rm -rf $(VENV) build *.egg-info namernn_fast/*.so
