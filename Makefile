# Every target sets up what it needs in .venv; nothing else on the machine is touched.
#   make chat    talk to the built-in demo model (MODEL=folder for a real one)
#   make test    run the tests
#   make test-page   try the pages in a Chromium (SCREENSHOTS=folder keeps pictures)
#   make test-node   run those that need Node.js and packages of npm's
#   make check   format, lint, types, tests
#   make fix     format, and mend what the linter can
#   make bench   measure the demo model (or MODEL=folder) next to mlx-lm, and write the table in README.md
.PHONY: chat test test-long test-page test-node lint check fix bench clean
SHELL := /bin/sh

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

chat: .venv/ready
	@$(BIN)/python -m mixtral_mlx.chat $(if $(MODEL),--model "$(MODEL)") $(ARGS)

test: .venv/ready-dev
	@$(BIN)/python -m pytest -n auto $(ARGS)

test-long: .venv/ready-dev
	@$(BIN)/python -m pytest -n auto -m long $(ARGS)

test-page: .venv/ready-page
	@$(BIN)/python -m tests.chromium
	@$(BIN)/python -m pytest -n auto -m browser tests/test_page.py tests/test_electron.py $(ARGS)

test-node: .venv/ready-dev .venv/node/ready
	@$(BIN)/python -m pytest -m "node and not long" $(ARGS)

lint: .venv/ready-dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

check: lint test

fix: .venv/ready-dev
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: .venv/ready-dev
	@$(BIN)/python -m mixtral_mlx bench --model "$(or $(MODEL),demo)" --vs mlx-lm --save .venv/bench.json $(ARGS)
	@$(BIN)/python benchmarks/readme_table.py .venv/bench.json

clean:
	@rm -rf .venv

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed (macOS: brew install python)." >&2; exit 1; }
	@echo "Setting up .venv with $(PYTHON) …" >&2
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --upgrade "pip>=25.1" >&2

.venv/ready: pyproject.toml | .venv/bin/python
	@$(BIN)/python -m pip install -q -e . >&2
	@touch $@

.venv/ready-dev: pyproject.toml | .venv/bin/python
	@$(BIN)/python -m pip install -q -e . --group dev >&2
	@touch $@ .venv/ready

.venv/ready-page: .venv/ready-dev
	@$(BIN)/python -m pip install -q --group page >&2
	@touch $@

# No lock file: it would name where the packages were fetched from, and package.json has exact versions.
.venv/node/ready: tests/node/package.json | .venv/bin/python
	@mkdir -p .venv/node
	@cp tests/node/package.json .venv/node/
	@npm install --prefix .venv/node --no-package-lock --no-audit --no-fund --silent >&2
	@touch $@
