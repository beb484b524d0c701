# `make` lists the targets. Targets that need .venv create .venv first; later calls reuse .venv.

TORCH ?= torch
ARGS ?=

# tests of one file run in one process, because they share slow fixtures; ARGS="-n 0" runs all tests in one process
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

VENV := .venv
RUN := $(VENV)/bin/python -m
PACKAGES := $(VENV)/.packages
STAMP := $(VENV)/.installed
# the oldest supported Megatron-Core, in a folder of its own: its tests put the folder first on their path
OLDEST_MEGATRON := $(VENV)/megatron-core-0.18
# Megatron-Bridge and its dependencies, also in a folder of their own: Megatron-Bridge needs an older transformers
BRIDGE := $(VENV)/megatron-bridge-0.6.2
BRIDGE_PACKAGES := megatron-bridge==0.6.2 hydra-core==1.3.4 "omegaconf>=2.3" "antlr4-python3-runtime==4.9.*" \
    transformers==5.12.1 "tokenizers<0.23" "huggingface_hub<2" httpx httpcore h11 anyio sniffio
# NVIDIA ModelOpt and its dependencies, optional: `make modelopt`, and tests/test_modelopt.py runs
MODELOPT := $(VENV)/modelopt-0.47.0
MODELOPT_PACKAGES := nvidia-modelopt==0.47.0 "omegaconf>=2.3" "antlr4-python3-runtime==4.9.*" "pulp<4" \
    nvidia-ml-py ninja
# other projects that choose experts, optional: packages in folders of their own, and clones of sources.txt
PEERS := $(VENV)/peers/.installed
# the tools that build the documentation, without torch
MKDOCS := $(VENV)/mkdocs
# serving engines in virtual environments of their own, because each engine needs its own torch and transformers. For
# another engine: an entry here, its packages in tests/serve/NAME.txt, and an entry in tests/support/engines.py
ENGINES := $(patsubst %,$(VENV)/serve-%/.installed,vllm sglang llama-cpp)
CPP := $(wildcard csrc/* tests/support/*.h tests/support/*.cpp)
NEWS := printf '\n\033[1m%s\033[0m\n'

# every candidate is run, because a pyenv shim may exist for a version that is not installed, and because Debian
# packages venv apart from python3. megatron-core 0.19 has no wheels for Python 3.14, and its flags fail there
CANDIDATES = python3.12 python3.13 python3 $(wildcard $(HOME)/.pyenv/versions/*/bin/python)
CAN_SERVE := import ensurepip, sys, venv; sys.exit(not (3, 12) <= sys.version_info < (3, 14))
FIND_PYTHON = for python in $(CANDIDATES); do \
	"$$python" -c "$(CAN_SERVE)" >/dev/null 2>&1 && break; python=; done

.DEFAULT_GOAL := help
.PHONY: help setup native demo modelopt peers test test-all test-serve lint format types docs bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install everything (for another torch: make setup TORCH="torch==2.13.0")

native: $(PACKAGES) ## compile csrc/ again and show the compilers' output (EMO_CUDA=0: no GPU code)
	@EMO_BUILD=1 $(VENV)/bin/python setup.py build_ext --inplace --force

demo: $(STAMP) ## pretrain EMO and a standard MoE, cut modules out, compare the losses (ARGS="--quick")
	@demo/demo.sh $(ARGS)

modelopt: $(MODELOPT) ## install NVIDIA ModelOpt beside the other packages, for tests/test_modelopt.py (optional)

peers: $(PEERS) ## install other projects that choose experts, for benchmarks/peers.py (optional, clones from GitHub)

test: $(STAMP) $(OLDEST_MEGATRON) $(BRIDGE) $(MKDOCS) ## run the tests that CI runs (ARGS="-k router")
	@$(RUN) pytest $(PARALLEL) -m "not slow and not gpu and not serve" $(ARGS)

test-all: $(STAMP) $(OLDEST_MEGATRON) $(BRIDGE) $(MKDOCS) ## run all tests, also slow tests, and GPU tests if there is a GPU
	@$(RUN) pytest $(PARALLEL) -m "not serve" $(ARGS)

test-serve: $(STAMP) $(ENGINES) ## compare exported models in vLLM, SGLang and llama.cpp with transformers, and write the results
	@$(RUN) pytest -n 0 -m serve --write-serving tests/serve $(ARGS)

lint: $(STAMP) ## check style, spelling and imports between packages
	@$(RUN) ruff check --quiet .
	@$(RUN) ruff format --check --quiet .
	@$(VENV)/bin/codespell
	@$(VENV)/bin/clang-format --dry-run --Werror $(CPP)
	@$(VENV)/bin/lint-imports --no-logo

format: $(STAMP) ## rewrite the code in the project's style
	@$(RUN) ruff check --fix --quiet .
	@$(RUN) ruff format --quiet .
	@$(VENV)/bin/clang-format -i $(CPP)

types: $(STAMP) ## check the types
	@$(RUN) mypy

# no --quiet: with it, MkDocs ignores warnings and --strict has no effect
docs: $(MKDOCS) ## build the documentation into build/site; a broken link is an error
	@PYTHONPATH=$(MKDOCS) NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict

