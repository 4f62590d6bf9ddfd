# Everything that a fresh clone needs: `make demo` and `make test` set up their own virtual environment in .venv.
PYTHON ?= python3
VENV ?= .venv
RUN_NAME ?=

# A word for the shell, whatever it holds.
quoted = '$(subst ','\'',$(1))'
# A variable as it was given: a $ in the environment's stays one. Set but empty counts as not set.
given = $(if $(filter environment,$(origin $(1))),$(value $(1)),$($(1)))
python := $(or $(strip $(call given,PYTHON)),python3)
venv := $(or $(call given,VENV),.venv)
# The run that `make demo` and `make learn` make in runs/.
demo learn: run_name = $(or $(call given,RUN_NAME),$@)
# $(PYTHON) is a program, or a command such as "arch -arm64 python3".
BASE_PYTHON := $(if $(shell command -v $(call quoted,$(python))),$(call quoted,$(python)),$(python))
# Tools run as modules of it: the scripts in bin/ do not start from folders with some names.
PY := $(call quoted,$(venv)/bin/python)
STAMP := $(call quoted,$(venv)/.installed)
CLANG_FORMAT := $(PY) -c 'from clang_format import clang_format; clang_format()'
CPP_FILES := git ls-files -z 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh'

.DEFAULT_GOAL := help
.PHONY: help setup demo learn test notebooks docs other-sums torture matrix lint format types bench gpu gpu-dry-run sanitize emulate compile-gates clean

help:
	@echo "make demo      set up, make the sample set, train a small model, evaluate it, draw a picture (minutes on a CPU)"
	@echo "make learn     the same with more videos and steps (about two hours on 2 CPU cores)"
	@echo "make test      set up, check formats and types, run all tests"
	@echo "make notebooks runs notebooks/ from top to bottom and keeps what they print and draw"
	@echo "make docs      the reference of all functions and classes, from their docstrings, in build/api"
	@echo "make matrix    run the tests in fresh environments with the oldest and the newest versions (TESTS=... for some)"
	@echo "make torture   kill -9 a small training run 50 times, saves included: it has to end with the same bits (minutes);"
	@echo "               RANKS=2: one of its two processes"
	@echo "make bench     set up, run the benchmarks and their guards"
	@echo "make gpu       on a machine with a GPU, without network: build, CUDA tests, benchmarks, results (10 minutes;"
	@echo "               OUT=FOLDER for all that it writes)"
	@echo "make gpu-dry-run  rehearse that on the CPU"
	@echo "make sanitize  run the kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make emulate   run the kernel tests with AVX-512 in software, for a processor without it (apt install libsimde-dev);"
	@echo "               make sanitize EMULATE=1: both"
	@echo "make compile-gates  compile every Triton kernel for sm_80, sm_90 and sm_100 (no GPU needed); registers, spills, memory"
	@echo "make format    format Python and C++"
	@echo "make clean     remove build products (keeps .venv, data/ and runs/)"

setup:
	@sh .ci/setup $(call quoted,$(venv)) $(BASE_PYTHON)

demo: config := M4-tiny.yaml
learn: config := M4-small.yaml
demo: evaluated :=
# Of 8,461, which take half an hour.
learn: evaluated := --max-samples 2000

demo learn: setup
	$(PY) -m m4.train --config $(config) $(call quoted,run_name=$(run_name))
	$(PY) -m m4.evaluate --run $(call quoted,runs/$(run_name)) $(evaluated)
	$(PY) -m m4.plots --run $(call quoted,runs/$(run_name))
	$(PY) -m m4.generate --run $(call quoted,runs/$(run_name)) --out $(call quoted,runs/$(run_name)/prediction.png)

# Most tests keep one core busy: groups that nothing disturbs, and that disturb nothing, run beside the others, about half
# of the time in all. Ctrl-C ends them, too, which a shell keeps from what it runs in the background.
BESIDE := tests/test_notebooks.py tests/test_documentation.py tests/test_gpu_session.py tests/test_gpu_stages.py \
	tests/test_gpu_benchmarks.py tests/test_gpu_results.py tests/test_pose_limits.py tests/test_guides.py tests/test_ablation.py \
	tests/evaluation tests/generation tests/ops
