# `make` lists the targets. Those that need .venv set it up first; a second call reuses it.

TORCH ?= torch
ARGS ?=

# a file's tests stay together, for they share what takes long to make; ARGS="-n 0" runs one after the other
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

VENV := .venv
RUN := $(VENV)/bin/python -m
PACKAGES := $(VENV)/.packages
STAMP := $(VENV)/.installed
# the oldest supported Megatron-Core, beside the environment's own: tests put it first on their path
OLDEST_MEGATRON := $(VENV)/megatron-core-0.18
# Megatron-Bridge and what it needs, beside too: its transformers is an older one
BRIDGE := $(VENV)/megatron-bridge-0.6.2
BRIDGE_PACKAGES := megatron-bridge==0.6.2 hydra-core==1.3.4 "omegaconf>=2.3" "antlr4-python3-runtime==4.9.*" \
    transformers==5.12.1 "tokenizers<0.23" "huggingface_hub<2" httpx httpcore h11 anyio sniffio
# the tools that build the documentation; they need no torch
MKDOCS := $(VENV)/mkdocs
CPP := $(wildcard csrc/* tests/support/*.h tests/support/*.cpp)
NEWS := printf '\n\033[1m%s\033[0m\n'

# each candidate is run: a pyenv shim exists, and fails, for every version that pyenv knows of, and
# Debian splits venv from python3. megatron-core 0.19 has no wheels for 3.14, where its flags break
CANDIDATES = python3.12 python3.13 python3 $(wildcard $(HOME)/.pyenv/versions/*/bin/python)
CAN_SERVE := import ensurepip, sys, venv; sys.exit(not (3, 12) <= sys.version_info < (3, 14))
FIND_PYTHON = for python in $(CANDIDATES); do \
	"$$python" -c "$(CAN_SERVE)" >/dev/null 2>&1 && break; python=; done

.DEFAULT_GOAL := help
.PHONY: help setup native demo test test-all lint format types docs bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install (once; another torch: make setup TORCH="torch==2.13.0")

native: $(PACKAGES) ## compile csrc/ again, saying what the compilers say (EMO_CUDA=0: no GPU code)
	@EMO_BUILD=1 $(VENV)/bin/python setup.py build_ext --inplace --force

demo: $(STAMP) ## pretrain EMO and the standard MoE, cut modules out, compare (ARGS="--quick")
	@demo/demo.sh $(ARGS)

test: $(STAMP) $(OLDEST_MEGATRON) $(BRIDGE) ## run the tests that CI runs (ARGS="-k router")
	@$(RUN) pytest $(PARALLEL) -m "not slow and not gpu" $(ARGS)

test-all: $(STAMP) $(OLDEST_MEGATRON) $(BRIDGE) ## run all tests, the slow ones too, and the GPU ones where there is a GPU
	@$(RUN) pytest $(PARALLEL) $(ARGS)

lint: $(STAMP) ## check style, spelling and which package imports which
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

bench: $(STAMP) ## run the benchmarks, quick ones (all sizes: make bench ARGS=)
	@for script in $(wildcard benchmarks/bench_*.py); do \
	    $(NEWS) "$$script"; $(VENV)/bin/python $$script $(if $(filter undefined file,$(origin ARGS)),--quick,$(ARGS)) || exit; \
	done

clean: ## remove build products and caches (.venv and runs/ stay)
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing that venv puts in, so an interrupted one is made again
$(VENV)/bin/pip:
	@$(FIND_PYTHON); \
	if [ -z "$$python" ]; then \
	    echo "error: no Python 3.12 or 3.13 that can make a venv: apt install python3-venv (Debian 13, Ubuntu 24.04) or pyenv install 3.12" >&2; \
	    exit 1; \
	fi; \
	$(NEWS) "Creating $(VENV) with $$($$python --version)"; \
	"$$python" -m venv $(VENV)

ifeq ($(origin TORCH), command line)
.PHONY: $(PACKAGES)  # an explicit TORCH is never taken for done
endif

# written last: an interrupted set-up goes on where it stopped, with what pip has already fetched
$(PACKAGES): pyproject.toml | $(VENV)/bin/pip
	@$(NEWS) "Installing $(TORCH): on Linux the default is a CUDA build, some 3 GB to fetch and 6 GB on disk"
	@$(RUN) pip install --disable-pip-version-check "$(TORCH)"
	@$(NEWS) "Installing emo_megatron with what the demo and the tests need: some 0.5 GB"
	@EMO_BUILD=0 $(RUN) pip install --disable-pip-version-check --quiet --editable '.[demo,dev]'
	@touch $@

# apart from the packages, so that a changed kernel costs no call of pip
$(STAMP): $(PACKAGES) setup.py $(wildcard csrc/*)
	@$(NEWS) "Compiling csrc/: a minute or two"
	@$(VENV)/bin/python setup.py --quiet build_ext --inplace --force
	@touch $@

# whole or not at all: a folder that pip was interrupted in does not get the name
$(OLDEST_MEGATRON): | $(STAMP)
	@$(NEWS) "Installing megatron-core 0.18 beside, for its smoke test"
	@rm -rf $@.part
	@$(RUN) pip install --disable-pip-version-check --quiet --no-deps --target $@.part megatron-core==0.18.2
	@mv $@.part $@

$(BRIDGE): | $(STAMP)
	@$(NEWS) "Installing megatron-bridge 0.6.2 beside, for its tests"
	@rm -rf $@.part
	@$(RUN) pip install --disable-pip-version-check --quiet --no-deps --target $@.part $(BRIDGE_PACKAGES)
	@mv $@.part $@

# installed again when a pinned version changes; does not need `make setup`
$(MKDOCS): docs/requirements.txt | $(VENV)/bin/pip
	@$(NEWS) "Installing mkdocs-material and mkdocstrings for the documentation: 0.2 GB on disk"
	@rm -rf $@ $@.part
	@$(RUN) pip install --disable-pip-version-check --quiet --target $@.part --requirement $<
	@mv $@.part $@
	@touch $@
