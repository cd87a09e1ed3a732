# make help lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ARGS ?= schedule=gpt5_moe

KILLS ?= 200
TESTS ?= tests

.PHONY: help run test coverage soak gpu lint docs wheel clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(VENV)/.runs ## train through the whole curriculum on real text: make run ARGS="schedule=none seed=1"
	$(BIN)/python -m apt_launch $(ARGS)

test: $(VENV)/.installed ## run all tests
	$(BIN)/python -m pytest

coverage: $(VENV)/.installed ## count what tests run, in all processes, and slower: make coverage TESTS=tests/schedule
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(TESTS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

soak: $(VENV)/.installed ## kill training 200 times and compare what comes out: make soak KILLS=1000
	APT_KILLS=$(KILLS) $(BIN)/python -m pytest -s tests/reliability/test_kills.py

gpu: $(VENV)/.installed ## on a machine with a GPU: its tests, benchmarks and a run, told in build/gpu
	PYTHON=$(BIN)/python sh tests/bench/on_gpu.sh build/gpu

lint: $(VENV)/.installed ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed ## build the documentation into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

wheel: $(VENV)/.installed ## build the wheel and run it from another folder in an environment of its own
	PYTHON="$(PYTHON)" TORCH="torch==2.13.0" PYTHON_BIN="$(abspath $(BIN)/python)" sh tests/wheel.sh

clean: ## remove the environment and what tools left
	rm -rf $(VENV) build dist .coverage* .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch first and pinned: a range would take the newest build, with gigabytes of libraries
$(VENV)/.runs: pyproject.toml tests/environment.sh
	@echo "Making $(VENV), once: one to three minutes, most of it for torch."
	@sh tests/environment.sh "$(PYTHON)" "$(VENV)"
	@echo "Installing torch 2.13.0 ..."
	@$(BIN)/python -m pip install --quiet torch==2.13.0
	@echo "Installing apt-launch and what it needs ..."
	@$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed: $(VENV)/.runs
	@echo "Installing what tests and documentation need ..."
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