SLOWEST := --durations=30 --durations-min=4
# One thread a process: two processes keep two cores busy, and threads that wait for each other on busy cores take many
# times as long. Tests that are about threads ask for some. (MAKE_COMMAND: a line with MAKE would run under `make -n`.)
test: export OMP_NUM_THREADS ?= 1
test: setup lint types
	@mkdir -p build
	@echo "beside these tests: make other-sums, then $(BESIDE); what they say comes at the end"
	@trap 'trap - TERM; kill 0; exit 130' INT TERM; \
	{ $(MAKE_COMMAND) --no-print-directory other-sums && $(PY) -m pytest -q $(SLOWEST) $(BESIDE); } > build/beside.log 2>&1 & beside=$$!; \
	$(PY) -m pytest $(SLOWEST) $(addprefix --ignore=,$(BESIDE)); status=$$?; \
	wait $$beside || status=1; cat build/beside.log; exit $$status

# Once more with numpy's matrix products of another machine, which add in another order: error budgets must not depend on
# that. Triton's interpreter multiplies with numpy, nothing else here does: so only what it runs (a minute of one core).
other-sums: setup
	OPENBLAS_CORETYPE=Haswell OPENBLAS_L2_SIZE=512 $(PY) -m pytest -q -k "interpreter and not opcheck and not compiles" \
		tests/ops/test_cross_modal_attention.py tests/ops/test_cross_modal_attention_triton.py \
		tests/ops/test_linear_cross_entropy.py tests/ops/test_linear_cross_entropy_triton.py

# What the notebooks show is committed with them; look at it before.
notebooks: setup
	$(PY) -m tests.notebooks

# The pages of docs/ are read as they are; this is the reference. Of the ops their public functions.
docs: setup
	$(PY) -m pdoc --docformat google -o build/api m4kernels '!m4kernels.ops' '!m4kernels.aot' m4

# make torture KILLS=10 RANKS=2
torture: setup
	$(PY) -m tests.torture --kills $(or $(KILLS),50) --ranks $(or $(RANKS),1)

# make matrix TESTS="tests/ops -x"
matrix: setup
	$(PY) -m tests.matrix $(TESTS)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@$(CPP_FILES) | xargs -0 $(CLANG_FORMAT) --dry-run --Werror

types: setup
	$(PY) -m mypy

bench: setup
	$(PY) -m pytest benchmarks/

# With the system's Python: a machine with a GPU has torch, triton, pybind11 and ninja, and perhaps no network.
# OUT=FOLDER: where everything goes, instead of build/gpu or build/gpu-rehearsal.
gpu gpu-dry-run: out = $(if $(call given,OUT),--out $(call quoted,$(call given,OUT)))
gpu:
	$(BASE_PYTHON) -m benchmarks.gpu $(out)

gpu-dry-run: setup
	$(PY) -m benchmarks.gpu --dry-run $(out)

# The kernel tests with an extension built in another way, in a copy beside the normal one, which `python -m pytest` would
# import first. Triton's interpreter runs nothing of the extension and takes most of these tests' time.
built = M4KERNELS_CUDA=0 $(PY) setup.py --quiet build --build-lib $(1) --build-temp $(1)-temp
tested = PYTHONPATH=$(1) $(PY) -c 'import sys; del sys.path[0]; import pytest; sys.exit(pytest.main(sys.argv[1:]))' \
	-p no:cacheprovider -o pythonpath=$(1) -o timeout=1800 tests/ops \
	-k "not compile and not opcheck and not report and not aot and not triton and not interpreter"

# Instrumented by AddressSanitizer and UndefinedBehaviorSanitizer. `make sanitize EMULATE=1`: also at the levels of AVX-512,
# in software, where the processor has none.
EMULATE ?= 0
SANITIZED := build/sanitized$(if $(filter 1,$(EMULATE)),-emulated)
sanitize: setup
	M4KERNELS_EMULATE_AVX512=$(call quoted,$(EMULATE)) M4KERNELS_SANITIZE=address,undefined $(call built,$(SANITIZED))
	for name in c++ g++ clang++; do CXX="$${CXX:-$$(command -v $$name)}"; done; \
	if command -v "$$CXX" >/dev/null; then set -- "$$CXX"; else eval "set -- $$CXX"; fi; \
	LD_PRELOAD="$$("$$@" -print-file-name=libasan.so) $$("$$@" -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 $(call tested,$(SANITIZED))

# At the levels of AVX-512, in software.
EMULATED := build/emulated
emulate: setup
	M4KERNELS_EMULATE_AVX512=1 $(call built,$(EMULATED))
	$(call tested,$(EMULATED))

compile-gates: setup
	env -u TRITON_INTERPRET $(PY) -m m4kernels.aot

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CPP_FILES) | xargs -0 $(CLANG_FORMAT) -i

clean:
	rm -rf build dist *.egg-info m4kernels/_C*.so .pytest_cache .mypy_cache .ruff_cache
	rm -f $(STAMP)
