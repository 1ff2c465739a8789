#!/usr/bin/env bash
# Serve MODEL with one daemon per device and write the configuration of an nginx in front of them.
#
#   scripts/serve-per-device.sh MODEL [OPTION ...] [-- OPTION ...]
#
#   --per card|pe        a daemon for each card (a NUMA node), or for each processing element
#                        (default: card)
#   --devices LIST       these instead, a daemon for each entry, such as npu:0:0-3,npu:0:4-7
#   --set SET            the daemons are named SET-0, SET-1, ..., and so are their sockets
#                        (default: set)
#   --base-port PORT     their HTTP ports are PORT, PORT+1, ... (default: 8001)
#   --unix DIR           their HTTP is at the Unix sockets DIR/SET-0.sock, ... instead of ports
#   --front-port PORT    that nginx listens on (default: 8000)
#   --nginx-conf FILE    (default: ${XDG_CONFIG_HOME:-~/.config}/furiosa-serve/SET.nginx.conf)
#   --dry-run            print what would be run and written, and do neither
#
# What follows -- goes to each 'furiosa-serve start' as it is. If one of the daemons does not start,
# those that did are stopped. scripts/rolling-restart.sh and scripts/stop-all.sh take the same --set.
#
# One daemon over all devices (scripts/serve-all.sh) routes by what each worker holds in its cache,
# and moves requests when a worker dies; separate daemons share nothing, so that one can be
# restarted, replaced or lost without the others.
set -euo pipefail
# shellcheck source=scripts/daemons.sh
source "$(dirname "${BASH_SOURCE[0]}")/daemons.sh"

model="" per=card devices="" set="set" base_port=8001 unix_dir="" front_port=8000 nginx_conf=""
options=()
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help) show_help && exit 0 ;;
    --per) per="$(value "$@")" && shift ;;
    --devices) devices="$(value "$@")" && shift ;;
    --set) set="$(value "$@")" && shift ;;
    --base-port) base_port="$(value "$@")" && shift ;;
    --unix) unix_dir="$(value "$@")" && shift ;;
    --front-port) front_port="$(value "$@")" && shift ;;
    --nginx-conf) nginx_conf="$(value "$@")" && shift ;;
    --dry-run) DRY_RUN=1 ;;
    --) shift && options=("$@") && break ;;
    -*) usage_error "there is no option $1" ;;
    *) [ -z "$model" ] || usage_error "two models, $model and $1" && model="$1" ;;
    esac
    shift
done
[ -n "$model" ] || usage_error "there is no MODEL"
check_set "$set"
check_number --base-port "$base_port"
check_number --front-port "$front_port"
case "$per" in card | pe) ;; *) usage_error "--per: '$per' is not card or pe" ;; esac
[ -n "$nginx_conf" ] ||
    nginx_conf="${XDG_CONFIG_HOME:-$HOME/.config}/furiosa-serve/$set.nginx.conf"

if [ -n "$devices" ]; then
    IFS=, read -ra entries <<<"$devices"
elif [ "$per" = pe ]; then
    mapfile -t entries < <(pes)
else
    mapfile -t entries < <(cards)
fi
[ "${#entries[@]}" -gt 0 ] || fail "'${SERVE[*]} devices' names no device"

# The address of the i-th daemon, as nginx names it.
upstream() {
    if [ -n "$unix_dir" ]; then echo "unix:$unix_dir/$set-$1.sock"; else
        echo "127.0.0.1:$((base_port + $1))"
    fi
}

# A whole configuration, so that it runs by itself and without root.
write_nginx_conf() {
    local i
    cat <<EOF
# Written by scripts/serve-per-device.sh for the daemons $set-0 to $set-$((${#entries[@]} - 1)).
# Run it with: nginx -e stderr -c $nginx_conf
worker_processes auto;
$([ -z "$unix_dir" ] || [ "$(id -u)" -ne 0 ] ||
        echo "user root;    # the daemons' sockets are for their owner alone")
pid $nginx_conf.pid;
error_log stderr;
events { worker_connections 8192; }
http {
    access_log off;
    client_body_temp_path $nginx_conf.tmp/body;
    proxy_temp_path $nginx_conf.tmp/proxy;
    fastcgi_temp_path $nginx_conf.tmp/fastcgi;
    uwsgi_temp_path $nginx_conf.tmp/uwsgi;
    scgi_temp_path $nginx_conf.tmp/scgi;
    upstream furiosa_serve {
        least_conn;     # answers differ in length by far too much to go round in turn
        keepalive 256;
        # max_fails=0: a daemon that is down refuses at once and may be back within the second, so
        # that none is worth being left out for a while, let alone all of them.
$(for i in "${!entries[@]}"; do
        echo "        server $(upstream "$i") max_fails=0;"
    done)
    }
    server {
        listen $front_port reuseport;
        client_max_body_size 8m;
        client_body_buffer_size 1m;
        location / {
            proxy_pass http://furiosa_serve;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host \$host;
            proxy_buffering off;            # a stream's tokens are passed on as they come
            proxy_connect_timeout 2s;
            proxy_read_timeout 1h;
            # A daemon that drains or starts answers 503 at once, and one that is down not at all:
            # the next one is asked then, for a POST too, since answering has no side effects.
            proxy_next_upstream error http_503 non_idempotent;
            proxy_next_upstream_tries ${#entries[@]};
        }
    }
}
EOF
}

started=()
stop_started() {
    local name
    echo "stopping the daemons that did start" >&2
    for name in "${started[@]}"; do
        run "${SERVE[@]}" stop --name "$name" --timeout 0 || true
    done
}

[ -z "$unix_dir" ] || run mkdir -p "$unix_dir"
for i in "${!entries[@]}"; do
    listen=(--port $((base_port + i)))
    [ -z "$unix_dir" ] || listen=(--uds "$unix_dir/$set-$i.sock")
    code=0
    run "${SERVE[@]}" start "$model" --name "$set-$i" --devices "${entries[i]}" "${listen[@]}" \
        "${options[@]}" || code=$?
    if [ "$code" -ne 0 ]; then
        stop_started
        exit "$code"
    fi
    started+=("$set-$i")
done

if [ "$DRY_RUN" = 1 ]; then
    echo "+ write $nginx_conf:" >&2
    write_nginx_conf >&2
else
    mkdir -p "$(dirname "$nginx_conf")" "$nginx_conf.tmp"
    write_nginx_conf >"$nginx_conf.new"
    mv "$nginx_conf.new" "$nginx_conf"
    echo "${#entries[@]} daemons serve $model; their front: nginx -e stderr -c $nginx_conf"
fi
