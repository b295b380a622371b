#!/usr/bin/env bash
# ./benchmark.sh [--help]: runs what results/README.md shows (results/bench.py), in .venv, which it makes if there is none; PYTHON chooses another interpreter.
set -euo pipefail
cd "$(dirname "$0")"
[ -n "${PYTHON:-}" ] || .venv/bin/python -c "import tqdm" 2> /dev/null || { python3 -m venv .venv && .venv/bin/pip install -r requirements.txt; }
exec "${PYTHON:-.venv/bin/python}" results/bench.py "$@"
