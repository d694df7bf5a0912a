# Each target makes the environment that it needs. PYTHON: the interpreter to make it with (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint conformance fuzz bench clean

# The main job: train a small real pair, compress, inspect, verify, apply, measure. Offline.
demo: $(INSTALLED)
	$(BIN)/peraxis-tools demo

test: $(INSTALLED) lint
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Our reader, the C and the JavaScript loader pass every case; every deliberately wrong loader fails.
conformance: $(INSTALLED)
	$(BIN)/python -m pytest tests/conformance -q

fuzz: $(INSTALLED)
	$(BIN)/python tests/conformance/fuzz_reader.py

bench: $(INSTALLED)
	$(BIN)/python benchmarks/apply_cpu.py
	$(BIN)/python benchmarks/streaming.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[tools,plot,sign,test,lint]'
	touch $@

clean:
	rm -rf $(VENV) .demo build dist *.egg-info
