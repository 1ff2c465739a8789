#!/usr/bin/env bash
# Build MODEL into artifacts, one for each type of weights, and try each with a prompt.
#
#   scripts/build-model.sh MODEL DIR [--weights TYPE[,TYPE]] [--no-check] [--dry-run]
#
#   MODEL            a checkpoint directory, a .gguf file, or a known model's id
#   DIR              gets DIR/NAME-TYPE for each type; what is there already is left as it is
#   --weights TYPES  auto, fp32, bf16, int8, int4 (default: auto)
#   --no-check       do not run the model
#   --dry-run        print what would be run, and run nothing
#
# An artifact is what starts fastest: 'furiosa-serve serve DIR/NAME-TYPE' maps it and serves.
set -euo pipefail
# shellcheck source=scripts/daemons.sh
source "$(dirname "${BASH_SOURCE[0]}")/daemons.sh"

places=() types=auto with_check=1
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help) show_help && exit 0 ;;
    --weights) types="$(value "$@")" && shift ;;
    --no-check) with_check=0 ;;
    --dry-run) DRY_RUN=1 ;;
    -*) usage_error "there is no option $1" ;;
    *) places+=("$1") ;;
    esac
    shift
done
[ "${#places[@]}" -eq 2 ] || usage_error "MODEL and DIR are needed, and nothing else"
model="${places[0]%/}" dir="${places[1]}"
name="$(basename "$model" .gguf)"

IFS=, read -ra kinds <<<"$types"
for kind in "${kinds[@]}"; do
    case "$kind" in
    auto | fp32 | bf16 | int8 | int4) ;;
    *) usage_error "--weights: '$kind' is not one of auto, fp32, bf16, int8, int4" ;;
    esac
done
run mkdir -p "$dir"
for kind in "${kinds[@]}"; do
    out="$dir/$name-$kind"
    if [ -e "$out/artifact.json" ]; then
        echo "$out is there already" >&2
    else
        run "${SERVE[@]}" build "$model" "$out" --weights "$kind"
    fi
    [ "$with_check" = 0 ] ||
        run "${SERVE[@]}" generate --model "$out" --max-tokens 16 "The quick brown fox"
done
