# Everything runs in a virtual environment of its own, .venv; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
TESTS := $(wildcard tests/test_*.py tests/*/test_*.py)
# The inner loop: rules, names and arithmetic, which need no store, and the stores that earlier versions wrote.
FAST := tests/test_layout.py tests/test_public_api.py tests/test_docs.py tests/test_units.py \
	tests/ordering/test_keys.py tests/ordering/test_partition.py tests/ordering/test_bounds.py \
	tests/ordering/test_digest.py tests/planning/test_planner.py tests/arrays/test_format.py
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo check fast test lint soak dist clean $(TESTS)

demo: $(VENV)/demo.done       ## shuffle a real model's activations, verify, show the difference, train an SAE from them
	$(BIN)/python examples/shuffle_minilm.py
	$(BIN)/python examples/train_minilm.py

check: $(VENV)/test.done      ## the inner loop, under 20 s: lint, and the fast tests beside it
	@$(MAKE) --no-print-directory --jobs=2 --output-sync --keep-going lint fast

fast: $(VENV)/test.done
	$(BIN)/python -m pytest --quiet $(FAST)

# A process for each file, two at a time: clusters, forks and memory peaks of one do not touch the next.
test: $(VENV)/test.done       ## the test suite
	@$(MAKE) --no-print-directory --jobs=$(JOBS) --output-sync --keep-going $(TESTS)

$(TESTS): $(VENV)/test.done
	@echo $@ && $(BIN)/python -m pytest --quiet $@

lint: $(VENV)/test.done       ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: $(VENV)/test.done       ## the long campaigns: hundreds of kills, thousands of seeds
	$(BIN)/python -m pytest -m soak

dist: $(VENV)/test.done       ## wheel and sdist, tried on every supported Python of this machine
	$(BIN)/python tests/release.py

clean:
	rm -rf $(VENV) demo dist

$(VENV)/demo.done: setup.cfg constraints.txt | $(BIN)/python
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/test.done: setup.cfg constraints.txt | $(BIN)/python
	$(PIP) --editable '.[test]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
