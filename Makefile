.DEFAULT_GOAL := help

# The newest supported Python on the path; `make PYTHON=/path/to/python3.12 ...` chooses another.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.14 python3.11 python3 python; do \
	$$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
SERVE := $(VENV)/.serve-$(shell cksum requirements.lock pyproject.toml | cksum | cut -d' ' -f1)
DEV := $(VENV)/.dev-$(shell cksum requirements-dev.lock pyproject.toml | cksum | cut -d' ' -f1)

# The tests wait for processes more than they compute, so more of them at once than there are cores.
TEST_PROCESSES ?= 3

# What is told when no Python fits: how to get one on each system.
NO_PYTHON = "Python 3.11 to 3.14 is needed, with its venv module. On the path is: $$(python3 --version 2>&1)." \
	"  macOS with Homebrew:  brew install python@3.13" \
	"  macOS without:        the installer at https://www.python.org/downloads/" \
	"  Debian, Ubuntu:       sudo apt install python3 python3-venv" \
	"  any, with uv:         uv venv --seed --python 3.13 $(VENV)" \
	"Then the same make again. PYTHON=/path/to/python3.13 names one that is elsewhere."

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "%-14s %s\n", $$1, $$2}'

# An Intel Python on Apple Silicon has no MLX and no ONNX Runtime to install: say so before pip does.
$(BIN)/python:
	@test -n "$(PYTHON)" || { printf '%s\n' $(NO_PYTHON); exit 1; }
	@$(PYTHON) scripts/check_python.py
	$(PYTHON) -m venv $(VENV)

$(SERVE): | $(BIN)/python
	@echo "Installing what the service needs into $(VENV) (once, a few minutes)"
	@$(PIP) install --require-hashes -r requirements.lock
	@$(PIP) --quiet install --no-deps --no-build-isolation -e .
	@touch $@

$(DEV): | $(BIN)/python
	@echo "Installing the service and the development tools (once, a few minutes)"
	@$(PIP) install --require-hashes -r requirements-dev.lock
	@$(PIP) --quiet install --no-deps --no-build-isolation -e .
	@touch $@

setup: $(SERVE)  ## Create .venv with what the service needs

serve: $(SERVE)  ## Start the service on port 3003
	@$(BIN)/immich-ml-metal serve

demo: $(SERVE)  ## Show what every task answers for a picture drawn by the project
	@$(BIN)/immich-ml-metal demo

bench: $(SERVE)  ## Measure the service against the raw engine, in one run
	@$(BIN)/immich-ml-metal bench

test: $(DEV)  ## Run the tests
	@$(BIN)/coverage run -m pytest -n $(TEST_PROCESSES) --dist worksteal -m "not soak and not apple"
	@$(BIN)/coverage report

check: $(DEV)  ## Check format, lint, types and the macOS dependency set; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python scripts/resolve_macos.py

fmt: $(DEV)  ## Format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

soak: $(DEV)  ## Run the long tests: kills, restarts, downloads cut at random, attacks (about an hour)
	$(BIN)/pytest -m soak

mutants: $(DEV)  ## Plant small faults (ROOM=tasks N=30 SEED=0) and list those that no test notices
	@$(BIN)/python scripts/mutants.py $(if $(ROOM),--room $(ROOM)) -n $(or $(N),30) --seed $(or $(SEED),0)

apple: $(DEV)  ## Run the tests that need a Mac with Apple Silicon; ends with a report to share
	$(BIN)/pytest -m apple

release-check: $(DEV)  ## Do all of a release but the publishing: build, look inside, install, try
	@$(BIN)/python scripts/release_check.py

try-install: $(DEV)  ## Try the README's lines in an empty Debian (root, debootstrap; 5 minutes)
	$(BIN)/python scripts/try_install.py

run-docs: $(DEV)  ## Run every command of the pages as written, in a scene of its own (Linux)
	$(BIN)/python scripts/run_docs.py

lock: $(DEV)  ## Resolve the dependencies again and write the locks
	$(BIN)/python scripts/lock.py

reference: $(DEV)  ## Write docs/reference.md from the code
	$(BIN)/python scripts/make_reference.py

pictures: $(DEV)  ## Photograph the page and the commands for README and docs, with Chromium
	$(BIN)/python scripts/make_pictures.py
	$(BIN)/python scripts/make_terminal_pictures.py

.PHONY: help setup serve demo bench test check fmt soak mutants apple release-check try-install \
	run-docs lock reference pictures
