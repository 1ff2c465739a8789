#!/usr/bin/env bash
# What the scripts around daemons share. Meant to be sourced; afterwards "${SERVE[@]}" is the
# furiosa-serve command, and `run` runs a command, or with DRY_RUN=1 only prints it.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
DRY_RUN="${DRY_RUN:-0}"

# The checkout's own command where it is set up, else the installed one.
if [ -n "${FURIOSA_SERVE_COMMAND:-}" ]; then
    read -ra SERVE <<<"$FURIOSA_SERVE_COMMAND"
elif [ -x "$ROOT/.venv/bin/furiosa-serve" ]; then
    SERVE=("$ROOT/.venv/bin/furiosa-serve")
else
    SERVE=(furiosa-serve)
fi

# Wrong usage ends with 2, everything else with 1, as furiosa-serve itself does.
usage_error() {
    echo "error: $*: see '$(basename "$0") --help'" >&2
    exit 2
}

fail() {
    echo "error: $*" >&2
    exit 1
}

# The comment at the top of the script is its help.
show_help() {
    sed -n '2,/^set -euo/{/^#/!d; s/^# \{0,1\}//; p}' "$0"
}

# The value of an option: `value "$@"` with the option first.
value() {
    [ $# -ge 2 ] || usage_error "$1 needs a value"
    printf '%s' "$2"
}

check_number() {
    [[ "$2" =~ ^[0-9]{1,9}$ ]] || usage_error "$1: '$2' is not a whole number"
}

check_set() {
    [[ "$1" =~ ^[A-Za-z0-9][A-Za-z0-9._-]{0,23}$ ]] || usage_error \
        "--set: '$1' is not a name of at most 24 letters, digits, '.', '_' and '-'"
}

# As a line to copy; %q alone would also quote what needs no quotes, such as a comma. In one write,
# for commands that run side by side say theirs at the same time.
print_command() {
    local word line='+'
    for word in "$@"; do
        [[ "$word" =~ ^[A-Za-z0-9_./:,=@%+-]+$ ]] || printf -v word '%q' "$word"
        line+=" $word"
    done
    printf '%s\n' "$line"
}

run() {
    print_command "$@" >&2
    [ "$DRY_RUN" = 1 ] || "$@"
}

# The running daemons of a set (those named SET-0, SET-1, ...), by number.
members_of() {
    "${SERVE[@]}" status --all --json | sed -n 's/^ *"name": "\(.*\)",\{0,1\}$/\1/p' |
        { grep -E "^${1//./\\.}-[0-9]+\$" || true; } | sort -t- -k2 -V
}

# The cards of this machine, one a line: npu:0, npu:1, ...
cards() {
    "${SERVE[@]}" devices | sed -n 's/^card \(npu:[0-9]*\):.*/\1/p'
}

# The processing elements, one a line: npu:0:0, npu:0:1, ...
pes() {
    "${SERVE[@]}" devices | sed -n 's/^  \(npu:[0-9]*:[0-9]*\) .*/\1/p'
}
