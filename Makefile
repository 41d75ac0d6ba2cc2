# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# One thread a process: tests run in parallel and several start processes of their own. What DeepSpeed builds stays in the
# environment: two versions would overwrite each other's, and wait for ever for a lock that a killed process left.
TEST_ENV = HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR=$(CURDIR)/$(VENV)/torch_extensions

PEERS := .venv-peers
OLDEST := .venv-oldest
AUDIT := .venv-audit

.PHONY: venv demo benchmark bench-peers test test-oldest test-oldest-distributed test-distributed test-slow test-resume test-soak fuzz audit test-browser browser lint format toy clean

venv: $(INSTALLED)

# torch goes first and pinned: an unpinned one can pull gigabytes that a laptop has no use for.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

demo: $(INSTALLED)
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m examples.interference.demo

benchmark: $(INSTALLED)
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m examples.interference.benchmark

# The peers have an environment of their own; bergson without its dependencies, which pull a torch with CUDA.
$(PEERS)/.installed: benchmarks/peers/requirements.txt benchmarks/peers/no_dependencies.txt constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(PEERS)/bin/python -m pip install --quiet --requirement benchmarks/peers/requirements.txt
	$(PEERS)/bin/python -m pip install --quiet --no-deps --requirement benchmarks/peers/no_dependencies.txt
	touch $@

bench-peers: $(PEERS)/.installed
	PYTHONPATH=. $(PEERS)/bin/python -m benchmarks.peers

toy: $(INSTALLED)
	$(BIN)/python -m examples.paper_toy

test: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest -n 2

# The quick tests on the oldest versions that pyproject.toml allows, in an environment of their own.
$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt torch
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[test]"
	touch $@

test-oldest: VENV := $(OLDEST)
test-oldest: $(OLDEST)/.installed
	$(TEST_ENV) $(OLDEST)/bin/python -m pytest -n 2

# The whole guard on DDP and ZeRO-0 to 3; all distributed tests pass there, a quarter of an hour (`-m distributed` alone).
test-oldest-distributed: VENV := $(OLDEST)
test-oldest-distributed: $(OLDEST)/.installed
	$(TEST_ENV) $(OLDEST)/bin/python -m pytest -m distributed tests/distributed/test_projection.py

test-distributed: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest -m distributed

test-slow: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest -m "slow and not distributed and not gpu"

# Thousands of steps with faults all the way: four minutes of one core.
test-soak: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest -m soak

# The tests of tests/fuzz on cases drawn anew, twenty times as many: look for what the repeatable ones do not meet.
fuzz: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --hypothesis-profile=fuzz tests/fuzz

# Known vulnerabilities of the pinned versions, from the advisories on the package index; an environment of its own.
$(AUDIT)/.installed: Makefile
	test -x $(AUDIT)/bin/python || $(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet "pip-audit>=2.7"
	touch $@

audit: $(AUDIT)/.installed
	$(PYTHON) .ci/audit.py $(AUDIT)/bin/pip-audit constraints.txt

# Runs that are killed at drawn moments and resumed: one process, and two ranks of DDP, ZeRO-2 and ZeRO-3.
test-resume: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest -m resume

# The pages are looked at by Debian's Chromium; elsewhere install one by hand.
browser:
	command -v chromium >/dev/null || { apt-get -q update && apt-get -q install -y --no-install-recommends chromium; }

test-browser: $(INSTALLED) browser
	$(TEST_ENV) $(BIN)/python -m pytest -m browser

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) $(PEERS) $(OLDEST) $(AUDIT) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
