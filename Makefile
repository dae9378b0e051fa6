# make demo   fine-tune the embedded model with vanilla, LoRA and subquad, and compare
# make test   the default test suite (offline, CPU)
# Both set themselves up: a virtual environment in .venv with the tested versions.
# make test-oldest   the same tests with the oldest supported versions, in .venv-oldest

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# A CPU build where that index can be reached, else what the configured index has.
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
PYTHON_OLDEST ?= python3.10
CONSTRAINTS ?= constraints.txt
EXTRAS ?= recipes,plots,tests,trl,quality
BIN := $(VENV)/bin
# A worker for each core, with one thread each: threads of several processes would wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile
READY := $(VENV)/.ready

.PHONY: demo test test-slow test-oldest lint setup clean

demo: $(READY)
	$(BIN)/python scripts/demo.py

test: $(READY)
	$(PYTEST)

test-slow: $(READY)
	$(PYTEST) -m slow

test-oldest:
	$(MAKE) test PYTHON=$(PYTHON_OLDEST) VENV=.venv-oldest TORCH=torch==2.6.0 \
		CONSTRAINTS=constraints-oldest.txt EXTRAS=recipes,plots,tests

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(READY)

$(READY): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null \
		|| $(BIN)/pip install -q --retries 0 --timeout 20 --index-url $(CPU_INDEX) $(TORCH) 2>/dev/null \
		|| $(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -c $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	touch $(READY)

clean:
	rm -rf $(VENV) .venv-oldest demo_output
