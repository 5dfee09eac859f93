#!/bin/sh
# Sets up the environment if need be, then runs the tests; arguments go to pytest:
#   ./test.sh                 the tests that take seconds each
#   ./test.sh -m slow         the ones that take minutes
#   ./test.sh tests/test_layers.py -x
set -eu
cd "$(dirname "$0")"
./setup.sh --dev
# Tiny models run fastest on one thread, and waiting threads must not spin; no test may depend on a model hub.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
# All of them are spread over the cores; a worker holds up to 2 GB.
[ $# -gt 0 ] || set -- --numprocesses auto --maxprocesses 4 --dist worksteal
exec .venv/bin/python -m pytest "$@"
