# The two commands are `make demo` and `make test`; each needs only Python 3.10+ on a fresh machine.
PYTHON ?= python3
DATA ?= ../shared/data
BIN := .venv/bin
STAMP := .venv/.installed
WORKERS ?= 2
# seconds that one test may take
TEST_TIMEOUT ?= 240

# ---- what `make demo` runs: edit here -----------------------------------------------------------------------------
DEMO_METHODS := fp32,int8,fp8,luq,psq,lsq,pact,dorefa,twn
DEMO_FLAGS := --data digits --out runs/demo --open-report no

.PHONY: help demo test lint docs slow tables clean .venv

help:
	@echo "make demo    FP32 and eight methods on the embedded digits: a table and runs/demo/report.html"
	@echo "make test    lint, types and the whole test suite"
	@echo "make slow    the slow tests, on the real data of DATA=$(DATA)"
	@echo "make lint | docs | tables | clean"

.venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "lowbit needs Python 3.10 or newer; say which: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt -e ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/lowbit compare --methods $(DEMO_METHODS) $(DEMO_FLAGS)

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" --timeout $(TEST_TIMEOUT)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	$(BIN)/mypy src/lowbit
	$(BIN)/lowbit tables --check

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --data $(DATA)

# the tables of README.md and docs/ from results/*.json and the registry
tables: $(STAMP)
	$(BIN)/lowbit tables

clean:
	rm -rf .venv build dist site runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -rf src/*.egg-info src/lowbit/_C*.so src/lowbit/_build_info.json
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
