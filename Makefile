# Two commands do everything by themselves: `make demo` and `make test`. The rest is for people who work on wantrain.
PYTHON ?= python3
# Test processes beside each other, each with one thread and about 1.5 GB.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
CODE := wantrain tests train.py caption.py shard.py encode.py sample.py export.py doctor.py demo.py setup.py assets benchmarks \
	docs/site

.PHONY: demo docs test-quick test test-all lint format install

demo: $(STAMP)
	$(BIN)/python demo.py

# The documents as a site: site/index.html opens in a browser, without a server or a network.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Under two minutes: no process starts, nothing trains.
test-quick: $(STAMP)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --quick -m "not slow"

# About a quarter of an hour on two quiet cores.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal -m "not slow"

# All, also what takes minutes by itself.
test-all: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

install: $(STAMP)

# DS_BUILD_OPS=0: DeepSpeed builds its kernels when they are first used, not now.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)
