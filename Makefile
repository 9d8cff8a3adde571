# Everything runs in a virtual environment of its own, .venv; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
TESTS := $(wildcard tests/test_*.py tests/*/test_*.py)
# Files with a process of their own: clusters, forks and memory peaks of one do not touch the next.  The longest come
# first, so that no single one is left running at the end.
ALONE := $(wildcard $(addprefix tests/, storage/test_s3.py engine/test_failures.py engine/test_memory.py \
	engine/test_engine.py test_benchmarks.py test_pages_training.py test_pages.py test_week.py sae/test_sae_store.py \
	sae/test_sae_train.py sae/test_sae_ranks.py sae/test_sae_cli.py sae/test_sae_page.py sae/test_sae_checkpoint.py \
	products/test_interactions.py building/test_collect.py engine/test_types.py engine/test_tier.py \
	engine/test_gather.py engine/test_hosts.py features/test_features_runs.py features/test_features_product.py \
	jobs/test_folder.py jobs/test_locks.py checking/test_stats.py test_machine.py test_half_done.py))
# Stores of tests lie in memory where it has room: most tests make and remove thousands of small files, for which a disk
# takes several times as long.  Tests of disks, their page cache and memory stay on a disk; IN_MEMORY= keeps all there.
IN_MEMORY ?= $(shell test "$$(df -k --output=avail /dev/shm 2>/dev/null | tail -n 1)" -gt 4000000 && echo /dev/shm)
TEMPROOT := $(IN_MEMORY:%=PYTEST_DEBUG_TEMPROOT=%)
ON_DISK := tests/loading tests/storage $(wildcard tests/loading/test_*.py) \
	tests/storage/test_objects.py tests/storage/test_reading.py tests/test_benchmarks.py tests/checking/test_stats.py \
	tests/engine/test_gather.py tests/engine/test_memory.py tests/engine/test_tier.py
# The inner loop: rules, names and arithmetic, which need no store, and the stores that earlier versions wrote.
FAST := tests/test_layout.py tests/test_public_api.py tests/test_docs.py tests/test_units.py \
	tests/ordering/test_keys.py tests/ordering/test_partition.py tests/ordering/test_bounds.py \
	tests/ordering/test_digest.py tests/planning/test_planner.py tests/arrays/test_format.py
# The others share a process with their room, which imports, compiles and starts a cluster once.
REST := $(filter-out $(ALONE) $(FAST),$(TESTS))
ROOMS := $(sort $(patsubst %/,%,$(dir $(REST))))
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo demo-steer check fast test lint soak dist clean $(TESTS) $(ROOMS)

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
	@$(MAKE) --no-print-directory --jobs=$(JOBS) --output-sync --keep-going $(ROOMS) $(ALONE) fast

# A thread each: those of torch in two processes wait for each other.
$(TESTS) $(ROOMS) fast: export OMP_NUM_THREADS = 1
$(TESTS): FILES = $@
$(ROOMS): FILES = $(filter $(wildcard $@/test_*.py),$(REST))
$(TESTS) $(ROOMS): $(VENV)/test.done
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

$(VENV)/test.done: setup.cfg constraints.txt | $(BIN)/python
	$(PIP) --editable '.[test]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
