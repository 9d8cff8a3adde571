# Everything runs in a virtual environment of its own, .venv; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Twice as many as there are processors, usually: some tests wait for timers and for other processes.
JOBS ?= 4
TESTS := $(wildcard tests/test_*.py tests/*/test_*.py)
# The inner loop: rules, names and arithmetic, which need no store, and the stores that earlier versions wrote.
FAST := tests/test_layout.py tests/test_public_api.py tests/test_docs.py tests/test_units.py \
	tests/ordering/test_keys.py tests/ordering/test_partition.py tests/ordering/test_digest.py tests/arrays/test_format.py
# Files that share a process, which imports, compiles and starts a cluster once.  Those that fork, kill, or measure
# memory stay apart from long ones; the longest come first, so that no single one is left running at the end.
GROUPS := sae engine disk failures s3 pages rest benchmarks building features page
files-s3 := tests/storage/test_s3.py
files-failures := tests/engine/test_failures.py tests/engine/test_hosts.py
files-benchmarks := tests/test_benchmarks.py
files-page := tests/sae/test_sae_checkpoint.py tests/sae/test_sae_page.py
files-disk := $(addprefix tests/engine/test_, memory.py gather.py) tests/checking/test_stats.py \
	$(filter-out $(files-s3),$(wildcard $(addsuffix /test_*.py, tests/loading tests/storage)))
files-sae := $(filter-out $(files-page),$(wildcard tests/sae/test_*.py))
files-engine := $(filter-out $(files-failures) $(files-disk),$(wildcard tests/engine/test_*.py tests/jobs/test_*.py))
files-building := $(wildcard tests/building/test_*.py)
files-features := $(wildcard tests/features/test_*.py tests/products/test_*.py)
files-pages := $(filter-out $(FAST) $(files-benchmarks),$(wildcard tests/test_*.py))
files-rest := $(filter-out $(FAST) $(foreach group,$(filter-out rest,$(GROUPS)),$(files-$(group))),$(TESTS))
# Stores of tests lie in memory where it has room: most tests make and remove thousands of small files, for which a disk
# takes several times as long.  Tests of disks, their page cache and memory stay on a disk; IN_MEMORY= keeps all there.
IN_MEMORY ?= $(shell test "$$(df -k --output=avail /dev/shm 2>/dev/null | tail -n 1)" -gt 4000000 && echo /dev/shm)
TEMPROOT := $(IN_MEMORY:%=PYTEST_DEBUG_TEMPROOT=%)
ON_DISK := test-disk test-benchmarks $(files-disk) $(files-benchmarks)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo demo-steer check fast test lint soak dist clean $(TESTS) $(GROUPS:%=test-%)

demo: $(VENV)/demo.done       ## shuffle a real model's activations, verify, show the difference, train an SAE from them
	$(BIN)/python examples/shuffle_minilm.py
	$(BIN)/python examples/train_minilm.py

demo-steer: $(VENV)/steer.done ## a feature of a real language model, found by a rule, turned up while it talks
	$(BIN)/python examples/steer_smollm2.py

check: $(VENV)/test.done      ## the inner loop, under 20 s: lint, and the fast tests beside it
	@$(MAKE) --no-print-directory --jobs=2 --output-sync --keep-going lint fast

fast: $(VENV)/test.done
	$(TEMPROOT) $(BIN)/python -m pytest --quiet $(FAST)

test: $(VENV)/test.done       ## the test suite
	@$(MAKE) --no-print-directory --jobs=$(JOBS) --output-sync --keep-going $(GROUPS:%=test-%) fast

# A thread each: those of torch in two processes wait for each other.
$(TESTS) $(GROUPS:%=test-%) fast: export OMP_NUM_THREADS = 1
# Hundreds of processes import what one has compiled, also where the environment forbids to keep that.
$(TESTS) $(GROUPS:%=test-%) fast: export PYTHONDONTWRITEBYTECODE =
$(TESTS): FILES = $@
$(GROUPS:%=test-%): FILES = $(files-$(@:test-%=%))
$(TESTS) $(GROUPS:%=test-%): $(VENV)/test.done
	@echo $@ && $(if $(filter $(ON_DISK),$@),,$(TEMPROOT)) $(BIN)/python -m pytest --quiet $(FILES)

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

$(VENV)/steer.done: setup.cfg constraints.txt | $(BIN)/python
	$(PIP) --editable '.[demo-steer]'
	touch $@

# Of twenty thousand modules the tests import a quarter, and keep those compiled (PYTHONDONTWRITEBYTECODE above).
$(VENV)/test.done: setup.cfg constraints.txt | $(BIN)/python
	$(PIP) --no-compile --editable '.[test]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
