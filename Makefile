# make help lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ARGS ?= schedule=gpt5_moe

KILLS ?= 200
EXAMPLES ?= 400
TESTS ?= tests
WORKERS ?= 5

.PHONY: help run test test-fast coverage soak gpu lint docs wheel pythons hydra14 clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(VENV)/.runs ## train through the whole curriculum on real text: make run ARGS="schedule=none seed=1"
	$(BIN)/python -m apt_launch $(ARGS)

test: $(VENV)/.installed ## run all tests, several at a time: make test WORKERS=8
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

test-fast: $(VENV)/.installed ## run what takes no longer than two minutes: while you edit
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder -m "not slow" \
		--ignore=tests/slurm --ignore=tests/integrations --ignore=tests/reliability

coverage: $(VENV)/.installed ## count what tests run, in all processes, and slower: make coverage TESTS=tests/schedule
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(TESTS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

soak: $(VENV)/.installed ## the same kills, inputs, attacks and compiled runs, far more of them than in the tests: make soak KILLS=1000
	APT_KILLS=$(KILLS) APT_EXAMPLES=$(EXAMPLES) APT_EVERYWHERE=1 $(BIN)/python -m pytest -s -n 2 --dist loadgroup \
		tests/reliability/test_kills.py tests/reliability/test_bad_input.py tests/reliability/test_security.py \
		tests/launch/test_shared_updates.py tests/training/test_compile.py tests/training/test_data_parallel.py \
		tests/training/test_prefix.py tests/slurm/test_sweeps.py

gpu: $(VENV)/.installed ## on a machine with a GPU: its tests, benchmarks and a run, with the results in build/gpu
	PYTHON=$(BIN)/python sh tests/bench/on_gpu.sh build/gpu

lint: $(VENV)/.installed ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed ## build the documentation into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

wheel: $(VENV)/.installed ## build the wheel and run it from another folder in an environment of its own
	PYTHON_BIN="$(abspath $(BIN)/python)" sh tests/wheel.sh

pythons: $(VENV)/.made ## what needs no torch, on Python 3.10 and 3.13, where they are
	PYTHON_BIN="$(abspath $(BIN)/python)" sh tests/pythons.sh

hydra14: $(VENV)/.installed ## composing, plugins and security with Hydra 1.4
	PYTHON_BIN="$(abspath $(BIN)/python)" sh tests/hydra14.sh

clean: ## remove the environment and what tools left
	rm -rf $(VENV) build dist .coverage* .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch pinned: a range would take the newest build, with gigabytes of libraries
# not compiled: most of it is never loaded
PIP = $(BIN)/python -m pip install --quiet --no-compile torch==2.13.0

$(VENV)/.made: tests/environment.sh
	@echo "Making $(VENV), once: one to three minutes, most of it for torch."
	@sh tests/environment.sh "$(PYTHON)" "$(VENV)"
	@touch $@

$(VENV)/.runs: pyproject.toml $(VENV)/.made
	@echo "Installing torch 2.13.0, apt-launch and what it needs ..."
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.made
	@echo "Installing torch 2.13.0, apt-launch and what it, tests and documentation need ..."
	@$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.runs
