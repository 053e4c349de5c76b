# Needs Python 3.11 or newer, make and git. `make help` lists what one can do.
PYTHON ?= python3
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
# `python` in dvc.yaml is thereby the environment's.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export DVC_NO_ANALYTICS := 1
# As the package sets it, see src/panollava/__init__.py; tests import torch before that.
export GOMP_SPINCOUNT ?= 10000
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup repro test check format bench laboratory towers torture verify clean

help: ## list what one can do
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' \
		| while IFS=$$'\t' read -r name text; do printf 'make %-10s %s\n' "$$name" "$$text"; done

setup: $(VENV)/ready ## install the pinned requirements into .venv

repro: $(VENV)/ready ## run what has changed of the pipeline
	dvc repro

test: export HF_HUB_OFFLINE := 1
test: export TRANSFORMERS_OFFLINE := 1
test: $(VENV)/ready-dev ## run the tests, offline; make test ARGS='-m "not slow"' leaves out long ones
	python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

check: $(VENV)/ready-dev ## format, lint and types, changing nothing
	ruff format --check .
	ruff check .
	mypy

format: $(VENV)/ready-dev ## put the code into its format
	ruff check --fix-only --quiet .
	ruff format .

bench: $(VENV)/ready-bench ## measure speed on this machine; make bench ARGS=--help
	python benchmarks/compare.py $(ARGS)

laboratory: $(VENV)/ready-bench ## compare choices as DVC experiments; make laboratory ARGS=--help
	python benchmarks/laboratory.py $(ARGS)

towers: $(VENV)/ready ## train the demo's two towers anew (an hour, or two)
	dvc repro digest
	trap 'mv data/demo/dvc.yaml.frozen data/demo/dvc.yaml' EXIT; \
	sed -i.frozen 's/frozen: true/frozen: false/' data/demo/dvc.yaml; \
	dvc repro --force --single-item data/demo/dvc.yaml:encoder data/demo/dvc.yaml:language_model

torture: $(VENV)/ready-dev ## kill the pipeline at random moments; ARGS="--kills 40 --seed 0"
	python benchmarks/torture.py $(ARGS)

verify: $(VENV)/ready ## look for damaged files in DVC's cache, and remove them
	python src/run.py verify

clean: ## remove the environment and caches; data, results and logs stay
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is %s; name another: make PYTHON=python3.11" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

# The stamps come last, so that a broken installation is repeated. The build uses the pinned
# setuptools.
$(VENV)/ready: requirements.txt pyproject.toml | $(VENV)/bin/python
	python -m pip install --quiet -r requirements.txt
	python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/ready-dev: requirements-dev.txt $(VENV)/ready
	python -m pip install --quiet -r requirements-dev.txt
	@touch $@

# Aside: where SciPy and Matplotlib are installed, Lightning imports them, and starts later.
$(VENV)/ready-bench: requirements-bench.txt $(VENV)/ready
	python -m pip install --quiet --no-deps --upgrade --target $(VENV)/bench -r requirements-bench.txt
	@touch $@
