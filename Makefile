# Everything runs from .venv, which `setup` makes. PIP_FLAGS goes to pip as it is.
PYTHON ?= python3.11
PIP_FLAGS ?=
BENCH_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DISK_NEEDED_MB := 6000

.PHONY: setup demo up test test-unit check fmt bench outage clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
		echo 'raylora needs Python 3.11, and "$(PYTHON)" is not one. Install it (Debian, Ubuntu: python3.11 python3.11-venv;'; \
		echo 'macOS: brew install python@3.11), or name yours: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)'; exit 1; }
	@free=$$(df -Pm . | awk 'NR==2 {print $$4}'); test "$$free" -ge $(DISK_NEEDED_MB) || { \
		echo "The installation needs $(DISK_NEEDED_MB) MB of disk and $$free MB are free here."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo 'The virtual environment could not be made. Debian, Ubuntu: apt install python3.11-venv'; exit 1; }
	@echo 'installing into $(VENV); the first time takes some minutes'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]' || { \
		echo 'The installation failed. Is there a network, or a proxy that pip must be told of? Run it again when it is up:'; \
		echo 'what was downloaded is kept.'; exit 1; }
	@touch $@

demo: setup
	@exec $(BIN)/raylora demo

up: setup
	@exec $(BIN)/raylora up

# The integration tests start whole instances and take turns; the others share the cores.
test: test-unit
	$(BIN)/python -m pytest tests/integration

test-unit: setup
	$(BIN)/python -m pytest tests --ignore=tests/integration --numprocesses logical --maxprocesses 4 --dist loadfile

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks/*.py
	$(BIN)/lint-imports

fmt: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-%: setup
	$(BIN)/python benchmarks/bench_$*.py $(BENCH_ARGS)

outage: setup
	$(BIN)/python benchmarks/outage.py $(BENCH_ARGS)

bench: setup
	@set -e; for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script; done

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache demo-result
