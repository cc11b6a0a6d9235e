# Two commands for people: `make demo` and `make test`. Each makes its own environment from the pinned constraints.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow test-network lint clean

demo: $(READY)
	$(BIN)/llmx export examples/tiny-qwen3 --format gguf --bits 4 -o demo-output --force

test: $(READY)
	$(BIN)/pytest

test-slow: $(READY)
	$(BIN)/pytest -m slow

test-network: $(READY)
	$(BIN)/pytest -m network

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# torch is installed first and by itself: asked for by another package, its CUDA build would come.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[llamacpp,dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build demo-output *.egg-info
