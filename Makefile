# Each target does its own set-up: an environment in .venv, torch, the build. A second run does only what changed.
#
#   make demo       train a small ResNet-18 twice, dense and sparse, and compare
#   make test       the C++ and the Python tests, but for those marked slow
#   make test-all   all of them
#   make lint       ruff, mypy, clang-format
#   make bench      time convolutions and training steps against dense PyTorch, and measure memory: some minutes
#   make bench-all  the same in full, for the results in bench/results: hours
#   make cpp-test   the C++ tests alone        make sanitize   those under ASan and UBSan
#   make format     let ruff and clang-format rewrite the sources
#   make cuda-check compile the CUDA kernels for sm_80 and sm_90 and look for spills; needs nvcc and no GPU
#   make gpu        on a machine with a GPU: build, CUDA tests, compute-sanitizer, benches; installs nothing
#   make clean      remove what was built      make distclean  the environment too
#
# Variables: PYTHON (3.11 or newer), VENV, TORCH (what pip installs as torch, unless PYTHON already has one that will do),
# CXX, MAX_JOBS, PYTEST_FLAGS, CMAKE_FLAGS.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTEST_FLAGS ?=
CMAKE_FLAGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
SOURCES := $(shell find csrc -type f)
CPP_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')
# make's own default is g++, and torch's c++.
COMPILER := $(if $(filter default,$(origin CXX)),c++,$(CXX))
TORCH_WILL_DO := import torch; assert tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 11)

.PHONY: help demo test test-all lint bench bench-all format cuda-check gpu cpp-test sanitize build system cmake clean distclean

help:
	@sed -n 's/^#  *\(make .*\)/  \1/p' $(firstword $(MAKEFILE_LIST))

demo: build
	$(BIN)/python -m swat_ext.demo

bench: build
	$(BIN)/python bench/layers.py
	$(BIN)/python bench/scaling.py --quick
	$(BIN)/python bench/train_step.py --quick
	$(BIN)/python bench/memory.py --quick

bench-all: build
	$(BIN)/python bench/layers.py --out bench/results/layers.json
	$(BIN)/python bench/layers.py --layers others --out bench/results/layers.json
	$(BIN)/python bench/scaling.py
	$(BIN)/python bench/train_step.py
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/allocator.py

# Side by side, one thread each. pytest fails where it finds no test, and so does ctest below.
PYTEST = $(BIN)/python -m pytest -n $$(nproc) --maxprocesses=8 --dist=worksteal

test: build $(VENV)/.stamp-dev cpp-test
	$(PYTEST) -m "not slow" $(PYTEST_FLAGS)

test-all: export HYPOTHESIS_PROFILE ?= ci
test-all: build $(VENV)/.stamp-dev cpp-test
	$(PYTEST) $(PYTEST_FLAGS)

lint: build $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy swat_ext
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

# --- CUDA ---

cuda-check: $(VENV)/.stamp-torch
	$(BIN)/python tools/cuda_check.py

# With the torch of PYTHON and what it has installed: the machines that GPUs are lent on may reach no package index.
gpu:
	PYTHON="$(PYTHON)" tools/gpu.sh

# --- The environment and the extension ---

build: $(VENV)/.stamp-build

# What pip cannot install.
system:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "PYTHON: expected Python 3.11 or newer, got '$(PYTHON)' ($$($(PYTHON) --version 2>&1))" >&2; exit 1; }
	@command -v $(firstword $(COMPILER)) >/dev/null || tools/system_package.sh g++ "a C++ compiler (g++ 12 or newer)"
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  tools/system_package.sh python3-dev "Python's headers"

# With the torch of PYTHON if it has one: a second one is a large download, and may not suit the machine.
$(VENV)/.stamp-torch: | system
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || tools/system_package.sh python3-venv "Python's venv module"
	site=; if $(PYTHON) -c "$(TORCH_WILL_DO)" 2>/dev/null; then site=--system-site-packages; fi; \
	  $(PYTHON) -m venv $$site $(VENV)
	$(BIN)/python -c "$(TORCH_WILL_DO)" 2>/dev/null || $(PIP) install $(TORCH)
	$(PIP) install "setuptools>=77.0.3" ninja
	touch $@

# Editable, so that Python's sources are used where they stand; this builds the extension too.
$(VENV)/.stamp-train: pyproject.toml setup.py $(VENV)/.stamp-torch
	$(PIP) install --no-build-isolation -e '.[train]'
	touch $@

$(VENV)/.stamp-build: $(VENV)/.stamp-train $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-train
	$(PIP) install --no-build-isolation -e '.[test,dev]'
	touch $@

# --- The kernels alone, with CMake ---

CMAKE_OPTIONS = -DCMAKE_CXX_COMPILER="$(firstword $(COMPILER))" -DPython3_EXECUTABLE="$$(command -v $(PYTHON))" $(CMAKE_FLAGS)

cmake: | system
	@command -v cmake >/dev/null || tools/system_package.sh cmake "CMake, which builds the C++ tests"
	@echo '#include <gtest/gtest.h>' | $(COMPILER) -x c++ -E - >/dev/null 2>&1 || \
	  tools/system_package.sh libgtest-dev "GoogleTest, for the C++ tests"

cpp-test: cmake
	cmake -S . -B build/cpp $(CMAKE_OPTIONS)
	cmake --build build/cpp -j $(or $(MAX_JOBS),$$(nproc))
	ctest --test-dir build/cpp --no-tests=error --output-on-failure

sanitize: cmake
	cmake -S . -B build/sanitize -DSWAT_SANITIZE=ON $(CMAKE_OPTIONS)
	cmake --build build/sanitize -j $(or $(MAX_JOBS),$$(nproc))
	ctest --test-dir build/sanitize --no-tests=error --output-on-failure

clean:
	rm -rf build dist *.egg-info swat_ext/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(VENV)/.stamp-build $(VENV)/.stamp-train $(VENV)/.stamp-dev

distclean: clean
	rm -rf $(VENV)
