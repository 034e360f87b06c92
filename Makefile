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

# what the sanitizers' run-time library needs before anything else is loaded (GCC's: `make asan` is not for Clang)
ASAN_PRELOAD = $(shell $(CXX) -print-file-name=libasan.so):$(shell $(CXX) -print-file-name=libstdc++.so)
ASAN_FUZZ ?= 5000
# `make cross`: another processor's compiler, and what runs its programs here
CROSS_CXX ?= aarch64-linux-gnu-g++
CROSS_RUN ?= qemu-aarch64
# `make wheel-check PY=...`: the Python that installs the wheel
PY ?= python3.12

.PHONY: help demo test lint docs slow bench asan cross wheel wheel-check tables clean .venv

help:
	@echo "make demo    FP32 and eight methods on the embedded digits: a table and runs/demo/report.html"
	@echo "make test    lint, types and the whole test suite"
	@echo "make slow    the slow tests, on the real data of DATA=$(DATA)"
	@echo "make bench   the speed table into results/speed.json and docs/speed.md, minutes"
	@echo "make asan    the kernels' tests under the address and undefined-behaviour sanitizers"
	@echo "make cross   the kernels compiled for aarch64, and run there by an emulator"
	@echo "make wheel   dist/lowbit-*.whl;  make wheel-check PY=python3.12 tries it in a fresh environment"
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

bench: $(STAMP)
	set -e; for row in $$($(BIN)/python -c "from lowbit.lab.speed import ROWS; print(*ROWS)"); do \
	  $(BIN)/lowbit bench --rows $$row --save results/speed.json; done
	$(BIN)/lowbit tables

# a build of its own in build/asan; the one that is installed stays. Memory that lives until the process ends is no leak
# in Python, hence detect_leaks=0.
asan: $(STAMP)
	rm -rf build/asan
	$(BIN)/python setup.py -q build --build-lib build/asan/lib --build-temp build/asan/objects build_ext --sanitize
	PYTHONPATH=build/asan/lib LD_PRELOAD=$(ASAN_PRELOAD) ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -s -p no:cacheprovider \
	  tests/ops tests/test_fuzz.py --fuzz $(ASAN_FUZZ)

# objects only, since PyTorch for the other processor is not here; then the portable kernels without PyTorch, whose
# results must be this machine's
cross: $(STAMP)
	@command -v $(CROSS_CXX) > /dev/null || \
	  { echo "no $(CROSS_CXX): on Debian or Ubuntu apt install g++-aarch64-linux-gnu qemu-user"; exit 1; }
	rm -rf build/cross && mkdir -p build/cross
	$(BIN)/python -c "$$KERNEL_FLAGS" > build/cross/flags
	@for source in csrc/*.cpp; do echo $$source; \
	  $(CROSS_CXX) @build/cross/flags -c $$source -o build/cross/$$(basename $$source .cpp).o || exit 1; done
	@if ! command -v $(CROSS_RUN) > /dev/null; then echo "compiled, not run: there is no $(CROSS_RUN)"; exit; fi; set -e; \
	  $(CROSS_CXX) @build/cross/flags -static tests/ops/portable.cpp build/cross/kernels_portable.o -o build/cross/there; \
	  $(CXX) @build/cross/flags tests/ops/portable.cpp csrc/kernels_portable.cpp -o build/cross/here; \
	  build/cross/here > build/cross/here.txt; \
	  $(CROSS_RUN) build/cross/there | diff build/cross/here.txt -; \
	  echo "the same results on both processors"

# those of the installed library
define KERNEL_FLAGS
import json, pathlib
from torch.utils.cpp_extension import include_paths
info = json.loads(pathlib.Path("src/lowbit/_build_info.json").read_text())
print(*info["flags"], "-fPIC -Icsrc", *(f"-I{folder}" for folder in include_paths()))
endef
export KERNEL_FLAGS

wheel: $(STAMP)
	rm -rf dist build/lib.* build/bdist.*
	$(BIN)/python -m build --wheel --no-isolation

# torch for another Python is downloaded, with what it depends on
wheel-check: wheel
	rm -rf build/wheel-check
	$(PY) -m venv build/wheel-check
	build/wheel-check/bin/python -m pip install -q -c constraints.txt torch numpy dist/lowbit-*.whl
	cd build/wheel-check && bin/python -c "$$WHEEL_CHECK"

define WHEEL_CHECK
import sys, torch, lowbit
from lowbit.ops.chunked import chunked_mm
from lowbit.rng import uniform
model = lowbit.apply(torch.nn.Linear(64, 8), lowbit.create("int8"))
model(uniform((4, 64))).sum().backward()
assert chunked_mm(torch.ones(1, 4096), torch.ones(4096, 1)).item() == 4096
assert model.weight.grad.isfinite().all()
print(lowbit.__file__, "Python", sys.version.split()[0], "PyTorch", torch.__version__)
for row in lowbit.backends():
    print(row.operator, row.device, row.implementation, "active" if row.active else row.reason, sep=" | ")
assert all(row.active for row in lowbit.backends() if row.implementation.startswith("C++"))
endef
export WHEEL_CHECK

# the tables of README.md and docs/ from results/*.json and the registry
tables: $(STAMP)
	$(BIN)/lowbit tables

clean:
	rm -rf .venv build dist site runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -rf src/*.egg-info src/lowbit/_C*.so src/lowbit/_build_info.json
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
