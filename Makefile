# Everything that a fresh clone needs: `make demo` and `make test` set up their own virtual environment in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN_NAME ?= demo

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format types bench sanitize clean

help:
	@echo "make demo      set up, make the sample set, train a small model, evaluate it, draw a picture (minutes on a CPU)"
	@echo "make test      set up, check formats and types, run all tests"
	@echo "make bench     set up, run the benchmarks and their guards"
	@echo "make format    format Python and C++"
	@echo "make clean     remove build products (keeps .venv, data/ and runs/)"

# The stamp is renewed when the sources of the extension or the pinned versions change.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(VENV)/.installed

demo: setup
	$(BIN)/python -m m4.train --config M4-tiny.yaml run_name=$(RUN_NAME)
	$(BIN)/python -m m4.evaluate --run runs/$(RUN_NAME)
	$(BIN)/python -m m4.plots --run runs/$(RUN_NAME)
	$(BIN)/python -m m4.generate --run runs/$(RUN_NAME) --out runs/$(RUN_NAME)/prediction.png

test: setup lint types
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

types: setup
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m pytest benchmarks/

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(BIN)/clang-format -i

clean:
	rm -rf build dist *.egg-info m4kernels/_C*.so .pytest_cache .mypy_cache .ruff_cache
	rm -f $(VENV)/.installed
