# make test   set up a virtual environment, then lint, types, and all tests
# make demo   set up, then convert a real pretrained sentence encoder and report
# make test-oldest   the tests with the oldest TensorLy that is supported
# make aot    compile every kernel for every architecture, with this Triton and with the oldest; about 25 minutes
# make notebooks     run the notebooks again, in place
# The environment is made anew whenever the files that define it change.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
DEFINITION := constraints.txt pyproject.toml setup.cfg

.PHONY: aot test test-oldest demo notebooks lint clean

# Torch first and alone: so that the constrained build is in place before any package asks for "torch".
$(VENV)/.installed: $(DEFINITION)
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install -c constraints.txt setuptools wheel
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[test]'
	touch $@

test: $(VENV)/.installed lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The same tests with the oldest TensorLy that is supported, in an environment of their own.
test-oldest:
	$(MAKE) .venv-oldest/.installed VENV=.venv-oldest
	.venv-oldest/bin/python -m pip --disable-pip-version-check -q install tensorly==0.9.0
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 -q

# What is committed says of which sources it is: a test fails when these have changed.
aot: $(VENV)/.installed
	$(BIN)/python -m benchmarks.aot --out benchmarks/aot.json
	$(MAKE) .venv-aot/.installed VENV=.venv-aot
	.venv-aot/bin/python -m pip --disable-pip-version-check -q install 'triton==3.6.0' 'numpy<2.4'
	.venv-aot/bin/python -m benchmarks.aot --out benchmarks/aot.json

demo: $(VENV)/.installed
	$(BIN)/tensorlayers demo

notebooks: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e '.[notebooks]'
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb

clean:
	rm -rf .venv .venv-oldest .venv-aot build dist *.egg-info demo-output
