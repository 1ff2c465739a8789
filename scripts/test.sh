#!/usr/bin/env bash
# Set everything up and run the tests. Arguments are handed on to pytest, for example
# `scripts/test.sh -k scheduler`.
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# Programs use OpenAI's package in both of its lines. .venv has the newer one; the older one lies
# apart, for tests/test_openai_2.py.
OPENAI_2="$ROOT/.venv/openai-2"
if [ ! -d "$OPENAI_2" ]; then
    echo "setup: installing openai 2.x beside the newer one" >&2
    rm -rf "$OPENAI_2.new"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --target "$OPENAI_2.new" \
        'openai>=2,<3' >&2 || fail "pip could not install openai 2.x; its own words are above"
    mv "$OPENAI_2.new" "$OPENAI_2"
fi

cd "$ROOT"
exec "$PYTHON" -m pytest "$@"
