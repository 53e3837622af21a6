# `make demo` and `make test` set everything up by themselves in .venv; both can be run again at once.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test chaos lint wheelhouse clean

help:  ## what there is to type
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

setup: $(VENV)/.installed  ## create .venv and install the pinned packages

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 14); \
	  sys.exit(None if ok else "Python 3.11 to 3.13 is needed; this is %s. Try: make PYTHON=python3.11" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt pip setuptools wheel
	$(PY) -m pip install --quiet --constraint constraints.txt torch
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	@touch $@

demo: setup  ## train a small CRATE on real digits, on two local ranks, to over 95 %
	$(PY) launch/demo.py

BESIDE := tests/cluster tests/prep tests/watching
BESIDE_TOO := tests/training tests/doctor tests/evaluation

test: setup  ## every test; those that need SLURM skip where it is not installed
	@# Many wait more than they compute, those of the cluster for SLURM: three at a time, shown one behind the other.
	@logs=$$(mktemp -d); \
	$(PY) -m pytest $(BESIDE) >"$$logs/1" 2>&1 & first=$$!; \
	$(PY) -m pytest $(BESIDE_TOO) >"$$logs/2" 2>&1 & second=$$!; \
	trap "kill $$first $$second" INT TERM; \
	$(PY) -m pytest $(addprefix --ignore ,$(BESIDE) $(BESIDE_TOO)); status=$$?; \
	wait $$first || status=1; wait $$second || status=1; cat "$$logs"/*; exit $$status

chaos: setup  ## kill, stop, starve and damage real runs, and start 2,000 loaders under load (half an hour)
	$(PY) -m tests.chaos $(if $(SEED),--seed $(SEED))
	$(PY) -m tests.chaos.starts

lint: setup  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

wheelhouse: setup  ## pack what a machine without network needs into wheelhouse/, for this Python and platform
	$(PY) -m pip wheel --quiet --constraint constraints.txt --wheel-dir wheelhouse pip setuptools wheel torch '.[demo,dev]'
	rm -f wheelhouse/crate_dist-*.whl
	@echo "there, in a clone beside it:  python3 -m pip install --no-index --find-links wheelhouse" \
	  "--constraint constraints.txt --editable ."

clean:  ## remove what the demo wrote: runs/demo, its images and its shards
	rm -rf runs/demo runs/demo-images runs/demo-shards
