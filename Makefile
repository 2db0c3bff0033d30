# make demo        creates .venv, and trains a tiny model on real clips
# make test        creates .venv, and runs the tests
# make test-newest runs the tests with the newest packages that requirements.txt allows, in .venv-newest
# make test-gpu    runs the tests that need a GPU
# make test-long   runs the slowest tests, which take about an hour and kill runs at every moment
# make chaos       injects every fault of docs/faults.md and prints a table; takes under an hour on two cores
# make mutants     makes one line of the library wrong at a time, and checks that the tests fail
# make quality     checks style and types
# make image       executes the steps of the Dockerfile in a clean Debian root, without Docker; as root with debootstrap
# make bench       measures full-size models on the GPUs of this machine; continues where it was stopped
# make fuzz        reads 500 damaged media files and 500 damaged lists; make test has a short form of it
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 3
PACKAGES := -r requirements.txt -c constraints.txt
# Tests start many processes, each of which would otherwise compile every module again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-newest test-gpu test-long chaos mutants quality image bench fuzz clean
.DEFAULT_GOAL := demo

$(VENV)/ready: requirements.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PACKAGES)
	$(BIN)/python -m compileall -q training
	touch $@

demo: $(VENV)/ready
	PYTHON=$(BIN)/python bash examples/demo.sh

test: $(VENV)/ready
	$(BIN)/python -m pytest -m "not gpu and not long" -n $(WORKERS) --dist worksteal

test-newest:
	rm -f .venv-newest/ready
	$(MAKE) test VENV=.venv-newest PACKAGES='-r requirements.txt --upgrade --upgrade-strategy eager'

test-gpu: $(VENV)/ready
	COGVIDEOX_TEST_GPU=1 $(BIN)/python -m pytest -m "gpu and not timed" -n 4 --dist worksteal
	COGVIDEOX_TEST_GPU=1 $(BIN)/python -m pytest -m "gpu and timed"

test-long: $(VENV)/ready
	$(BIN)/python -m pytest -m "long and not gpu" -n $(WORKERS) --dist worksteal

chaos: $(VENV)/ready
	$(BIN)/python tests/tools/chaos.py --workers $(WORKERS)

mutants: $(VENV)/ready
	$(BIN)/python tests/tools/mutants.py --jobs $(WORKERS)

quality: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

image: $(VENV)/ready
	$(BIN)/python tests/tools/image_steps.py

bench: $(VENV)/ready
	$(BIN)/python benchmarks/measure_all.py; status=$$?; $(BIN)/python benchmarks/bench.py --table; exit $$status

fuzz: $(VENV)/ready
	$(BIN)/python tests/tools/fuzz_media.py --count 500
	$(BIN)/python tests/tools/fuzz_index.py --count 500

clean:
	rm -rf demo runs .cache .mypy_cache .ruff_cache
