# Two commands on a fresh machine: `make demo` and `make test`. Python >= 3.11 is all they need.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
ON_TWO_CORES := -n 2 --dist loadfile --no-loadscope-reorder -m "not alone"

.PHONY: demo hack-demo test test-newest test-lowest check format install lock interop storm gpu docs clean

demo: $(VENV)/installed
	$(BIN)/operando demo

hack-demo: $(VENV)/installed
	$(BIN)/operando demo --hack

# On two cores, file by file in the order of tests/conftest.py; then, one by one, the tests that count
# processes or seconds. Shapes and types of every call are checked in the unit tests; in the integration
# tests, which spend most of their time in the loop, they would double it.
test: $(VENV)/installed check
	$(PYTEST) $(ON_TWO_CORES) tests/unit
	$(PYTEST) $(ON_TWO_CORES) -o addopts=-q tests/integration
	$(PYTEST) -m alone

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(VENV)/installed

# Parity with TRL and verl, in an environment of its own; writes docs/parity.md.
interop: .venv-interop/installed
	.venv-interop/bin/python -m pytest tests/interop -o addopts=""
	.venv-interop/bin/python tests/interop/parity_table.py

# Every command killed at random and taken up again, some 280 times: what it leaves equals a whole run's.
# Then files from outside, damaged at random, and one of two ranks killed. At most 15 minutes.
# Longer: python -m tests.storm.loaders --seconds 180. Memory of a long run: python -m tests.storm.long
storm: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.storm.run
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.storm.loaders --seconds 8
	$(PYTEST) tests/storm

# On a machine with a GPU: tests/gpu, then sampling, a whole step and an SAE step on random weights of real
# shapes, beside their peers; writes gpu.json. On a CPU: `python benchmarks/gpu.py --tiny`.
gpu: $(VENV)/installed
	$(BIN)/python benchmarks/gpu.py

# The docs as a site, in build/site: an environment of its own with mkdocs-material. Any warning is an error.
docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

.venv-docs/installed: docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install -q -r docs/requirements.txt
	touch $@

# Every package from requirements.lock, by hash; then torch, which on a machine with CUDA brings its own.
$(VENV)/installed: pyproject.toml requirements.lock constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; set PYTHON=/path/to/it"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m pip install -q -r constraints.txt
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip check -q
	touch $@

# Pin the newest versions that pyproject.toml allows, with hashes, for all Pythons and platforms; torch and
# the CUDA packages that it brings stay out (constraints.txt says why).
lock: .venv-lock/installed
	.venv-lock/bin/uv pip compile pyproject.toml --extra dev -c constraints.txt --universal --upgrade \
		--python-version 3.11 --generate-hashes --no-annotate --no-header -q -o .venv-lock/all.txt
	{ echo "# Made by \`make lock\`: every package but torch and what CUDA it brings."; \
		awk '/^[a-z]/ { keep = !/^(torch|triton|cuda-[a-z]*|nvidia-[a-z0-9-]*)==/ } keep' .venv-lock/all.txt; } > requirements.lock

.venv-lock/installed:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install -q uv
	touch $@

# The unit suite on the newest and on the lowest versions within the bounds of pyproject.toml. NEWEST_TORCH and
# LOWEST_TORCH choose another torch within them.
NEWEST_TORCH ?= torch
LOWEST_TORCH ?= torch==2.11.0

test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install -q --upgrade '$(NEWEST_TORCH)' -e '.[dev]'
	.venv-newest/bin/python -m pip list
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest tests/unit

test-lowest: .venv-lock/installed
	$(PYTHON) -m venv .venv-lowest
	echo '$(LOWEST_TORCH)' | .venv-lock/bin/uv pip compile pyproject.toml - --extra dev --resolution lowest-direct \
		--no-annotate --no-header -q -o .venv-lock/lowest.txt
	.venv-lowest/bin/python -m pip install -q '$(LOWEST_TORCH)'
	grep -vE '^(torch|triton|cuda-[a-z]*|nvidia-[a-z0-9-]*)==' .venv-lock/lowest.txt > .venv-lock/lowest-rest.txt
	.venv-lowest/bin/python -m pip install -q --no-deps -r .venv-lock/lowest-rest.txt
	.venv-lowest/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	.venv-lowest/bin/python -m pip list
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest tests/unit

.venv-interop/installed: pyproject.toml constraints.txt tests/interop/requirements.txt
	$(PYTHON) -m venv .venv-interop
	.venv-interop/bin/python -m pip install -q -c constraints.txt -r tests/interop/requirements.txt
	.venv-interop/bin/python -m pip uninstall -q -y torchvision # of nnsight; its build on PyPI is for CUDA's torch
	.venv-interop/bin/python -m pip install -q --no-deps verl==0.9.1
	.venv-interop/bin/python -m pip install -q -c constraints.txt -e .
	touch $@

clean:
	rm -rf $(VENV) .venv-interop .venv-docs .venv-lock .venv-newest .venv-lowest build dist
