#!/usr/bin/env bash
# Restart the daemons of a set one after the other, each only once the one before is ready again.
#
#   scripts/rolling-restart.sh [--set SET] [--timeout TIME] [--dry-run]
#
#   --set SET        as of scripts/serve-per-device.sh (default: set)
#   --timeout TIME   for the requests of each daemon to end, such as 2m (default: the daemon's own
#                    --drain-timeout)
#   --dry-run        print what would be run, and run nothing
#
# A daemon that drains takes no more requests, so a front (nginx) asks the others meanwhile. It stops
# at the first daemon that does not come back, and exits with its code, so that a mistake costs one
# daemon and not all; requests that were cut make it exit with 4 in the end.
set -euo pipefail
# shellcheck source=scripts/daemons.sh
source "$(dirname "${BASH_SOURCE[0]}")/daemons.sh"

set="set"
options=()
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help) show_help && exit 0 ;;
    --set) set="$(value "$@")" && shift ;;
    --timeout) options=(--timeout "$(value "$@")") && shift ;;
    --dry-run) DRY_RUN=1 ;;
    *) usage_error "there is no option $1" ;;
    esac
    shift
done
check_set "$set"

mapfile -t members < <(members_of "$set")
[ "${#members[@]}" -gt 0 ] || fail "no daemon of the set $set is running: see 'furiosa-serve status --all'"
was_cut=0
for name in "${members[@]}"; do
    code=0
    run "${SERVE[@]}" restart --name "$name" "${options[@]}" || code=$?
    case "$code" in
    0) ;;
    4) was_cut=4 ;; # it is back; some of its requests were not finished
    *) echo "error: $name did not come back; the daemons after it were left alone" >&2 && exit "$code" ;;
    esac
done
exit "$was_cut"
