# Requires Python 3.11+, make and git. `make help` lists the targets.
PYTHON ?= python3
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
# So that `python` in dvc.yaml is the environment's.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export DVC_NO_ANALYTICS := 1
# The same as in src/panollava/__init__.py: tests import torch before the package sets it.
export GOMP_SPINCOUNT ?= 10000
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# An environment knows its folder by its absolute path: that of another folder, if it was moved.
MADE_IN := $(shell made=$$(sed -nE "s/^ *(export )?VIRTUAL_ENV=[\"']?(\/[^\"']*).*/\2/p" $(VENV)/bin/activate 2> /dev/null | head -n 1); \
	[ -z "$$made" ] || [ "$$made" -ef $(VENV) ] || echo "$$made")
ifneq ($(MADE_IN),)
ifeq ($(filter clean help,$(or $(MAKECMDGOALS),help)),)
$(error $(CURDIR)/$(VENV) was made in another folder, as $(MADE_IN): make it again by `make clean setup`)
endif
endif

.PHONY: help setup repro test test-all check format bench laboratory towers torture fuzz verify clean

help: ## show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' \
		| while IFS=$$'\t' read -r name text; do printf 'make %-10s %s\n' "$$name" "$$text"; done

setup: $(VENV)/ready ## install the pinned requirements into .venv

repro: $(VENV)/ready ## run the stages of the pipeline that have changed
	dvc repro

WITHOUT_BROWSER := command -v chromium > /dev/null || \
	echo 'No Chromium: tests in a browser are skipped. As root: apt-get install chromium'

test test-all: export HF_HUB_OFFLINE := 1
test test-all: export TRANSFORMERS_OFFLINE := 1
test: $(VENV)/ready-dev ## run the tests offline, except the slow ones; ARGS="tests/test_rows.py"
	@$(WITHOUT_BROWSER)
	python -m pytest --numprocesses 2 --dist loadfile -m "not slow" $(ARGS)

test-all: $(VENV)/ready-dev ## run all tests offline
	@$(WITHOUT_BROWSER)
	python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

check: $(VENV)/ready-dev ## check format, lint, spelling, types and imports; changes nothing
	ruff format --check .
	ruff check .
	codespell
	mypy
	lint-imports

format: $(VENV)/ready-dev ## format the code
	ruff check --fix-only --quiet .
	ruff format .

bench: $(VENV)/ready-bench ## measure speed on this machine; ARGS=--help lists the sections
	python benchmarks/compare.py $(ARGS)

laboratory: $(VENV)/ready ## compare choices over seeds; ARGS=--help
	dvc repro prepare
	python benchmarks/laboratory.py $(ARGS)

towers: $(VENV)/ready ## retrain the demo's two towers (one to two hours)
	dvc repro digest
	trap 'mv data/demo/dvc.yaml.frozen data/demo/dvc.yaml' EXIT; \
	sed -i.frozen 's/frozen: true/frozen: false/' data/demo/dvc.yaml; \
	dvc repro --force --single-item data/demo/dvc.yaml:encoder data/demo/dvc.yaml:language_model

torture: $(VENV)/ready-dev ## test recovery: kill the pipeline at random; ARGS="--kills 40 --seed 0"
	python benchmarks/torture.py $(ARGS)

fuzz: $(VENV)/ready-dev ## read 20,000 damaged pictures; ARGS="--files 1000 --seed 1"
	python benchmarks/fuzz_pictures.py $(ARGS)

verify: $(VENV)/ready ## delete corrupted files from DVC's cache
	python src/run.py verify

clean: ## remove the environment and caches; keeps data, results and logs
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .import_linter_cache .pytest_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11+ is required, this is %s; choose another one: make PYTHON=python3.11" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

# The stamps come last, so that an interrupted installation is repeated. The build uses the pinned
# setuptools.
$(VENV)/ready: requirements.txt pyproject.toml | $(VENV)/bin/python
	python -m pip install --quiet -r requirements.txt
	python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/ready-dev: requirements-dev.txt $(VENV)/ready
	python -m pip install --quiet -r requirements-dev.txt
	@touch $@

# In a separate folder: Lightning imports SciPy and Matplotlib if they are installed, and starts later.
$(VENV)/ready-bench: requirements-bench.txt $(VENV)/ready
	python -m pip install --quiet --no-deps --upgrade --target $(VENV)/bench -r requirements-bench.txt
	@touch $@
