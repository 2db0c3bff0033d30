# make demo: set up and run the main job on real clips.   make test: set up and pass the tests.
# make test-gpu: the tests that need a GPU.   make test-long: those that take an hour, kills at every moment.
# make chaos: injects every fault that docs/faults.md lists, and prints a table; under an hour on two cores.
# make mutants: makes one line of the core wrong at a time, and sees that the tests notice.
# make bench: on a GPU, train steps of full-size models, stock and ours; goes on where it was stopped.
# make fuzz: 500 damaged media files and 500 damaged lists; a short form is among the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 3

.PHONY: demo test test-gpu test-long chaos mutants quality bench fuzz clean
.DEFAULT_GOAL := demo

$(VENV)/ready: requirements.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@

demo: $(VENV)/ready
	PYTHON=$(BIN)/python bash examples/demo.sh

test: $(VENV)/ready
	$(BIN)/python -m pytest -m "not gpu and not long" -n $(WORKERS) --dist loadgroup

test-gpu: $(VENV)/ready
	COGVIDEOX_TEST_GPU=1 $(BIN)/python -m pytest -m gpu

test-long: $(VENV)/ready
	$(BIN)/python -m pytest -m "long and not gpu" -n $(WORKERS) --dist loadgroup

chaos: $(VENV)/ready
	$(BIN)/python tests/tools/chaos.py --workers $(WORKERS)

mutants: $(VENV)/ready
	$(BIN)/python tests/tools/mutants.py --jobs $(WORKERS)

quality: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/ready
	$(BIN)/python benchmarks/bench.py --all; status=$$?; $(BIN)/python benchmarks/bench.py --table; exit $$status

fuzz: $(VENV)/ready
	$(BIN)/python tests/tools/fuzz_media.py --count 500
	$(BIN)/python tests/tools/fuzz_index.py --count 500

clean:
	rm -rf demo runs .mypy_cache .ruff_cache
