# Two commands do everything, installation included:  make demo   and   make test
PYTHON ?= python3
BACKEND ?= torch
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
QUIET := TF_CPP_MIN_LOG_LEVEL=3
# Of `make test-keras`: a release of Keras, or `nightly`, in an environment of its own.
KERAS ?= 3.12.0
KERAS_VENV := .venv-keras-$(KERAS)
KERAS_PACKAGE = $(if $(filter nightly,$(KERAS)),keras-nightly,keras==$(KERAS))
# Of `make test-exports`: the runtimes of exported files, beside the frameworks of $(VENV).
EXPORTS_VENV := .venv-exports
# Of `make fuzz`: how many fits it composes.
FITS ?= 300
BACKENDS ?= torch tensorflow jax

.PHONY: demo test test-torch test-tensorflow test-jax test-keras test-exports test-browser lint docs bench fuzz mutants clean

demo: $(VENV)/.demo-$(BACKEND)
	KERAS_BACKEND=$(BACKEND) $(QUIET) $(BIN)/python examples/quickstart.py

test: $(BACKENDS:%=test-%)

test-torch test-tensorflow test-jax: test-%: $(VENV)/.dev
	@echo "== tests on $*"
	KERAS_BACKEND=$* $(QUIET) $(BIN)/python -m pytest -n 2 --dist worksteal

# Needs chromium, which isn't installed by this file.
test-browser: $(VENV)/.dev
	KERAS_BACKEND=$(BACKEND) $(QUIET) $(BIN)/python -m pytest tests/reports/browser.py

test-keras: $(KERAS_VENV)/.dev
	@failed=; for backend in $(BACKENDS); do \
		echo "== tests on $$backend with Keras $(KERAS)"; \
		KERAS_BACKEND=$$backend $(QUIET) $(KERAS_VENV)/bin/python -m pytest -n 2 --dist worksteal || failed=1; \
	done; test -z "$$failed"

test-exports: $(EXPORTS_VENV)/.dev
	@for backend in $(BACKENDS); do \
		echo "== exports on $$backend"; \
		KERAS_BACKEND=$$backend $(QUIET) $(EXPORTS_VENV)/bin/python -m pytest -m exports tests/deployment/test_exports.py || exit 1; \
	done

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.dev
	$(BIN)/python -m keras_woodfisher.options.table README.md

bench: $(VENV)/.dev
	$(QUIET) $(BIN)/python benchmarks/run_all.py $(ARGS)

fuzz: $(VENV)/.dev
	KERAS_BACKEND=$(BACKEND) $(QUIET) $(BIN)/python tests/recipe/fuzz_recipes.py $(ARGS)
	FITS=$(FITS) KERAS_BACKEND=$(BACKEND) $(QUIET) $(BIN)/python -m pytest tests/callbacks/test_composed_fits.py

mutants: $(VENV)/.dev
	KERAS_BACKEND=$(BACKEND) $(QUIET) $(BIN)/python tests/mutants.py $(ARGS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-%: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[$*,demo]"
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[dev]"
	@touch $@

$(EXPORTS_VENV)/.dev: $(VENV)/.dev
	$(PYTHON) -m venv $(EXPORTS_VENV)
	$(EXPORTS_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $(EXPORTS_VENV)/.place
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > "$$(cat $(EXPORTS_VENV)/.place)/frameworks.pth"
	$(EXPORTS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[exports]"
	@touch $@

# Keras comes last: TensorFlow asks for a package named keras, which keras-nightly isn't.
$(KERAS_VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(KERAS_VENV)
	grep -v '^keras==' constraints.txt > $(KERAS_VENV)/constraints.txt
	$(KERAS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c $(KERAS_VENV)/constraints.txt -e ".[dev]"
	$(KERAS_VENV)/bin/python -m pip uninstall --quiet --yes keras keras-nightly
	$(KERAS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(KERAS_PACKAGE)
	@touch $@

clean:
	rm -rf $(VENV) .venv-keras-* $(EXPORTS_VENV) .pytest_cache .ruff_cache
