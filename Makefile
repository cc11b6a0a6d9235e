# Two commands for people: `make demo` and `make test`. Each makes its own environment from the pinned constraints.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TESTABLE := $(VENV)/.testable
AUDIT := $(VENV)/audit
INSTALL := $(BIN)/pip install --quiet --constraint constraints.txt

.PHONY: demo test test-slow test-network lint audit sbom clean

demo: $(READY)
	$(BIN)/llmx export examples/tiny-qwen3 --format gguf --bits 4 -o demo-output --force

test: $(TESTABLE)
	$(BIN)/pytest -n auto --dist worksteal

test-slow: $(TESTABLE)
	$(BIN)/pytest -m slow

test-network: $(TESTABLE)
	$(BIN)/pytest -m network

lint: $(TESTABLE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# Known vulnerabilities of the pinned packages; without a network it says "not run" and exits with 7.
audit: $(AUDIT)/.ready
	$(AUDIT)/bin/python .ci/audit.py

# sbom.json: what the environment holds, as CycloneDX has it.
sbom: $(AUDIT)/.ready $(READY)
	$(AUDIT)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file sbom.json $(BIN)/python

# torch is installed first and by itself: asked for by another package, its CUDA build would come.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) --editable '.[llamacpp]'
	touch $(READY)

$(TESTABLE): $(READY)
	$(INSTALL) --editable '.[llamacpp,onnx,tensorrt-rtx,dev]'
	touch $(TESTABLE)

# Tools apart from what they look at.
$(AUDIT)/.ready: constraints.txt
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/pip install --quiet --constraint constraints.txt pip-audit cyclonedx-bom
	touch $(AUDIT)/.ready

clean:
	rm -rf $(VENV) build demo-output *.egg-info
