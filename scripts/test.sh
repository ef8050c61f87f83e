#!/usr/bin/env bash
# Set-up if it is missing, then the whole test suite with lint and types. --fast leaves out the slow tests.
set -euo pipefail

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
    echo "bash scripts/test.sh [--fast] [pytest arguments]"
    echo "Lint, types and tests. --fast leaves out the slow end-to-end tests (two minutes instead of twenty)."
    exit 0
fi

cd "$(dirname "$0")/.."
source scripts/setup_env.sh
setup_env requirements.txt requirements-dev.txt requirements-docs.txt

arguments=()
for argument in "$@"; do
    if [[ "$argument" == "--fast" ]]; then arguments+=(-m "not slow"); else arguments+=("$argument"); fi
done
ruff check .
ruff format --check .
mypy
# Two at a time: most of a test is one process that imports torch.
exec python -m pytest -n 2 --dist loadgroup "${arguments[@]}"
