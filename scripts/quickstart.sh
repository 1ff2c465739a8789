#!/usr/bin/env bash
# Set everything up and run the main job on the embedded default model: several prompts at once,
# streamed to the terminal. Arguments are handed on to examples/async_llm_engine.py.
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

case " $* " in
*" --model"*) exec "$PYTHON" "$ROOT/examples/async_llm_engine.py" "$@" ;;
*) exec "$PYTHON" "$ROOT/examples/async_llm_engine.py" --model SmolLM2-135M-Instruct "$@" ;;
esac
