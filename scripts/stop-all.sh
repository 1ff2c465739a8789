#!/usr/bin/env bash
# Stop the daemons of a set, or all of this user's, all at the same time.
#
#   scripts/stop-all.sh [--set SET] [--timeout TIME] [--dry-run]
#
#   --set SET        only SET-0, SET-1, ... (default: every daemon that runs)
#   --timeout TIME   for requests to end, such as 2m; 0 cuts them (default: each daemon's own
#                    --drain-timeout)
#   --dry-run        print what would be run, and run nothing
#
# Exit codes: 0 all have ended, or none was running; 4 requests were cut.
set -euo pipefail
# shellcheck source=scripts/daemons.sh
source "$(dirname "${BASH_SOURCE[0]}")/daemons.sh"

set=""
options=()
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help) show_help && exit 0 ;;
    --set) set="$(value "$@")" && check_set "$set" && shift ;;
    --timeout) options=(--timeout "$(value "$@")") && shift ;;
    --dry-run) DRY_RUN=1 ;;
    *) usage_error "there is no option $1" ;;
    esac
    shift
done

if [ -n "$set" ]; then
    mapfile -t names < <(members_of "$set")
else
    mapfile -t names < <("${SERVE[@]}" status --all --json | sed -n 's/^ *"name": "\(.*\)",\{0,1\}$/\1/p')
fi
[ "${#names[@]}" -gt 0 ] || { echo "no daemon is running" >&2 && exit 0; }

# Side by side: each may take its whole time to drain.
pids=()
for name in "${names[@]}"; do
    run "${SERVE[@]}" stop --name "$name" "${options[@]}" &
    pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
    wait "$pid" || code=$?
done
exit "$code"
