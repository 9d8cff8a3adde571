# Everything runs in a virtual environment of its own, .venv; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
TESTS := $(wildcard tests/test_*.py tests/*/test_*.py)
# The longest come first, so that no single one is left running at the end.
LONGEST := $(wildcard $(addprefix tests/, engine/test_failures.py engine/test_memory.py engine/test_engine.py \
	sae/test_sae_store.py test_benchmarks.py test_pages_training.py sae/test_sae_checkpoint.py sae/test_sae_ranks.py \
	building/test_collect.py engine/test_types.py sae/test_sae_cli.py jobs/test_folder.py cli/test_cli.py arrays/test_hostile.py \
	sae/test_sae_train.py products/test_interactions.py features/test_features_runs.py \
	arrays/test_codecs.py checking/test_verify.py building/test_append.py loading/test_loader.py engine/test_gather.py \
	storage/test_s3.py engine/test_simulator.py engine/test_corruption.py engine/test_hosts.py))
# Stores of tests lie in memory where it has room: most tests make and remove thousands of small files, for which a disk
# takes several times as long.  Tests of disks, their page cache and memory stay on a disk; IN_MEMORY= keeps all there.
IN_MEMORY ?= $(shell test "$$(df -k --output=avail /dev/shm 2>/dev/null | tail -n 1)" -gt 4000000 && echo /dev/shm)
TEMPROOT := $(IN_MEMORY:%=PYTEST_DEBUG_TEMPROOT=%)
ON_DISK := $(wildcard tests/loading/test_*.py) tests/test_benchmarks.py tests/checking/test_stats.py \
	tests/engine/test_gather.py tests/engine/test_memory.py tests/engine/test_tier.py \
	tests/storage/test_objects.py tests/storage/test_reading.py
# The inner loop: rules, names and arithmetic, which need no store, and the stores that earlier versions wrote.
FAST := tests/test_layout.py tests/test_public_api.py tests/test_docs.py tests/test_units.py \
	tests/ordering/test_keys.py tests/ordering/test_partition.py tests/ordering/test_bounds.py \
	tests/ordering/test_digest.py tests/planning/test_planner.py tests/arrays/test_format.py
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo demo-steer check fast test lint soak dist clean $(TESTS)

demo: $(VENV)/demo.done       ## shuffle a real model's activations, verify, show the difference, train an SAE from them
	$(BIN)/python examples/shuffle_minilm.py
	$(BIN)/python examples/train_minilm.py

demo-steer: $(VENV)/steer.done ## a feature of a real language model, found by a rule, turned up while it talks
	$(BIN)/python examples/steer_smollm2.py

check: $(VENV)/test.done      ## the inner loop, under 20 s: lint, and the fast tests beside it
	@$(MAKE) --no-print-directory --jobs=2 --output-sync --keep-going lint fast

fast: $(VENV)/test.done
	$(TEMPROOT) $(BIN)/python -m pytest --quiet $(FAST)

# A process for each file, two at a time: clusters, forks and memory peaks of one do not touch the next.  The fast
# tests have none of these and share a process.
test: $(VENV)/test.done       ## the test suite
	@$(MAKE) --no-print-directory --jobs=$(JOBS) --output-sync --keep-going $(LONGEST) \
		$(filter-out $(LONGEST) $(FAST),$(TESTS)) fast

$(TESTS): $(VENV)/test.done
	@echo $@ && $(if $(filter $(ON_DISK),$@),,$(TEMPROOT)) $(BIN)/python -m pytest --quiet $@

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
