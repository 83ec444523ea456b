# `make demo` and `make test` do all their own set-up: Python 3.11 or newer and make are enough.
#
#   make demo [ARGS="--full --json FILE"]   the main job on real models and real data
#   make test [PYTEST="-k name"]            ruff, mypy --strict, pytest
#   make clients [ARGS="--only NAME"]       every client directly and through the proxy; makes their environments
#   make bench [QUICK=1]                    what the proxy costs, beside other proxies; makes their environments
#   make bench-quick                        the same in two minutes, without other gateways
#   make bench-quality [ARGS=--offline]     what examples are worth to real models; resumable, hours
#   make bench-gate                         whether a request costs more than it may, as a ratio; exit code 1: it does
#   make lint                               ruff and mypy alone
#   make docs                               write the generated parts of README.md and deploy/ anew
#   make lock                               write deploy/constraints.txt anew from pyproject.toml
#   make clean                              remove the environment and all caches of tools
#
# PYTHON=/path/to/python chooses the interpreter of a new environment.

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := deploy/constraints.txt
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

ifndef PYTHON
PYTHON := $(shell for python in python3.11 python3; do \
	$$python -c '$(IS_NEW_ENOUGH)' 2>/dev/null && { echo $$python; break; }; done)
endif
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --quiet -c $(CONSTRAINTS)

.PHONY: demo test clients bench bench-quick bench-gate bench-quality lint docs lock clean
.DELETE_ON_ERROR:

demo: $(VENV)/.with-demo
	$(BIN)/iccache demo $(ARGS)

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST)

clients: $(VENV)/.with-test
	$(BIN)/python -m tests.clients.run $(ARGS)

bench: $(VENV)/.with-test
	$(BIN)/python -m tests.bench.run $(if $(QUICK),--quick) $(ARGS)

bench-quick: $(VENV)/.with-test
	$(BIN)/python -m tests.bench.run --quick $(ARGS)

bench-gate: $(VENV)/.with-test
	$(BIN)/python -m tests.bench.gate $(ARGS)

bench-quality: $(VENV)/.with-test $(VENV)/.with-demo
	$(BIN)/python -m tests.bench.quality.run $(ARGS)

lint: $(VENV)/.with-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy --strict -p iccache -p router -p replay

docs: $(VENV)/.with-test
	$(BIN)/python -m tests.test_docs

$(VENV)/.made:
	@$(or $(PYTHON),false) -c '$(IS_NEW_ENOUGH)' || { \
		echo 'iccache needs Python 3.11 or newer, and $(or $(PYTHON),neither python3.11 nor python3) is not;' \
			'name one with make PYTHON=/path/to/python' >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# torch comes first and alone: the other packages then take the build that is there, whatever index offers another.
$(VENV)/.with-%: $(VENV)/.made pyproject.toml $(CONSTRAINTS)
	@echo 'installing into $(VENV): a few minutes the first time'
	$(INSTALL) torch
	$(INSTALL) -e '.[$*]'
	@touch $@

lock:
	rm -rf $(VENV)-lock
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --disable-pip-version-check --quiet '.[bench,demo,encryption,test]'
	$(VENV)-lock/bin/python -m pip uninstall --quiet --yes iccache
	@{ echo '# Every package of `pip install .[bench,demo,encryption,test]`, at the versions that were tested. Written by `make lock`.'; \
		$(VENV)-lock/bin/python -m pip freeze | sed 's/+.*//'; } > $(CONSTRAINTS)
	rm -rf $(VENV)-lock build

clean:
	rm -rf $(VENV) $(VENV)-lock .clients build *.egg-info .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
