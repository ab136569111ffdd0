# One command for each thing that is done with a checkout. Needs git, make and Python 3.11 or later.
#
#   make setup    .venv with the three programs and everything that the other targets use
#   make run      a daemon, five clients, ten seconds: every packet checked, stored and accounted for
#   make test     everything that is tested, style included
#   make lint     style and types only
#   make bench    the measurements of docs/benchmarks.md, on this machine
#   make deb      the Debian packages, in build/deb
#   make test-system   the packages, installed on a machine with real systemd (as root; minutes)
#   make clean    remove what the others made
#
# Overrides: make run CLIENTS=10 DURATION=30 RATE=10050 PACKET_SIZE=16; make test TESTS=tests/unit PYTEST="-k ledger";
# make bench BENCH="--only cpu"; PYTHON=python3.12 chooses the interpreter of a fresh .venv.

SHELL := /bin/bash
MAKEFLAGS += --no-print-directory
export PYTHON

BIN := .venv/bin
CLIENTS ?= 5
DURATION ?= 10
RATE ?= 10050
PACKET_SIZE ?= 16
TESTS ?= tests
PYTEST ?=
BENCH ?=
# Beside the package itself: what other tests are built from.
TYPED := packaging/demo.py tests/bench $(addprefix tests/integration/,driver.py oracle.py senders.py) \
	$(addprefix tests/system/,machine.py live_clients.py)

.PHONY: help setup run test lint bench deb test-system clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

setup:
	@packaging/setup.sh all

run:
	@packaging/setup.sh run
	@exec $(BIN)/python packaging/demo.py --clients $(CLIENTS) --duration $(DURATION) --rate $(RATE) \
		--packet-size $(PACKET_SIZE)

test: setup
	@packaging/test_packages.sh
	@$(MAKE) lint
	@$(BIN)/python -m pytest $(TESTS) $(PYTEST)

lint: setup
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { echo "lint: type: $(BIN)/ruff format ." >&2; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/mypy --no-error-summary --explicit-package-bases $(TYPED)
	@for system in win32 darwin; do \
		$(BIN)/mypy --no-error-summary --follow-imports=silent --platform $$system mpserverd/client || exit 1; done

bench: setup
	@exec $(BIN)/python tests/bench/bench.py $(BENCH)

deb:
	@packaging/build_deb.sh

test-system: setup
	@packaging/system_packages.sh
	@MPSERVERD_TEST_SYSTEM=1 $(BIN)/python -m pytest tests/system $(PYTEST)

clean:
	rm -rf --one-file-system .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find mpserverd tests packaging -name __pycache__ -type d -exec rm -rf {} +
