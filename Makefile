# Two commands on a fresh machine: `make demo` and `make test`. Python >= 3.11 is all they need.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo hack-demo test check format install interop clean

demo: $(VENV)/installed
	$(BIN)/operando demo

hack-demo: $(VENV)/installed
	$(BIN)/operando demo --hack

test: $(VENV)/installed-dev check
	$(PYTEST)

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(VENV)/installed-dev

# Parity with TRL and verl, in an environment of its own; writes docs/parity.md.
interop: .venv-interop/installed
	.venv-interop/bin/python -m pytest tests/interop -o addopts=""
	.venv-interop/bin/python tests/interop/parity_table.py

$(VENV)/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; set PYTHON=/path/to/it"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/installed

.venv-interop/installed: pyproject.toml constraints.txt tests/interop/requirements.txt
	$(PYTHON) -m venv .venv-interop
	.venv-interop/bin/python -m pip install -q -c constraints.txt -r tests/interop/requirements.txt
	.venv-interop/bin/python -m pip install -q --no-deps verl==0.9.1
	.venv-interop/bin/python -m pip install -q -c constraints.txt -e .
	touch $@

clean:
	rm -rf $(VENV) .venv-interop build dist
