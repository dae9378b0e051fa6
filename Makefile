# make demo   fine-tune the embedded model with vanilla, LoRA and subquad, and compare
# make test   the default test suite (offline, CPU)
# Both set themselves up: a virtual environment in .venv with the tested versions.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# A CPU build where that index can be reached, else what the configured index has.
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow lint setup clean

demo: $(READY)
	$(BIN)/python scripts/demo.py

test: $(READY)
	$(BIN)/python -m pytest -q

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null \
		|| $(BIN)/pip install -q --retries 0 --timeout 20 --index-url $(CPU_INDEX) $(TORCH) 2>/dev/null \
		|| $(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -c constraints.txt -e ".[recipes,plots,tests,quality]"
	touch $(READY)

clean:
	rm -rf $(VENV) demo_output
