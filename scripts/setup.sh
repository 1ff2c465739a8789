#!/usr/bin/env bash
# Make the checkout's .venv ready, whatever state it is in. Meant to be sourced by the other scripts;
# afterwards $ROOT is the checkout and $PYTHON its interpreter. Needs no root; writes to .venv alone.
#
# The install is repeated only when what it depends on has changed: a stamp in .venv holds a digest of
# the packaging files and the native sources.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$ROOT/.venv/bin/python"
STAMP="$ROOT/.venv/installed-from"

fail() {
    echo "error: $*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in "${FURIOSA_SERVE_PYTHON:-}" python3 python3.13 python3.12 python3.11; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer found: install one, or name it in FURIOSA_SERVE_PYTHON"
}

sources_digest() {
    (cd "$ROOT" && cat setup.cfg setup.py pyproject.toml workers/kernels/native/* | sha256sum)
}

if [ ! -x "$PYTHON" ]; then
    echo "setup: creating $ROOT/.venv" >&2
    "$(find_python)" -m venv "$ROOT/.venv"
fi
if [ "$(cat "$STAMP" 2>/dev/null)" != "$(sources_digest)" ]; then
    command -v "${CXX:-c++}" >/dev/null || fail \
        "no C++ compiler found: install g++ or clang++, or name one in CXX"
    echo "setup: installing furiosa-serve and what it needs (a few minutes the first time)" >&2
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --editable "${ROOT}[test]" >&2 ||
        fail "pip could not install the project; its own words are above"
    "$PYTHON" -c 'import importlib.util, sys
sys.exit(importlib.util.find_spec("furiosa_llm.workers.kernels._native") is None)' || fail \
        "the native kernel was not built: run '$PYTHON -m pip install -v -e $ROOT' to see why"
    sources_digest >"$STAMP"
fi
