# One command from a fresh checkout to a result: `make compare`. Every target makes the environment that it needs, once.

VENV ?= .venv
PYTHON ?= python3
ARGS ?=
VERL_VENV ?= .venv-verl

BIN := $(VENV)/bin
# The first line is for Pythons that cannot even parse the second.
define SETUP
@test -e '$(VENV)' || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 7) and "Python 3.11 to 3.13 is needed: PYTHON=…")'
@$(PYTHON) tools/bootstrap.py --venv '$(VENV)'
endef

# verl and vLLM want different versions of transformers. verl itself comes without its dependencies: its metrics import
# few of them. torch is the same CPU build as ours, from the same index. The pins, copied there, say that it is finished.
VERL_PIP = '$(VERL_VENV)/bin/python' -m pip --disable-pip-version-check --no-input install -qq
VERL_PINS := tests/oracles/verl.txt tests/oracles/verl-needs.txt
TORCH := from tools.bootstrap import TORCH_CPU, TORCH_CPU_INDEX; print(TORCH_CPU_INDEX, TORCH_CPU)
define VERL_SETUP
@if ! cat $(VERL_PINS) | cmp -s - '$(VERL_VENV)/pins'; then \
	echo 'Setting up $(VERL_VENV) with verl' && \
	$(PYTHON) -m venv '$(VERL_VENV)' && \
	$(VERL_PIP) --no-deps --retries 2 --timeout 15 --extra-index-url $$('$(BIN)/python' -c '$(TORCH)') && \
	$(VERL_PIP) -r tests/oracles/verl-needs.txt && \
	$(VERL_PIP) --no-deps --ignore-requires-python -r tests/oracles/verl.txt && \
	cat $(VERL_PINS) > '$(VERL_VENV)/pins'; \
fi
endef

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev compare test lint schema docs notebook oracles bench validate clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'Variables: ARGS="…" goes to the command, VENV=folder (.venv), PYTHON=interpreter (python3).'

setup: ## Make the environment and fetch the built-in model
	$(SETUP)

setup-dev: ## The same with the development tools
	$(SETUP) --extra dev

compare: setup ## Measure the mismatch, e.g. make compare ARGS="--num-prompts 16"
	@'$(BIN)/mismatch-probe' compare $(ARGS)

# Tests without an engine run side by side; those on real engines, which fill the machine, one after another. Exit code
# 5 says that ARGS selects none of a kind.
test: setup-dev ## Run the tests, e.g. make test ARGS="-k prompts"
	@'$(BIN)/python' -m pytest -m 'not engine' -n auto --maxprocesses 4 --dist loadfile $(ARGS) || [ $$? = 5 ]
	@'$(BIN)/python' -m pytest -m engine $(ARGS) || [ $$? = 5 ]

lint: setup-dev ## Check style, types and the direction of imports
	@'$(BIN)/python' -m ruff check .
	@'$(BIN)/python' -m ruff format --check .
	@'$(BIN)/python' -m mypy
	@'$(BIN)/lint-imports'

schema: setup-dev ## Write the JSON schemas of every document: data/schemas
	@'$(BIN)/python' -m tools.schemas

docs: setup-dev ## Write the generated pages: cli.md, metrics.md, findings.md and algorithms.md in docs, and mismatch_probe/keywords.py
	@'$(BIN)/python' -m tools.pages
	@'$(BIN)/python' -m tools.keywords
	@'$(BIN)/python' -m tools.exact_bias

notebook: setup-dev ## Run the notebooks from start to end
	@'$(BIN)/python' -m pytest --nbmake --nbmake-timeout=1800 notebooks $(ARGS)

oracles: ## Compare the metrics with those of verl, TRL, ArviZ and torch on the same arrays
	$(SETUP) --extra dev --extra oracles --no-model
	$(VERL_SETUP)
	@MISMATCH_PROBE_ORACLES=1 VERL_PYTHON='$(VERL_VENV)/bin/python' '$(BIN)/python' -m pytest tests/oracles $(ARGS)

bench: ## Measure the tool's own speed, also against a bare script and against TRL
	$(SETUP) --extra oracles
	@'$(BIN)/python' benchmarks/stream_metrics.py
	@'$(BIN)/python' benchmarks/exact_kl.py
	@'$(BIN)/python' benchmarks/range_tracking.py
	@'$(BIN)/python' benchmarks/attribute_vs_compares.py
	@'$(BIN)/python' benchmarks/score_vs_trl.py
	@'$(BIN)/python' benchmarks/rl_step_vs_plain.py --precision float32-cast --precision bfloat16-autocast
	@'$(BIN)/python' benchmarks/rl_overhead.py
	@'$(BIN)/python' benchmarks/compare_phases.py
	@'$(BIN)/python' benchmarks/compare_vs_bare.py --num-prompts 16 --max-tokens 12

validate: setup-dev ## Plant faults and compare clean families, some studies behind docs/validation.md
	@'$(BIN)/python' validation/planted_faults.py
	@'$(BIN)/python' validation/clean_families.py

clean: ## Remove caches and build products; the environment stays (rm -r .venv)
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache
	find mismatch_probe tests -name __pycache__ -type d -prune -exec rm -rf {} +
