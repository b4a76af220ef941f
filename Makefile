# Everything that people and CI run. `make help` lists it.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --no-deps
TORCH := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu
DEMO := .demo
INTERPRETER := .venv/triton

# A tiny model on a laptop: no compilation, one process, 1 GiB of KV cache, no chatter.
ENGINE_ENV := VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR \
              HF_HUB_OFFLINE=1
# In float32 the numbers are the same on every processor.
ENGINE := --enforce-eager --dtype float32 --attention-backend CPU_MLA

.PHONY: help setup demo test unit lint format bench bench-gpu clean

help:  ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

setup: .venv/.ready  ## Create .venv and install the locked packages (CPU vLLM)

.venv/.ready: requirements/cpu.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("moescope needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	@echo "setting up .venv (a few minutes, once)"
	$(PYTHON) -m venv .venv
	# torch first, in a step of its own: as pip is configured, or else from PyTorch's CPU index.
	$(PIP) "$(TORCH)" 2>/dev/null || $(PIP) "$(TORCH)" --index-url $(TORCH_INDEX)
	$(PIP) -r requirements/cpu.lock
	$(PIP) --no-build-isolation -e .
	@rm -rf *.egg-info build  # a stale one would hide the entry points
	@touch $@

demo: .venv/.ready  ## Trace a small model on real questions and rank its experts, in about a minute
	@rm -rf $(DEMO)
	$(BIN)/moescope specimen make $(DEMO)/model --arch deepseek_v2 --seed 0
	$(BIN)/moescope data faithfulness --format squad examples/questions.json --out $(DEMO)/job.jsonl
	$(ENGINE_ENV) $(BIN)/moescope trace $(DEMO)/job.jsonl --model $(DEMO)/model --store $(DEMO)/traces \
	    -- --max-model-len 1024 --max-num-seqs 32 $(ENGINE)
	$(BIN)/moescope store verify $(DEMO)/traces
	$(BIN)/moescope store info $(DEMO)/traces
	$(BIN)/moescope rd $(DEMO)/traces --positive with_doc --negative without_doc --segment question \
	    --estimator sequence --top 10 --out $(DEMO)/ranking.parquet --plot $(DEMO)/heatmap.png

test: .venv/.ready $(INTERPRETER)/.ready  ## Run all tests: units, real vLLM on the CPU, GPU kernels interpreted
	$(BIN)/pytest
	TRITON_INTERPRET=1 PYTHONPATH=$(INTERPRETER) $(BIN)/pytest tests/kernels

# Triton, to interpret the GPU's kernels without a GPU. Aside, since vLLM should not find it.
$(INTERPRETER)/.ready: .venv/.ready
	$(PIP) --target $(INTERPRETER) --upgrade triton==3.6.0
	@touch $@

unit: .venv/.ready  ## Run the unit tests alone
	$(BIN)/pytest tests/unit

lint: .venv/.ready  ## Check style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.ready  ## Put the code into the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv/.ready  ## Measure: the cost of tracing, and the writer alone
	$(ENGINE_ENV) PYTHONPATH=tests $(BIN)/python tests/bench/bench.py $(BENCH)

bench-gpu: .venv/.ready  ## Measure on GPUs at real shapes (docs/benchmarks.md)
	$(BIN)/python tests/bench/bench_gpu.py $(BENCH)

clean:  ## Remove what make made, but for .venv
	rm -rf $(DEMO) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
