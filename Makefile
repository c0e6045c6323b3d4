# Two commands do everything, set-up included: `make demo` and `make test`. The second time the set-up takes a second.
PYTHON ?= python3
VENV := .venv/bin
PYTEST_ARGS ?=
# Most tests wait for processes and kernels: two files at a time halve the time, and no test may mind the other.
PYTEST_WORKERS ?= 2
BENCH_ARGS ?=
CHAOS_ARGS ?=
SWEEP_ARGS ?=
FUZZ_SECONDS ?= 60
FUZZ_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test chaos sweep fuzz bench lint format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: setup ## set up, then resume guests whose RAM is elsewhere, and show what that took
	@$(VENV)/lazymem demo

test: setup lint ## set up, then lint, type check and run all tests (PYTEST_ARGS=... passes more to pytest)
	@$(VENV)/python -m tests.prepare
	@$(VENV)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

chaos: setup ## set up, then ill-treat mounts for minutes (CHAOS_ARGS='--seconds 600 --seed 7'; --help lists more)
	@$(VENV)/python -m tests.prepare
	@$(VENV)/python -m tests.chaos $(CHAOS_ARGS)

sweep: setup ## set up, then fail each call to disk and network of mounts and hand-overs, two hours (SWEEP_ARGS='-k disk')
	@$(VENV)/python -m tests.prepare
	@LAZYMEM_SWEEP=wide $(VENV)/python -m pytest tests/faults $(SWEEP_ARGS)

bench: setup ## set up with the peers' packages, then measure lazymem beside them (BENCH_ARGS='--help' lists what)
	@$(VENV)/python -m bench.prepare
	@$(VENV)/python -m bench $(BENCH_ARGS)

fuzz: setup ## fuzz all readers of foreign bytes, coverage-guided (FUZZ_SECONDS=60 each; FUZZ_ARGS='--help' lists more)
	@$(VENV)/python -m pip install --quiet --editable '.[fuzz]'
	@$(VENV)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS)

lint: setup ## ruff (rules and format) and mypy in strict mode
	@$(VENV)/ruff check
	@$(VENV)/ruff format --check
	@$(VENV)/mypy

format: setup ## let ruff format the sources
	@$(VENV)/ruff format

setup: ## system packages where missing, the virtual environment, the install; needs root or sudo only for packages
	@PYTHON="$(PYTHON)" scripts/setup

clean: ## remove all that make made here: .venv, caches (system packages stay)
	rm -rf .venv .cache build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
