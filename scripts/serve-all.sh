#!/usr/bin/env bash
# Serve MODEL with one daemon over all devices: one worker for each card, one port, one router.
#
#   scripts/serve-all.sh MODEL [--name NAME] [--port PORT] [--foreground] [--dry-run] [-- OPTION ...]
#
#   --name NAME    of the daemon (default: default)
#   --port PORT    of its HTTP (default: 8000)
#   --foreground   do not go to the background
#   --dry-run      print what would be run, and run nothing
#
# What follows -- goes to 'furiosa-serve start' as it is, such as -- --weights int8 --max-queue 4k.
# The daemon is stopped with 'furiosa-serve stop' or scripts/stop-all.sh.
set -euo pipefail
# shellcheck source=scripts/daemons.sh
source "$(dirname "${BASH_SOURCE[0]}")/daemons.sh"

model="" name=default port=8000 verb=start
options=()
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help) show_help && exit 0 ;;
    --name) name="$(value "$@")" && shift ;;
    --port) port="$(value "$@")" && shift ;;
    --foreground) verb=serve ;;
    --dry-run) DRY_RUN=1 ;;
    --) shift && options=("$@") && break ;;
    -*) usage_error "there is no option $1" ;;
    *) [ -z "$model" ] || usage_error "two models, $model and $1" && model="$1" ;;
    esac
    shift
done
[ -n "$model" ] || usage_error "there is no MODEL"
check_number --port "$port"

devices="$(cards | paste -sd, -)"
[ -n "$devices" ] || fail "'${SERVE[*]} devices' names no card"
run "${SERVE[@]}" "$verb" "$model" --name "$name" --port "$port" --devices "$devices" "${options[@]}"
