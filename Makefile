# Each target makes its own environment first: `make demo VENV=/somewhere PYTHON=python3.12` to choose where and with what.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
BENCH_OUT ?= runs/bench
TRANSFORMERS ?= 5.12.0 5.24.0
WITH_MODELS := adapters answers balance checkpointing conformance control ecosystem grouped mixed_batches offloading \
	prompts saving task_ids token_routing training trl

.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-slow test-transformers conformance bench evidence docs quality style

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' Makefile

demo: $(VENV)/.demo-stamp  ## train MOELoRA on a small real model, score, save, reload and fold it
	@$(BIN)/python scripts/demo.py $(DEMO_ARGS)

test: $(VENV)/.test-stamp  ## the tests that take seconds
	$(BIN)/python -m pytest -n 2 -m "not slow and not long" $(TEST_ARGS)

test-long: $(VENV)/.test-stamp  ## those that take longer: other processes, browsers, compiling, counted costs, the Python of README and docs
	$(BIN)/python -m pytest -n 2 -m "long and not slow" $(TEST_ARGS)

test-slow: $(VENV)/.test-stamp  ## every test
	$(BIN)/python -m pytest -n 2 $(TEST_ARGS)

test-transformers: $(VENV)/.test-stamp  ## the quick tests of whole models with other versions of transformers; TRANSFORMERS="5.12.0 5.24.0"
	@set -e; for version in $(TRANSFORMERS); do \
		there=$(abspath $(VENV))/transformers-$$version; echo "With transformers $$version"; \
		$(BIN)/python -m pip install --quiet --upgrade --target $$there transformers==$$version; \
		PYTHONPATH=$$there $(BIN)/python -m pytest -n 2 -m "not slow and not long" $(WITH_MODELS:%=tests/test_%.py) $(TEST_ARGS); \
	done

conformance: $(VENV)/.test-stamp  ## peft's own tests against our configs; PEFT_SRC= and PEFT_SUITE=, see docs/conformance.md
	$(BIN)/python scripts/conformance.py $(CONFORMANCE_ARGS)

bench: $(VENV)/.test-stamp  ## time and memory beside stock LoRA; BENCH_OUT=where BENCH_ARGS="--rounds 3"
	@$(BIN)/python scripts/get_model.py
	@set -e; for part in layer scaling model; do $(BIN)/python scripts/bench/$$part.py --output $(BENCH_OUT)/$$part.json $(BENCH_ARGS); done
	@$(BIN)/python scripts/bench/pictures.py $(BENCH_OUT)

evidence: $(VENV)/.test-stamp  ## the runs of the comparison that are missing, for a night or more, and its page; EVIDENCE_ARGS="--hours 8" or --quick
	@$(BIN)/python scripts/get_model.py
	@$(BIN)/python scripts/evidence/run.py $(EVIDENCE_ARGS)
	@$(BIN)/python scripts/evidence/page.py

docs: $(VENV)/.docs-stamp  ## the site, into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(DOCS_ARGS)

quality: $(VENV)/.quality-stamp  ## lint, format and types, as CI checks them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.quality-stamp  ## put lint and format right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# one environment; a stamp for each extra that is in it
$(VENV)/.%-stamp: setup.cfg pyproject.toml constraints.txt
	@echo "Installing peft_moe[$*] into $(VENV) (PyTorch and its friends: a minute or two) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	@touch $@
