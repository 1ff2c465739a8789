#!/usr/bin/env bash
# Put a ladder of loads on a server, one `furiosa-serve bench` a rung, and keep every figure.
#
#   scripts/bench-ladder.sh --base-url URL [OPTION ...]     a server that runs, ours or another
#   scripts/bench-ladder.sh --model MODEL [OPTION ...]      a daemon of its own, stopped at the end
#
#   --concurrency LIST   the rungs: callers at once (default: 1,4,16,64)
#   --requests-per N     requests of a rung for each of its callers (default: 4)
#   --input-len N        tokens of a prompt (default: 128)
#   --output-len N       tokens of an answer (default: 128)
#   --out DIR            gets rung-N.txt and rung-N.json (default: bench-ladder.DATE)
#   --dry-run            print what would be run, and run nothing
#
# What follows -- goes to each `furiosa-serve bench` as it is, such as -- --prompt-form text.
# FURIOSA_SERVE_ variables hold for the daemon of --model, as they do for 'furiosa-serve start'.
set -euo pipefail
# shellcheck source=scripts/daemons.sh
source "$(dirname "${BASH_SOURCE[0]}")/daemons.sh"

url="" model="" rungs=1,4,16,64 per=4 input_len=128 output_len=128 out=""
options=()
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help) show_help && exit 0 ;;
    --base-url) url="$(value "$@")" && shift ;;
    --model) model="$(value "$@")" && shift ;;
    --concurrency) rungs="$(value "$@")" && shift ;;
    --requests-per) per="$(value "$@")" && shift ;;
    --input-len) input_len="$(value "$@")" && shift ;;
    --output-len) output_len="$(value "$@")" && shift ;;
    --out) out="$(value "$@")" && shift ;;
    --dry-run) DRY_RUN=1 ;;
    --) shift && options=("$@") && break ;;
    *) usage_error "there is no option $1" ;;
    esac
    shift
done
if [ -z "$url" ] && [ -z "$model" ]; then usage_error "--base-url or --model is needed"; fi
if [ -n "$url" ] && [ -n "$model" ]; then usage_error "--base-url and --model: give one"; fi
check_number --requests-per "$per"
check_number --input-len "$input_len"
check_number --output-len "$output_len"
IFS=, read -ra callers <<<"$rungs"
for n in "${callers[@]}"; do check_number --concurrency "$n"; done
out="${out:-bench-ladder.$(date +%Y%m%d-%H%M%S)}"

if [ -n "$model" ]; then
    name="ladder-$$"
    [ "$DRY_RUN" = 1 ] || trap 'run "${SERVE[@]}" stop --name "$name" --timeout 0' EXIT
    run "${SERVE[@]}" start "$model" --name "$name" --port 0
    url=URL
    [ "$DRY_RUN" = 1 ] || url="$("${SERVE[@]}" status --name "$name" --json |
        sed -n 's/^ *"http": "\(.*\)",\{0,1\}$/\1/p')"
fi

run mkdir -p "$out"
for n in "${callers[@]}"; do
    command=("${SERVE[@]}" bench --base-url "$url" --concurrency "$n" --num-requests $((n * per))
        --input-len "$input_len" --output-len "$output_len" --json "$out/rung-$n.json"
        "${options[@]}")
    print_command "${command[@]}" >&2
    [ "$DRY_RUN" = 1 ] || "${command[@]}" | tee "$out/rung-$n.txt"
done
