# Every target makes the virtual environment it needs. PYTHON chooses the interpreter, VENV the place.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile
FAST := tests/op tests/models tests/pipeline tests/docs tests/bench \
	--ignore-glob='*/test_pipelines_*.py' --ignore=tests/pipeline/test_stacked.py

.PHONY: demo test test-fast test-all lint format bench docs notebooks package clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL)

# Without kernels, training, examples, whole pipelines and pairs of features: under two minutes on two cores.
test-fast: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) $(FAST)

# What takes long, too; then what compares times, with nothing beside it.
test-all: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) -m "not perf"
	$(BIN)/python -m pytest -m perf

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(INSTALLED)
	$(BIN)/python -m vsa_diffusers.bench

docs: $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/mkdocs build --strict

# Executes the notebooks, and writes them anew from their texts: twenty minutes on two cores.
notebooks: $(INSTALLED)
	$(BIN)/python docs/make_notebooks.py

# Both distributions in dist/, and their metadata checked.
package: $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt build twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) demo_output site dist build

# torch comes first, by its exact version: left to the resolver it may be another build.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
