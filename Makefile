# Everything that a fresh clone needs: `make demo` and `make test` set up their own virtual environment in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN_NAME ?= demo

.DEFAULT_GOAL := help
.PHONY: help setup demo test other-sums matrix lint format types bench gpu gpu-dry-run sanitize compile-gates clean

help:
	@echo "make demo      set up, make the sample set, train a small model, evaluate it, draw a picture (minutes on a CPU)"
	@echo "make test      set up, check formats and types, run all tests"
	@echo "make matrix    run the tests in fresh environments with the oldest and the newest versions (TESTS=... for some)"
	@echo "make bench     set up, run the benchmarks and their guards"
	@echo "make gpu       on a machine with a GPU, without network: build, CUDA tests, benchmarks, results (10 minutes)"
	@echo "make gpu-dry-run  rehearse that on the CPU"
	@echo "make sanitize  run the kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make compile-gates  compile every Triton kernel for sm_80, sm_90 and sm_100 (no GPU needed); registers, spills, memory"
	@echo "make format    format Python and C++"
	@echo "make clean     remove build products (keeps .venv, data/ and runs/)"

# The stamp is renewed when the sources of the extension or the pinned versions change.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
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
	$(MAKE) --no-print-directory other-sums

# Once more with numpy's matrix products of another machine, which add in another order: error budgets must not depend on
# that. Triton's interpreter multiplies with numpy, nothing else here does: so only what it runs (a minute of one core).
other-sums: setup
	OPENBLAS_CORETYPE=Haswell OPENBLAS_L2_SIZE=512 $(BIN)/python -m pytest -q -k "interpreter and not opcheck and not compiles" \
		tests/ops/test_cross_modal_attention.py tests/ops/test_cross_modal_attention_triton.py \
		tests/ops/test_linear_cross_entropy.py tests/ops/test_linear_cross_entropy_triton.py

# make matrix TESTS="tests/ops -x"
matrix: setup
	$(BIN)/python -m tests.matrix --python $(PYTHON) $(TESTS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

types: setup
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m pytest benchmarks/

# With the system's Python: a machine with a GPU has torch, triton, pybind11 and ninja, and perhaps no network.
gpu:
	$(PYTHON) -m benchmarks.gpu

gpu-dry-run: setup
	$(BIN)/python -m benchmarks.gpu --dry-run

# The extension instrumented by AddressSanitizer and UndefinedBehaviorSanitizer, in a copy beside the normal one.
SANITIZED := build/sanitized
sanitize: setup
	M4KERNELS_SANITIZE=address,undefined M4KERNELS_CUDA=0 $(BIN)/python setup.py --quiet build \
		--build-lib $(SANITIZED) --build-temp build/sanitized-temp
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH=$(SANITIZED) \
		$(BIN)/pytest -p no:cacheprovider -o pythonpath=$(SANITIZED) -o timeout=1800 tests/ops -k "not compile and not opcheck and not report and not aot"

compile-gates: setup
	env -u TRITON_INTERPRET $(BIN)/python -m m4kernels.aot

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(BIN)/clang-format -i

clean:
	rm -rf build dist *.egg-info m4kernels/_C*.so .pytest_cache .mypy_cache .ruff_cache
	rm -f $(VENV)/.installed
