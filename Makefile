# Two commands matter: `make demo` shows the whole path, `make test` proves it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS := $(VENV)/.runs
STAMP := $(VENV)/.installed
DEMO := runs/demo

export HF_HUB_OFFLINE := 1

.PHONY: setup demo test lint serve clean
.DELETE_ON_ERROR:

setup: $(STAMP)

# torch comes first and pinned: it is the version that the suite is proven with, and a range would take the newest.
$(RUNS): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(STAMP): $(RUNS)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(RUNS)  ## show the shipped student, distill one, evaluate it, serve it; EXIT=1 ends instead of serving on
	$(BIN)/python -m distill.cli.demo --out $(DEMO) $(if $(EXIT),--exit)

test: lint
	$(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

serve: $(RUNS)  ## the shipped student on http://127.0.0.1:8000
	$(BIN)/fgm-service serve

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
