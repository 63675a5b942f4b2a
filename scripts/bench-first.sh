#!/usr/bin/env bash
# A first figure: 4 KiB random writes, 32 in flight on one NBD connection, on a protected volume, beside qemu-nbd on the
# same disk, in turns in the same run. Prints a table with machine, command and date, and the ratio of the medians.
#
# usage: scripts/bench-first.sh [--seconds N] [--turns N] [--size MiB] [FOLDER]     (default: 10 s, 3 turns, 1024 MiB, /var/tmp)
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=10
turns=3
size=1024
base=/var/tmp
while [ $# -gt 0 ]; do
    case $1 in
    --seconds) seconds=$2 && shift 2 ;;
    --turns) turns=$2 && shift 2 ;;
    --size) size=$2 && shift 2 ;;
    -*) sed -n 's/^# usage: /usage: /p' "$0" >&2 && exit 2 ;;
    *) base=$1 && shift ;;
    esac
done

scripts/setup.sh
cargo build --locked --release --quiet --bin cdp-agent --bin cdpctl
bin=$PWD/target/release
dir=$(mktemp -d "$base/cdp-bench.XXXXXX")

server=
stop_server() {
    [ -n "$server" ] || return 0
    kill "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
    server=
}
trap 'stop_server; rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM

fio_args=(--name=w --ioengine=nbd --rw=randwrite --bs=4k --iodepth=32 --size="${size}m" --randrepeat=0 --norandommap)

# Waits for the server and runs one timed turn: iops, mean and 99th percentile in microseconds.
measure() {
    local uri=$1
    for _ in $(seq 200); do
        nbdinfo --size "$uri" >/dev/null 2>&1 && break
        sleep 0.05
    done
    fio "${fio_args[@]}" --uri="$uri" --time_based --runtime="$seconds" --ramp_time=2 --output-format=json 2>/dev/null |
        sed -n '/^{/,$p' |
        jq -r '.jobs[0] | if .error != 0 then error("fio failed") else .write end |
            "\(.iops | floor) \(.clat_ns.mean / 1000 | floor) \(.clat_ns.percentile["99.000000"] / 1000 | floor)"'
}

turn_qemu() {
    qemu-nbd -f raw --cache=none --aio=io_uring --persistent --socket="$dir/qemu.sock" "$dir/qemu.img" >>"$dir/qemu.log" 2>&1 &
    server=$!
    measure "nbd+unix:///?socket=$dir/qemu.sock"
    stop_server
}

turn_cdp() {
    "$bin/cdp-agent" --dev "$dir/cdp" --size "${size}MiB" --cdp-size $((size * 8))MiB >>"$dir/agent.log" 2>&1 &
    server=$!
    measure "nbd+unix:///demo?socket=$dir/cdp/nbd.sock"
    stop_server
}

# Both work on a file whose blocks are all there: the first writes to a hole would measure the file system below.
mkdir -p "$dir/cdp"
for file in "$dir/qemu.img" "$dir/cdp/primary.img"; do
    dd if=/dev/urandom of="$file" bs=1M count="$size" conv=fsync status=none
done

: >"$dir/qemu" && : >"$dir/cdp.results"
printf '%-28s %10s %12s %12s\n' "" "IOPS" "mean (us)" "p99 (us)"
for turn in $(seq "$turns"); do
    result=$(turn_qemu)
    echo "$result" >>"$dir/qemu"
    # shellcheck disable=SC2086
    printf '%-28s %10s %12s %12s\n' "qemu-nbd, turn $turn" $result
    result=$(turn_cdp)
    echo "$result" >>"$dir/cdp.results"
    # shellcheck disable=SC2086
    printf '%-28s %10s %12s %12s\n' "cdp-agent, turn $turn" $result
done

median() { cut -d' ' -f1 "$1" | sort -n | sed -n "$(((turns + 1) / 2))p"; }
qemu=$(median "$dir/qemu")
cdp=$(median "$dir/cdp.results")
echo
echo "median: qemu-nbd $qemu, cdp-agent (protected) $cdp: ratio $(awk -v a="$cdp" -v b="$qemu" 'BEGIN { printf "%.2f", a / b }')"
echo "machine: $(nproc) cores, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), Linux $(uname -r), $(stat -f -c %T "$base") at $base"
echo "command: scripts/bench-first.sh --seconds $seconds --turns $turns --size $size   ($(qemu-nbd --version | head -n 1); $(fio --version))"
echo "commit:  $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $(date -u +%Y-%m-%d)"
