# `make demo` and `make test` need nothing but make, Python 3.11 and a C++ compiler: the first of them to run builds one
# environment in .venv for both, and later runs install nothing until pyproject.toml changes.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help demo test bench lint setup clean

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
OUT ?= build/demo
BIN := $(VENV)/bin

help:
	@cat <<'TEXT'
	make demo    compile a pruned network and write a report to $(OUT)
	make test    ruff, mypy and the test suite;  ARGS="-k masks" is passed on to pytest
	make lint    ruff and mypy only
	make bench   the README's benchmark, rows to build/bench.jsonl;  ARGS="--model vgg16 --batch 8" runs one case
	make clean   remove .venv and everything that was built
	Each sets up .venv on its first run (6 GB on disk). PYTHON=python3.12 and CXX=clang++ choose others.
	TEXT

# Its layers are so small that threads wait for each other thousands of times a second. OpenMP lets them spin, which keeps
# them from each other's cores as soon as anything else runs there: an epoch took two to three times as long.
demo: export OMP_WAIT_POLICY ?= passive
demo: setup
	@$(BIN)/fxsparse demo --out $(OUT) $(ARGS)

# Most of a test is capture and compilation in Python, so the cores go to workers, with one thread each.
# The graph caches are off because their keys do not cover fxsparse's own source; compiled C++ is kept, by content.
test: export OMP_NUM_THREADS = 1
test: export TORCHINDUCTOR_CACHE_DIR = $(CURDIR)/.cache/inductor
test: export FXSPARSE_CACHE_DIR = $(CURDIR)/.cache/fxsparse
test: export TORCHINDUCTOR_FX_GRAPH_CACHE = 0
test: export TORCHINDUCTOR_AUTOGRAD_CACHE = 0
test: lint
	@echo "== pytest"
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

bench: setup
	@mkdir -p build
	$(BIN)/python -m tools.bench $(or $(ARGS),--suite spine --out build/bench.jsonl)

lint: setup
	@echo "== ruff"
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	echo "== mypy"
	$(BIN)/mypy

setup:
	@complaints=0
	complain() { printf '%s: expected %s; got %s.\n  %s\n' "$$@" >&2; complaints=1; }
	# A lock, so that a second make waits for the first to finish installing.
	exec 9>.venv.lock
	if command -v flock >/dev/null && ! flock -n 9; then
	    echo "waiting for another make to finish installing into $(VENV)"
	    flock 9
	fi
	wanted="$(CURDIR) $$(cksum < pyproject.toml)"
	ready() { [ "$$(cat $(VENV)/.installed 2>/dev/null)" = "$$wanted" ] && $(BIN)/python -c '' 2>/dev/null; }
	python=$(PYTHON)
	if ready; then
	    python=$(BIN)/python
	elif ! version=$$($(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null); then
	    complain "PYTHON=$(PYTHON)" "a Python interpreter" "a command that does not run" \
	        "apt-get install python3 python3-venv python3-dev, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3"
	elif ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
	    complain "PYTHON=$(PYTHON)" "Python 3.11 or newer" "Python $$version" \
	        "Debian 12 has 3.11. To name another: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"
	elif ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then
	    complain "PYTHON=$(PYTHON)" "the standard modules venv and ensurepip" "Python $$version without them" \
	        "apt-get install python3-venv"
	fi
	command -v $(firstword $(CXX)) >/dev/null || complain \
	    "CXX=$(CXX)" "a C++ compiler, for Inductor and the sparse kernels" "no such command" \
	    "apt-get install g++, or name one: make $(MAKECMDGOALS) CXX=clang++"
	headers=$$($$python -c 'import sysconfig; print(sysconfig.get_path("include"))' 2>/dev/null || true)
	[ -z "$$headers" ] || [ -f "$$headers/Python.h" ] || complain \
	    "$$headers" "Python.h, which the code that Inductor compiles includes" "no such file" "apt-get install python3-dev"
	[ $$complaints = 0 ] || exit 1
	ready && exit 0
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	echo "installing into $(VENV) (PyTorch and its CUDA libraries: 3 GB to fetch, 6 GB on disk; two minutes on a fast line)"
	log=$(VENV)/install.log
	export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
	$(BIN)/python -m pip install --progress-bar off -e '.[dev]' 2>&1 | tee $$log | sed -un \
	    -e 's/^ *\(Downloading\|Using cached\) \([A-Za-z0-9_.]*\)-\([0-9][^-]*\)-.*(\([0-9.]* [MG]B\))$$/  \2 \3 (\4)/p' \
	    -e 's/^Installing collected packages:.*/  unpacking .../p' \
	    || { tail -n 20 $$log >&2; complain "pip install -e .[dev]" "success" "the error above" "Its whole output: $$log"; exit 1; }
	echo "$$wanted" > $(VENV)/.installed

clean:
	@rm -rf $(VENV) .venv.lock build dist .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache fxsparse.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
