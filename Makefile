# make demo | test | test-slow | fuzz | check-cuda | versions | gpu-day | bench | bench-report | gpu-report | lint | format
#    | clean | distclean
# Only python3, make and g++ are assumed: each command makes .venv, installs the pinned tools of requirements-dev.txt and
# requirements-peers.txt, and builds the extension when that has not been done yet or when C++ or setup files have changed.

PYTHON ?= python3
GPU_PYTHON ?= python3
BIN := .venv/bin
CPP := $(shell find csrc benchmarks tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
# The fused kernel is the point of these commands: without a compiler they stop and say so instead of going on slowly.
LOMIX_FAST_BUILD ?= cpu
export LOMIX_FAST_BUILD

.PHONY: demo test test-slow fuzz check-cuda versions gpu-day bench bench-report gpu-report lint format clean distclean

demo: .venv/package
	$(BIN)/python -m lomix_fast demo

# Minutes. A file stays with one process: it may make something once for all of its tests.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile
test: .venv/package
	$(PYTEST) -m "not slow" $(ARGS)

# All the others: mostly GPU kernels that a CPU interprets or executes under sanitizers, then whole programs.
test-slow: .venv/package
	$(PYTEST) -m slow $(ARGS)

# Criteria and inputs drawn at random, others each time: ARGS="--examples 2000 --seed 1".
fuzz: .venv/package
	$(BIN)/python tests/fuzz.py $(ARGS)

# Builds everything for a CUDA torch in an environment of its own, .venv-cuda, and tries what runs there; no GPU needed.
check-cuda:
	$(PYTHON) tests/check_cuda.py

# What a GPU day needs, with the versions of the machine it is prepared for, in .venv-versions; no GPU needed.
versions:
	$(PYTHON) tests/check_versions.py

# Everything that only a GPU can tell, in eight minutes (docs/gpu.md), with a Python that has a CUDA build of torch. It installs
# nothing and needs no network; ARGS=--rehearse tries all of it on a CPU, in .venv.
ifeq ($(findstring --rehearse,$(ARGS)),)
gpu-day:
	$(GPU_PYTHON) -m benchmarks.gpu_day $(ARGS)
else
gpu-day: .venv/package
	$(BIN)/python -m benchmarks.gpu_day $(ARGS)
endif

bench: .venv/package
	$(BIN)/python -m benchmarks $(ARGS)

bench-report: .venv/package
	$(BIN)/python -m benchmarks.report $(ARGS)

# Compiles the Triton kernels for GPUs that need not be here; the interpreter cannot.
gpu-report: .venv/package
	TRITON_INTERPRET=0 $(BIN)/python -m benchmarks.gpu $(ARGS)

lint: .venv/package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy lomix_fast
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	LOMIX_FAST_WERROR=1 $(BIN)/python build_cpp.py

format: .venv/requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# Stamp files: .venv/requirements says that the tools are installed, .venv/package that the package is.
# --no-deps: of these projects only the loss modules are imported, and their other dependencies are hundreds of MB.
.venv/requirements: requirements-dev.txt requirements-peers.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-peers.txt
	@touch $@

# csrc is listed with its directories, whose time changes when a file is added or removed.
.venv/package: .venv/requirements pyproject.toml setup.py $(wildcard build_*.py) $(shell find csrc)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@$(BIN)/python -c "import lomix_fast as f; print('lomix_fast', f.__version__, f.available_backends())"
	@touch $@

# Objects, wheels and caches; the next command builds anew. distclean takes the environments as well.
clean:
	rm -rf build dist runs lomix_fast.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f lomix_fast/_C*.so lomix_fast/_build_info.json .venv/package
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-cuda .venv-versions
