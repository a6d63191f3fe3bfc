# `make demo` and `make test` set everything up themselves; nothing outside this folder changes but caches.

PYTHON ?= python3
VENV := .venv
# Windows puts a virtual environment's programs elsewhere.
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
READY := $(VENV)/.ready
BROWSER_READY := $(VENV)/.browser-ready
# The embedded model is too small to gain from more threads, and equal pictures need an equal number of them.
THREADS ?= 2
export OMP_NUM_THREADS ?= $(THREADS)
# Tests compute with one thread each; a file's tests stay together, for what they share.
TEST_PROCESSES ?= 2

.PHONY: help setup demo test test-slow test-browser test-fuzz test-faults lint subjects app clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort

setup: $(READY)  ## virtual environment with the tested versions

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[app,dev]"
	@touch $@

demo: setup  ## train on the five photos in samples/, compare with the base model: outputs/demo/grid.png
	$(BIN)/svft-diffusion demo --photos samples --output_dir outputs/demo

test: setup lint  ## ruff, mypy and the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not browser" -n $(TEST_PROCESSES) --dist loadfile

test-slow: setup  ## the tests that take minutes
	$(BIN)/python -m pytest -m "slow and not browser"

test-browser: $(BROWSER_READY)  ## the web app in headless Chromium: what visitors see and do
	REQUIRE_BROWSER=1 $(BIN)/python -m pytest -m browser tests/browser

# The system's Chromium where there is one, otherwise Playwright's own.
$(BROWSER_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[browser-tests]"
	for name in chromium chromium-browser google-chrome; do command -v $$name && break; done \
		|| $(BIN)/python -m playwright install chromium
	@touch $@

test-fuzz: setup  ## every damaged and hostile adapter file that the tests can make
	$(BIN)/python -m pytest tests/test_file_fuzz.py

test-faults: setup  ## runs that are killed, stopped or whose disk fails, at every moment (about half an hour)
	$(BIN)/python -m pytest tests/test_faults.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

subjects: setup  ## the measured claim of the README: eight held-out subjects, base against adapter (about 20 minutes)
	$(BIN)/python benchmarks/subjects.py --output_dir outputs/subjects

app: setup  ## the web app on the embedded model
	$(BIN)/python app.py

clean:  ## remove the virtual environment and caches, keep outputs
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
