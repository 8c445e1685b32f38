# dit-distill: `make demo` shows the whole path, `make test` passes the tests; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
EXAMPLES ?= 2000
JOBS ?= 2
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH_VENV ?= .venv-bench
BENCH_READY := $(BENCH_VENV)/.ready

DATASET ?= demo
DATA ?=
TEACHER ?=
PRESET ?= $(if $(filter demo,$(DATASET)),demo,recommended)
RUN ?= runs/$(DATASET)

# The image of an unseen class with whose neighbours the demo ends.
DEMO_QUERY := test-000-000

data_option = $(if $(DATA),--data "$(DATA)")
teacher_option = $(if $(TEACHER),--teacher "$(TEACHER)")
set_options = $(foreach setting,$(SET),--set "$(setting)")
cache_options = $(if $(PROBE),--probe) $(if $(DRY_RUN),--dry-run) $(set_options) $(CACHE)

.PHONY: help setup demo demo-teacher cache train eval test fuzz lint format bench gpu-check clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'
	@echo "  variables: DATASET=demo|cars|cub|dogs|nabirds|folder DATA=/path TEACHER=demo|flux-kontext|flux2-klein-base|timm:NAME|/folder|owner/repo RUN=runs/cars PRESET=demo|recommended|small|paper"
	@echo "  of make cache: DRY_RUN=1 prints the plan, PROBE=1 compares taps and timesteps, SET=\"refine.steps=200 build.pool=2\" sets any field"
	@echo "  more options: CACHE=\"--limit 100\" for dit-cache run, TRAIN=\"--epochs 10\" for dit-train run"

setup: $(READY) ## Create the environment (.venv)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; this is " + sys.version.split()[0] + "; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(READY) ## The whole path on the embedded data: refine, cache, train baseline and distilled student, report, search
	@started=$$(date +%s); rm -rf runs/demo; mkdir -p runs/demo; \
	$(BIN)/dit-cache refine --dataset demo --output runs/demo/lora; \
	$(BIN)/dit-cache build --dataset demo --lora runs/demo/lora --output runs/demo/cache; \
	for mode in baseline distill; do \
	  $(BIN)/dit-train run --cache runs/demo/cache --preset demo --mode $$mode --output runs/demo/$$mode; \
	  $(BIN)/dit-train eval runs/demo/$$mode; \
	done; \
	for mode in baseline distill; do \
	  $(BIN)/dit-train embed runs/demo/cache --split test --model runs/demo/$$mode --output runs/demo/$$mode.parquet >/dev/null; \
	  $(BIN)/dit-train index runs/demo/$$mode.parquet --output runs/demo/$$mode.index >/dev/null; \
	done; \
	$(BIN)/dit-train report runs/demo/baseline runs/demo/distill --output runs/demo --started $$started; \
	$(BIN)/dit-train search --item $(DEMO_QUERY) --index runs/demo/baseline.index --index runs/demo/distill.index --png runs/demo/search.png --json >/dev/null

cache: $(READY) ## Annotate, refine, build and verify: make cache DATASET=cars DATA=/path TEACHER=flux-kontext [DRY_RUN=1]
	$(BIN)/dit-cache run --dataset $(DATASET) $(data_option) $(teacher_option) --output $(RUN) $(cache_options)

train: $(READY) ## Train a student from the cache: make train DATASET=cars
	$(BIN)/dit-train run --cache $(RUN)/cache --preset $(PRESET) --mode distill --output $(RUN)/distill $(TRAIN)

eval: $(READY) ## Recall@K and mAP@R of the trained student on unseen classes: make eval DATASET=cars
	$(BIN)/dit-train eval $(RUN)/distill

demo-teacher: $(READY) ## Train the demo teacher again from nothing (about 70 minutes on 2 cores, two hours without bf16)
	$(BIN)/python -m pipeline.refine.pretrain_demo

# One thread each: two processes that both use all cores would wait for each other.
test: $(READY) ## Run the tests, JOBS=2 files at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

fuzz: $(READY) ## Run the property tests with EXAMPLES=2000 examples each (10 minutes)
	HYPOTHESIS_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -m property --timeout 0

lint: $(READY) ## Style, types and the house rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## Rewrite the code in the house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The tools to compare with get an environment of their own, since some of them want older versions of what the runtime
# has. It sees the runtime's packages behind its own, so that torch is not installed twice, and cannot change them: pip
# touches nothing outside the environment it runs in.
$(BENCH_READY): $(READY) pyproject.toml
	$(PYTHON) -m venv --clear $(BENCH_VENV)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$($(BENCH_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/runtime.pth"
	$(BIN)/python -m pip freeze --exclude-editable | grep -E '^(torch|torchvision|zarr|numcodecs)==' > $(BENCH_VENV)/constraints.txt
	$(BENCH_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(BENCH_VENV)/bin/python -m pip install --quiet --constraint $(BENCH_VENV)/constraints.txt --editable '.[bench]'
	@touch $@

bench: $(BENCH_READY) ## Run the benchmarks; tables are written under benchmarks/results
	$(BENCH_VENV)/bin/python -m benchmarks reading writing
	$(BIN)/python -m benchmarks --except reading,writing

gpu-check: $(READY) ## Prove that a GPU does what it must, at real size (8 minutes on an H100); without one, a small twin on the CPU
	$(BIN)/python -m benchmarks.gpu_check

clean: ## Remove the environment and everything made by the demo
	rm -rf $(VENV) $(BENCH_VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
