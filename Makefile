# Two commands need nothing beforehand but Python, pip and a C++ compiler: `make bench`, `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The names data set beside the checkout, if there is one; else it is downloaded, else a sample.
ifneq ($(wildcard ../shared/data/names),)
export NAMERNN_FAST_DATA ?= $(abspath ../shared/data/names)
endif

comma := ,
NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp tests/native/*.cpp)
SOURCES := $(filter csrc/%,$(NATIVE)) setup.py pyproject.toml

.PHONY: setup test test-all fuzz sanitize sanitize-threads bench bench-peers bench-gpu gpu-model gpu-report \
	roofline check format clean

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

fuzz: setup
	$(BIN)/python -m pytest --hypothesis-profile=fuzz tests/kernel/test_fuzz.py

# Builds the package and the kernels by themselves for sanitizers, in build/NAME.
define build_sanitized
NAMERNN_FAST_SANITIZE=$(2) $(BIN)/python setup.py -q build --build-lib build/$(1)/lib --build-temp build/$(1)
$(CXX) -std=c++17 -O1 -g1 -fno-omit-frame-pointer -fsanitize=$(2) -fno-sanitize-recover=all -Icsrc \
	tests/native/kernels.cpp build/$(1)/libnamernn_fast_*.a -pthread -o build/$(1)/kernels
endef
# Libraries that Python must load first, because its own executable is not instrumented.
SANITIZERS = $(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))
SANITIZED = PYTHONPATH=build/address/lib ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(SANITIZERS)" \
	$(BIN)/python -m pytest -q -p no:cacheprovider -o pythonpath="build/address/lib ."

SANITIZED_TESTS = $(addprefix tests/kernel/,test_kernel.py test_rows.py test_fuzz.py)

# Sanitizers do not see masked instructions, so the tests run on the baseline as well.
sanitize: setup
	$(call build_sanitized,address,address$(comma)undefined)
	build/address/kernels
	$(SANITIZED) $(SANITIZED_TESTS)
	ATEN_CPU_CAPABILITY=default $(SANITIZED) $(SANITIZED_TESTS)

# torch's own threads are not instrumented, so this runs the kernels by themselves.
sanitize-threads: setup
	$(call build_sanitized,thread,thread)
	TSAN_OPTIONS=halt_on_error=1 build/thread/kernels

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

# With what the machine has: a GPU, torch, Triton and NumPy. DRY_RUN=1 needs no GPU and measures nothing.
bench-gpu:
	$(PYTHON) -m benchmarks.gpu $(if $(DRY_RUN),--dry-run)

# What the GPU kernels take of each architecture; no GPU is needed.
gpu-report: setup
	$(BIN)/python -m benchmarks.gpu_report

gpu-model: setup
	$(BIN)/python -m benchmarks.gpu_model --write

roofline: setup
	$(BIN)/python -m benchmarks.roofline --write
	$(BIN)/python -m benchmarks.threads --write

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/mypy
	$(BIN)/python .ci/structure.py

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(NATIVE)

clean:
	rm -rf $(VENV) build dist *.egg-info namernn_fast/*.so
