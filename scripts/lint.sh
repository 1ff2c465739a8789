#!/usr/bin/env bash
# Style and types: ruff on everything, mypy --strict on the packages, shellcheck on the scripts.
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .

# mypy looks for packages by folder name, and ours are mapped (setup.cfg): give it a tree of links.
tree="$(mktemp -d)"
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/furiosa_llm"
ln -s "$ROOT"/runtime/* "$tree/furiosa_llm/"
ln -s "$ROOT/workers" "$ROOT/scheduler" "$tree/furiosa_llm/"
(cd "$tree" && MYPYPATH="$tree" "$PYTHON" -m mypy --config-file "$ROOT/pyproject.toml" \
    --cache-dir "$ROOT/.mypy_cache" -p furiosa_llm)

"$ROOT/.venv/bin/shellcheck" -x scripts/*.sh .ci/run
