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

# Two processes, a file of tests to each in turn. An engine has one thread, and no pinned core.
TEST_PROCESSES ?= 2
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind
PYTEST := $(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo control test test-fleet unit lint format bench bench-gpu soak clean

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

# One thread: more of them, on a machine with other work, wait for one another most of the time.
STORY_ENV := $(ENGINE_ENV) OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind
STORY := --max-model-len 128 --max-num-seqs 128 $(ENGINE)
SPECIMEN := examples/specimen

demo: .venv/.ready  ## The whole story on a small trained model: trace, rank, steer, evaluate, report
	@rm -rf $(DEMO)
	$(BIN)/moescope specimen data $(SPECIMEN) --others 60 --tuned 80 --out $(DEMO)/data
	@for axis in faithfulness safety; do set -x; \
	    $(STORY_ENV) $(BIN)/moescope trace $(DEMO)/data/$$axis.job.jsonl --model $(SPECIMEN) \
	        --store $(DEMO)/traces --run $$axis -- $(STORY); \
	done
	$(BIN)/moescope store verify $(DEMO)/traces
	$(BIN)/moescope store info $(DEMO)/traces
	$(BIN)/moescope rd $(DEMO)/traces --run faithfulness --positive with_doc --negative without_doc \
	    --stability --top 8 --out $(DEMO)/faithfulness.parquet
	$(BIN)/moescope rd $(DEMO)/traces --run safety --positive safe --negative unsafe \
	    --stability --top 8 --out $(DEMO)/safety.parquet
	@# Both at once, a core each: safety's words come when faithfulness has ended.
	@evaluate() { set -x; \
	    $(STORY_ENV) $(BIN)/moescope eval $$1 $(DEMO)/data/$$1.eval.jsonl --model $(SPECIMEN) \
	        --ranking $(DEMO)/$$1.parquet --tune $(DEMO)/data/$$1.tune.jsonl \
	        --tune $(DEMO)/data/utility.tune.jsonl --utility $(DEMO)/data/utility.eval.jsonl \
	        --mode steermoe --experts 1,3,6 --random 8 --random-dose 2 --dose-items 60 \
	        --out $(DEMO)/evals/$$1 -- $(STORY); \
	}; \
	evaluate safety > $(DEMO)/safety.log 2>&1 & safety=$$!; \
	trap 'kill -- $$(pgrep -P $$safety) $$safety 2>/dev/null || true' EXIT; \
	evaluate faithfulness; { set +x; } 2>/dev/null; \
	done=0; wait $$safety || done=$$?; cat $(DEMO)/safety.log; exit $$done
	$(BIN)/moescope report $(DEMO)/evals/faithfulness $(DEMO)/evals/safety --out $(DEMO)/report.html

control:  ## The same on the unplanted model, whose experts should show no effect
	@$(MAKE) --no-print-directory demo DEMO=.demo-control SPECIMEN=examples/specimen-unplanted

test: .venv/.ready $(INTERPRETER)/.ready  ## Run all tests: units, real vLLM on the CPU, GPU kernels interpreted
	$(TEST_ENV) $(PYTEST) --durations=30
	$(TEST_ENV) TRITON_INTERPRET=1 PYTHONPATH=$(INTERPRETER) $(PYTEST) --dist load tests/kernels

test-fleet: .venv/.ready  ## Run the tests of many engines: Ray, replicas, the image's steps (ten minutes)
	$(TEST_ENV) $(BIN)/pytest -m fleet

# Triton, to interpret the GPU's kernels without a GPU. Aside, since vLLM should not find it.
$(INTERPRETER)/.ready: .venv/.ready
	$(PIP) --target $(INTERPRETER) --upgrade triton==3.6.0
	@touch $@

unit: .venv/.ready  ## Run the unit tests alone
	$(TEST_ENV) $(PYTEST) tests/unit

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

soak: .venv/.ready  ## Ten rough minutes for a server on the CPU, and what must hold after them
	$(ENGINE_ENV) OMP_NUM_THREADS=1 PYTHONPATH=tests:tests/bench $(BIN)/python tests/soak/soak.py $(SOAK)

clean:  ## Remove what make made, but for .venv
	rm -rf $(DEMO) .demo-control .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
