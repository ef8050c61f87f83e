#!/usr/bin/env bash
# Set-up if needed, then lint, import contract, types and tests. --fast skips the slow tests.
set -euo pipefail

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
    echo "bash scripts/test.sh [--fast] [pytest arguments]"
    echo "Lint, import contract, types and tests. --fast skips the slow tests (two minutes instead of twenty)."
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
lint-imports --no-logo
mypy
# Two at a time: most of a test is one process that imports torch.
exec python -m pytest -n 2 --dist loadgroup "${arguments[@]}"
