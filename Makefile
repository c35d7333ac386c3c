# make demo   set up and run the main job            make test   set up and pass the tests
# make check  lint, types, tests, docs, packaging    make bench  the op benchmarks       make gpu  every GPU check
PYTHON ?= python3
VENV   ?= .venv
# A tested CPU build where the index offers one; override for CUDA, e.g. make demo TORCH='torch>=2.10'.
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
EXTRAS ?= test

.PHONY: demo test fast check lint types docs packaging bench gpu clean

demo: $(VENV)/.ready-demo
	$(BIN)/mmkernels demo --out out

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n auto --dist worksteal

fast: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

check: $(VENV)/.ready-dev lint types test docs packaging

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready-dev
	$(BIN)/mypy

docs: $(VENV)/.ready-dev
	$(BIN)/mkdocs build --strict --quiet

packaging: $(VENV)/.ready-dev
	$(BIN)/python -m pytest tests/packaging -q

bench: $(VENV)/.ready-test
	$(BIN)/python -m pytest benchmarks/ops --benchmark-only --benchmark-columns=median,iqr,rounds

gpu: $(VENV)/.ready-test
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m pytest tests/triton -m "not gpu"
	$(BIN)/python -m pytest benchmarks/ops --benchmark-only -m gpu

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first, so that nothing newer is fetched; the last step compiles the native library now rather than at first use.
$(VENV)/.ready-%: pyproject.toml setup.py CMakeLists.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[$*]"
	$(BIN)/mmkernels info --build
	@touch $@

clean:
	rm -rf build dist site out *.egg-info
