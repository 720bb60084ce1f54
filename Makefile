# Two commands do everything, installation included:  make demo   and   make test
PYTHON ?= python3
BACKEND ?= torch
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
QUIET := TF_CPP_MIN_LOG_LEVEL=3

.PHONY: demo test test-torch test-tensorflow test-jax lint bench fuzz clean

demo: $(VENV)/.demo-$(BACKEND)
	KERAS_BACKEND=$(BACKEND) $(QUIET) $(BIN)/python examples/quickstart.py

test: test-torch test-tensorflow test-jax

test-torch test-tensorflow test-jax: test-%: $(VENV)/.dev
	@echo "== tests on $*"
	KERAS_BACKEND=$* $(QUIET) $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: docs
docs: $(VENV)/.dev
	$(BIN)/python -m keras_woodfisher.options.table README.md

bench: $(VENV)/.dev
	$(QUIET) $(BIN)/python benchmarks/run_all.py $(ARGS)

fuzz: $(VENV)/.dev
	KERAS_BACKEND=$(BACKEND) $(QUIET) $(BIN)/python tests/recipe/fuzz_recipes.py $(ARGS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-%: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[$*,demo]"
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
