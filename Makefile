# `make train` trains a small Hope on real text, `make test` runs the tests; both install what they need into .venv first.
# make train ARGS="--steps 50"   make test ARGS="-k attention"   make install PYTHON3=python3.12
PYTHON3 ?= python3
RUN     ?= runs/hope-tiny
ARGS    ?=
BIN     := .venv/bin
# Large pages for large arrays: a fifth faster on Linux. A glibc older than 2.35 and other systems ignore it.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
STAMP   := .venv/installed
DOCS    := .venv/installed-docs

.DEFAULT_GOAL := help
.PHONY: install train test test-all docs lint types format check smoke clean help

train: $(STAMP)  ## train hope-tiny on text into runs/hope-tiny; the same command resumes
	$(BIN)/python -m hope_jax pretrain --run $(RUN) $(ARGS)

test: $(STAMP)  ## run the tests but for the slow ones
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow" $(ARGS)

test-all: $(STAMP)  ## run every test: experiments from end to end and the notebooks, too
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

docs: $(DOCS)  ## run the notebooks and build the documentation into docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

lint: types  ## ruff, ruff format and pyright
	$(BIN)/ruff check && $(BIN)/ruff format --check

types: $(STAMP)  ## pyright
	$(BIN)/pyright

check: lint test  ## lint and test

format: $(STAMP)  ## rewrite the sources in the one format
	$(BIN)/ruff format && $(BIN)/ruff check --fix

smoke: $(STAMP)  ## train six tiny steps from nothing
	rm -rf runs/smoke && $(BIN)/python -m hope_jax pretrain --run runs/smoke --steps 6 --batch 2 --length 64 $(ARGS)

install: $(STAMP)  ## create .venv and install the project with its development tools

clean:  ## remove .venv, caches and build outputs; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache build dist docs/_build *.egg-info && find . -name __pycache__ -prune -exec rm -rf {} +

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

NO_PYTHON = $(PYTHON3) is missing or older than 3.11. Install Python 3.11 or newer, or name one: make PYTHON3=python3.12
NO_VENV   = $(PYTHON3) cannot create virtual environments. On Debian or Ubuntu: sudo apt-get install python3-venv. Then run make again.
NO_INSTALL = The installation into .venv failed; the reason stands above. It needs the network and about 1.5 GB of disk. Then run make again.

$(STAMP): setup.cfg pyproject.toml
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "$(NO_PYTHON)" >&2; exit 1; }
	@$(PYTHON3) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(NO_VENV)" >&2; exit 1; }
	@echo "Installing into .venv (about 1.5 GB, a minute or more) ..."
	@$(PYTHON3) -m venv .venv || { echo "$(NO_VENV)" >&2; exit 1; }
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]' || { echo "$(NO_INSTALL)" >&2; exit 1; }
	@touch $@

$(DOCS): $(STAMP)
	@echo "Installing the tools of the documentation into .venv ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[docs]' || { echo "$(NO_INSTALL)" >&2; exit 1; }
	@touch $@
