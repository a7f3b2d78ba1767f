# Every target starts from nothing: it makes .venv, installs the locked versions there and then does its work.
# Needs only make and Python >= 3.11 with venv. Nothing outside this folder is touched, except uv's download cache.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
METHOD := mae
# The run of minutes: that of the method, if it has one of its own, else the one for every method.
QUICK  := $(firstword $(wildcard configs/$(METHOD)_quick.yaml) configs/quickstart.yaml)

# Python writes its bytecode even where the environment says not to: every start after the first takes half the time.
unexport PYTHONDONTWRITEBYTECODE
# The environment is .venv and nothing else.
unexport PYTHONPATH
unexport PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The CUDA libraries are large files: slow lines need patience.
export UV_HTTP_TIMEOUT := 600

.PHONY: help install demo test lint format docs bench lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Make .venv with the locked versions (8 GB; one to three minutes)

demo: $(STAMP) ## Pretrain on the embedded imagery for some minutes (METHOD=mae, s2mae ...), then show pictures and numbers
	@mkdir -p runs && touch runs/.demo
	@$(BIN)/xscale fit --config configs/$(METHOD).yaml --config $(QUICK)
	@echo; echo "Numbers and pictures of this run:"
	@find runs -newer runs/.demo \( -name results.json -o -name '*.png' \) | sort | sed 's/^/  /'
	@echo "Curves: $(BIN)/tensorboard --logdir runs"

test: $(STAMP) ## Run all tests (arguments for pytest: make test ARGS="-k bands")
	@OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal $(ARGS)

lint: $(STAMP) ## ruff, formatting, types, direction of imports: all four run, any finding fails
	@failed=0; \
	$(BIN)/ruff check . || failed=1; \
	$(BIN)/ruff format --check . || failed=1; \
	$(BIN)/basedpyright || failed=1; \
	$(BIN)/lint-imports --no-logo || failed=1; \
	exit $$failed

format: $(STAMP) ## Let ruff repair and format what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(STAMP) ## Build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Documentation: site/index.html"

bench: $(STAMP) ## Time every method's training step against a plain reference (minutes on two cores)
	@$(BIN)/python benchmarks/train_step.py

lock: $(STAMP) ## Resolve requirements.lock anew from pyproject.toml
	@sed -n '/^#/p' requirements.lock > requirements.lock.new
	@$(BIN)/uv pip compile pyproject.toml --all-extras --upgrade --python-version 3.11.5 \
	    --python-platform x86_64-manylinux_2_28 --no-annotate --no-header --no-config --quiet >> requirements.lock.new
	@mv requirements.lock.new requirements.lock

clean: ## Remove .venv, caches and built files; runs/ stays
	rm -rf $(VENV) site build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# The lock names builds for Linux on x86_64; elsewhere the bounds in pyproject.toml choose.
$(STAMP): pyproject.toml requirements.lock
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    for candidate in python3.11 python3.12 python3.13 python3 python; do \
	        if $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	            python=$$candidate; break; \
	        fi; \
	    done; \
	    if [ -z "$${python:-}" ]; then \
	        echo "make: no Python >= 3.11 with the venv module on the path (Debian: apt-get install python3-venv)" >&2; \
	        exit 1; \
	    fi; \
	    $$python -m venv --clear $(VENV); \
	fi; \
	echo "Installing the locked versions into $(VENV), $$($(BIN)/python --version) ..."
	@$(BIN)/python -m pip install --quiet "$$(grep '^uv==' requirements.lock)"
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then \
	    $(BIN)/uv pip sync --quiet --python $(BIN)/python requirements.lock; \
	    $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .; \
	else \
	    $(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[dev,docs]'; \
	fi
	@touch $@
