# make help lists what there is. Everything is installed into .venv; delete that folder, or run make clean,
# to start afresh.
#
#   make PYTHON=/path/to/python3.12 demo       another Python
#   make PIP_ARGS="..." demo                   more options for pip, such as an index with another torch
#   make PYTEST_ARGS="-k phantom" test         some of the tests

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt
SETTINGS := pyproject.toml constraints.txt
# A file's tests stay in one process, and the longest, in tests/integration, begin.
IN_TWO_PROCESSES := -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

.DEFAULT_GOAL := help
.PHONY: help demo napari test lint clean

help:
	@echo "make demo   make a synthetic cohort, pretrain, finetune, segment (at most 5 minutes on two cores)"
	@echo "make napari open the viewer with the plugin"
	@echo "make test   run the tests"
	@echo "make lint   check format, style and types"
	@echo "make clean  delete .venv, caches and what the demo wrote"

demo: $(VENV)/installed-engine
	$(BIN)/kaf demo --output demo-output

napari: $(VENV)/installed-viewer
	$(BIN)/napari -w napari-kaf

test: $(VENV)/installed-tests
	sh scripts/system-libraries.sh
	$(BIN)/python -m pytest $(IN_TWO_PROCESSES) $(PYTEST_ARGS)

lint: $(VENV)/installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo-output benchmark-output build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is newer than the files it was installed from, so that a second make installs nothing.

$(VENV)/created:
	sh scripts/make-venv.sh "$(PYTHON)" $(VENV)
	touch $@

$(VENV)/installed-engine: $(SETTINGS) | $(VENV)/created
	$(PIP_INSTALL) -e .
	touch $@

$(VENV)/installed-viewer: $(SETTINGS) | $(VENV)/created
	$(PIP_INSTALL) -e ".[qt]"
	touch $@ $(VENV)/installed-engine

$(VENV)/installed-tests: $(SETTINGS) | $(VENV)/created
	$(PIP_INSTALL) -e ".[test,superpoint]"
	touch $@ $(VENV)/installed-engine
