#!/usr/bin/env bash
# Set everything up and run the tests. Arguments are handed on to pytest, for example
# `scripts/test.sh -k scheduler`.
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

cd "$ROOT"
exec "$PYTHON" -m pytest "$@"