bench: $(STAMP) ## run the benchmarks in small sizes (all sizes: make bench ARGS=)
	@for script in $(wildcard benchmarks/bench_*.py); do \
	    $(NEWS) "$$script"; $(VENV)/bin/python $$script $(if $(filter undefined file,$(origin ARGS)),--quick,$(ARGS)) || exit; \
	done

clean: ## remove build products and caches (.venv and runs/ stay)
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# venv installs pip last, so an interrupted .venv is created again
$(VENV)/bin/pip:
	@$(FIND_PYTHON); \
	if [ -z "$$python" ]; then \
	    echo "error: no Python 3.12 or 3.13 that can make a venv: apt install python3-venv (Debian 13, Ubuntu 24.04) or pyenv install 3.12" >&2; \
	    exit 1; \
	fi; \
	$(NEWS) "Creating $(VENV) with $$($$python --version)"; \
	"$$python" -m venv $(VENV)

ifeq ($(origin TORCH), command line)
.PHONY: $(PACKAGES)  # with an explicit TORCH, the packages are always installed again
endif

# this file is written last: an interrupted set-up resumes, with the packages that pip has already downloaded
$(PACKAGES): pyproject.toml | $(VENV)/bin/pip
	@$(NEWS) "Installing $(TORCH): on Linux the default is a CUDA build, about 3 GB to download and 6 GB on disk"
	@$(RUN) pip install --disable-pip-version-check "$(TORCH)"
	@$(NEWS) "Installing emo_megatron with the dependencies of the demo and the tests: about 0.5 GB"
	@EMO_BUILD=0 $(RUN) pip install --disable-pip-version-check --quiet --editable '.[demo,dev]'
	@touch $@

# a separate target, so that a changed kernel needs no call of pip
$(STAMP): $(PACKAGES) setup.py $(wildcard csrc/*)
	@$(NEWS) "Compiling csrc/: a minute or two"
	@$(VENV)/bin/python setup.py --quiet build_ext --inplace --force
	@touch $@

# the folder gets its name only when pip has finished, so an interrupted installation is repeated
$(OLDEST_MEGATRON): | $(STAMP)
	@$(NEWS) "Installing megatron-core 0.18 in a folder of its own, for its smoke test"
	@rm -rf $@.part
	@$(RUN) pip install --disable-pip-version-check --quiet --no-deps --target $@.part megatron-core==0.18.2
	@mv $@.part $@

$(BRIDGE): | $(STAMP)
	@$(NEWS) "Installing megatron-bridge 0.6.2 in a folder of its own, for its tests"
	@rm -rf $@.part
	@$(RUN) pip install --disable-pip-version-check --quiet --no-deps --target $@.part $(BRIDGE_PACKAGES)
	@mv $@.part $@

$(MODELOPT): | $(STAMP)
	@$(NEWS) "Installing nvidia-modelopt 0.47.0 in a folder of its own, for its tests"
	@rm -rf $@.part
	@$(RUN) pip install --disable-pip-version-check --quiet --no-deps --target $@.part $(MODELOPT_PACKAGES)
	@mv $@.part $@

# only the folders that run are checked out
$(PEERS): $(wildcard benchmarks/peers/*.txt) | $(STAMP)
	@$(NEWS) "Installing llm-compressor, reap, EASYEP and EMO's scripts in folders of their own: 0.5 GB, and clones"
	@rm -rf $(@D)
	@for name in llm-compressor reap emo; do $(RUN) pip install --disable-pip-version-check --quiet --no-deps \
		--target $(@D)/$$name --requirement benchmarks/peers/$$name.txt || exit; done
	@grep -v '^#' benchmarks/peers/sources.txt | while read -r name address commit folders; do \
		git clone --quiet --filter=blob:none --no-checkout $$address $(@D)/sources/$$name && \
		git -C $(@D)/sources/$$name checkout --quiet $$commit -- $$folders || exit; done
	@touch $@

# installed again when a pinned version changes; `make setup` is not needed
$(MKDOCS): docs/requirements.txt | $(VENV)/bin/pip
	@$(NEWS) "Installing mkdocs-material and mkdocstrings for the documentation: 0.2 GB on disk"
	@rm -rf $@ $@.part
	@$(RUN) pip install --disable-pip-version-check --quiet --target $@.part --requirement $<
	@mv $@.part $@
	@touch $@

# a stamp, because a virtual environment holds its own path and cannot be renamed. The file lists all packages but those
# of torch, whose builds differ: pip takes a CPU build if its index has one. --no-deps: the engines require more packages
# than a CPU needs
$(VENV)/serve-%/.installed: tests/serve/%.txt | $(STAMP)
	@$(NEWS) "Installing $* in an environment of its own: about 6 GB with the CUDA build of torch; llama.cpp compiles"
	@rm -rf $(@D)
	@$(RUN) venv $(@D)
	@torch=$$(grep '^torch==' $<); \
	[ -z "$$torch" ] || $(@D)/bin/python -m pip install --disable-pip-version-check --quiet $$torch
	@$(@D)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --requirement $<
	@touch $@
