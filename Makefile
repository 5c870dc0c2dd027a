# Set-up, demo, tests and checks. Every target does its own set-up.
#   make PYTHON=python3.12 …   builds .venv with that interpreter
#   make PY=python3 …          uses an interpreter that has everything already, and sets nothing up

PYTHON ?= python3
WORKERS ?= 2
# Threads wait asleep: on cores shared with other work, spinning ones made training eight times slower.
export OMP_WAIT_POLICY ?= PASSIVE

VENV := .venv
ifeq ($(origin PY),command line)
READY :=
RCPCONV := $(PY) -m rcpconv
RCP_RUN := $(PY) -m rcprun
# Run from source: nothing needs to be installed.
export PYTHONPATH := $(CURDIR):$(CURDIR)/formats:$(CURDIR)/runtime$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
RCPCONV := $(VENV)/bin/rcpconv
RCP_RUN := $(VENV)/bin/rcp-run
READY := $(VENV)/.ready
endif

.PHONY: setup demo test test-slow test-gpu check format clean

setup: $(READY)

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[convert,dev]'
	touch $@

demo: $(READY)
	$(RCPCONV) quantize demo --runs demo-out/runs
	$(RCPCONV) export --runs demo-out/runs --out demo-out/demo.rcp --force
	$(RCPCONV) verify demo-out/demo.rcp
	$(RCP_RUN) demo-out/demo.rcp --prompt "It was a cold morning, and" --max-tokens 64 --seed 1
	$(RCPCONV) eval --runs demo-out/runs --rcp demo-out/demo.rcp

test: $(READY)
	$(PY) -m pytest --numprocesses $(WORKERS)

test-slow: $(READY)
	$(PY) -m pytest -m "slow and not gpu" --numprocesses $(WORKERS) --timeout 3600

test-gpu: $(READY)
	$(PY) -m pytest -m gpu --numprocesses $(WORKERS) --timeout 1200

check: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -c 'from importlinter.cli import lint_imports_command; lint_imports_command(["--no-logo"])'

format: $(READY)
	$(PY) -m ruff check --fix-only --quiet .
	$(PY) -m ruff format .

clean:
	rm -rf build dist *.egg-info demo-out .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find rcpconv formats runtime tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
