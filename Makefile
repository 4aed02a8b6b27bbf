# From a bare clone to the result: `make test`, `make bench`, `make lint`. Each sets up .venv and builds what changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEPS := $(VENV)/.installed
BENCH_JSON := bench/results/benchmark.json
NATIVE := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh csrc/*/*.h bench/*.cpp)

.DEFAULT_GOAL := help
.PHONY: help install test bench lint format clean

help:
	@echo 'make install  virtual environment in $(VENV), pinned dependencies, native build'
	@echo 'make test     the test suite'
	@echo 'make bench    the benchmarks and their report, under bench/results/'
	@echo 'make lint     ruff, mypy, clang-format'
	@echo 'make format   rewrites the sources as make lint wants them'
	@echo 'make clean    removes everything that make made'

# PyTorch goes first: the extension is built against the one that is installed. nflows goes without its dependencies:
# it asks for TensorBoard, which it never imports.
$(DEPS): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt torch setuptools cmake ninja
	DGM_NO_NATIVE=1 $(BIN)/pip install -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/pip install -c constraints.txt --no-build-isolation --no-deps nflows
	touch $@

# Always runs: ninja knows which native sources changed, and takes a second when none did.
install: $(DEPS)
	$(BIN)/python setup.py -q build_ext --inplace

test: install
	$(BIN)/python -m pytest tests

bench: install
	mkdir -p $(dir $(BENCH_JSON))
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json=$(BENCH_JSON); status=$$?; \
	  $(BIN)/python -m bench.report $(BENCH_JSON) && exit $$status

lint: $(DEPS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)

format: $(DEPS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	rm -f dgm_kernels/_C.*.so dgm_kernels/_build_info.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
