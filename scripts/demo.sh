#!/usr/bin/env bash
# Protects a volume, damages it, looks at it as it was, takes it back, and takes that back too; each step says what it proves.
# Ends with an error as soon as one proof fails. Leaves its folder, and the agent's disks in it, to play with.
#
# usage: scripts/demo.sh [FOLDER]       FOLDER: a new or empty folder (default: a fresh one under /var/tmp)
# CDP_BIN: a folder with cdp-agent and cdpctl, when they are not to be built
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PATH:/usr/sbin:/sbin"

scripts/setup.sh --demo
if [ -n "${CDP_BIN:-}" ]; then
    bin=$(cd "$CDP_BIN" && pwd)
else
    echo "Building (the first time takes a few minutes) ..."
    cargo build --locked --release --quiet --bin cdp-agent --bin cdpctl
    bin=$PWD/target/release
fi

started=$SECONDS
if [ $# -gt 0 ]; then
    mkdir -p "$1"
    dir=$(cd "$1" && pwd)
    if [ -n "$(ls -A "$dir")" ]; then
        echo "demo: $dir is not empty" >&2
        exit 2
    fi
else
    dir=$(mktemp -d /var/tmp/cdp-demo.XXXXXX)
fi

agent=
finished=
device=
# What a mounted database needs to go away; harmless where there is none.
leave_database() {
    for data in "$dir/then/data" "$dir/db/data"; do
        [ ! -e "$data/postmaster.pid" ] || postgres "$pg/pg_ctl" -D "$data" -m immediate -s stop || true
    done
    ! mountpoint -q "$dir/db" || umount "$dir/db" || umount --lazy "$dir/db"
    [ -z "$device" ] || losetup -d "$device" || true
    device=
}

on_exit() {
    local status=$?
    set +e # whatever cannot be taken away, the rest is
    [ -z "$device" ] || leave_database
    if [ -n "$agent" ] && kill -0 "$agent" 2>/dev/null; then
        kill "$agent"
        wait "$agent" || true
    fi
    if [ -z "$finished" ]; then
        echo "demo: FAILED (status $status). The folder is $dir; the agent's log ends with:" >&2
        tail -n 20 "$dir/agent.log" >&2 2>/dev/null || true
        exit 1
    fi
}
trap on_exit EXIT
trap 'exit 130' INT TERM

step=0
say() {
    step=$((step + 1))
    printf '\n\033[1m%s. %s\033[0m\n' "$step" "$1"
}
note() { printf '   %s\n' "$*"; }
proof() { printf '   \033[32mproved:\033[0m %s\n' "$*"; }
fail() {
    printf '   \033[31mNOT proved:\033[0m %s\n' "$*" >&2
    exit 1
}
shown() {
    # Shows a command, then runs it.
    printf '   $ %s\n' "$(sed "s#$bin/##; s#$dir/##g" <<<"$*")"
    "$@"
}
indent() { sed 's/^/     /'; }
now() { date +%s%N; }
at() { date -d "@${1:0:10}.${1:10}" +%H:%M:%S.%N; }
# An instant out of JSON, exact: older versions of jq round numbers of this size.
number() { sed -n "s/.*\"$1\": *\([0-9]*\).*/\1/p" | head -n 1; }
sum() { sha256sum "$1" | cut -d' ' -f1; }

export CDP_AGENT="unix:$dir/agent.sock"
cdpctl() { "$bin/cdpctl" "$@"; }
volume_uri="nbd+unix:///demo?socket=$dir/nbd.sock"

start_agent() {
    "$bin/cdp-agent" --dev "$dir" --size 64MiB --cdp-size 1GiB >>"$dir/agent.log" 2>&1 &
    agent=$!
    for _ in $(seq 300); do
        if cdpctl info demo >/dev/null 2>&1 && [ -S "$dir/nbd.sock" ]; then return; fi
        kill -0 "$agent" 2>/dev/null || fail "the agent ended"
        sleep 0.1
    done
    fail "the agent did not come up"
}

# Writes the blocks in which two images differ to the volume over NBD, as a guest would that changed these files.
push_changes() {
    local old=$1 new=$2 first count commands=()
    local pieces="$dir/work/pieces"
    rm -rf "$pieces"
    mkdir -p "$pieces"
    while read -r first count; do
        dd if="$new" of="$pieces/$first" bs=4096 skip="$first" count="$count" status=none
        commands+=(-c "write -q -s $pieces/$first $((first * 4096)) $((count * 4096))")
        # qemu-io takes no endless command line.
        if [ ${#commands[@]} -ge 400 ]; then
            qemu-io -f raw "${commands[@]}" "$volume_uri"
            commands=()
        fi
    done < <({ cmp -l "$old" "$new" || true; } | awk '
        { block = int(($1 - 1) / 4096) }
        NR == 1 { first = last = block; next }
        block > last + 1 || block - first >= 64 { print first, last - first + 1; first = block }
        { last = block }
        END { if (NR) print first, last - first + 1 }')
    qemu-io -f raw ${commands[@]+"${commands[@]}"} -c flush "$volume_uri"
}

# Changes files of the file system on the volume: debugfs commands on standard input.
change_files() {
    cp --sparse=always "$dir/work/now.img" "$dir/work/next.img"
    debugfs -w -f /dev/stdin "$dir/work/next.img" >/dev/null 2>"$dir/work/debugfs.log"
    push_changes "$dir/work/now.img" "$dir/work/next.img"
    mv "$dir/work/next.img" "$dir/work/now.img"
}

# Checksums of all files of the file system in an image, which must be sound.
checksums() {
    local image=$1 out=$2
    e2fsck -fn "$image" >"$dir/work/e2fsck.log" 2>&1 || fail "e2fsck finds faults: $(tail -n 3 "$dir/work/e2fsck.log")"
    rm -rf "$out.tree"
    mkdir -p "$out.tree"
    debugfs -R "rdump / $out.tree" "$image" >/dev/null 2>&1
    (cd "$out.tree" && find . -type f -print0 | sort -z | xargs -0 sha256sum) >"$out"
    rm -rf "$out.tree"
}

# What the volume itself shows now.
volume_checksums() {
    rm -f "$dir/work/volume.img"
    nbdcopy "$volume_uri" "$dir/work/volume.img"
    checksums "$dir/work/volume.img" "$1"
}

echo
echo "Everything happens in $dir"
mkdir -p "$dir/work"

say "Start the agent on a fresh volume of 64 MiB with a CDP disk of 1 GiB"
note "\$ cdp-agent --dev $dir --size 64MiB --cdp-size 1GiB"
start_agent
note "It is protected from its first write on: there is no base copy to wait for."

say "Make an ext4 file system with real files, and write it to the volume over NBD"
tree="$dir/work/tree"
mkdir -p "$tree/project" "$tree/photos" "$tree/letters"
cp -r README.md docs journal "$tree/project/"
for number in 1 2 3 4 5 6; do head -c $((150000 + number * 50000)) /dev/urandom >"$tree/photos/photo-$number.jpg"; done
printf 'Dear Anna,\n\nthe thesis is done. It is in thesis.txt, and nowhere else.\n' >"$tree/letters/anna.txt"
seq -f 'Line %g of three years of work.' 40000 >"$tree/letters/thesis.txt"
truncate -s 64M "$dir/work/now.img"
mkfs.ext4 -q -F -L demo -d "$tree" "$dir/work/now.img"
shown nbdcopy --flush "$dir/work/now.img" "$volume_uri"
checksums "$dir/work/now.img" "$dir/work/sums-first"
volume_checksums "$dir/work/sums"
cmp -s "$dir/work/sums-first" "$dir/work/sums" || fail "the volume's files differ from what was written"
proof "all $(wc -l <"$dir/work/sums") files on the volume have the checksums of the originals; e2fsck finds no fault"

say "Go on working: edit a file, add some, remove an old one"
printf 'PS: I have added a summary.\n' | cat "$tree/letters/anna.txt" - >"$dir/work/anna-2.txt"
head -c 400000 /dev/urandom >"$dir/work/photo-7.jpg"
change_files <<EOF
cd /letters
rm anna.txt
write $dir/work/anna-2.txt anna.txt
cd /photos
write $dir/work/photo-7.jpg photo-7.jpg
rm photo-1.jpg
EOF
shown "$bin/cdpctl" mark demo --name good-evening | indent
checksums "$dir/work/now.img" "$dir/work/sums-good"
note "Checksum of letters/thesis.txt: $(sum "$tree/letters/thesis.txt")"

say "The accident: the thesis is deleted, and then everything else is overwritten"
sleep 0.3
before_deletion=$(now)
change_files <<EOF
rm /letters/thesis.txt
EOF
deleted=$(now)
note "$(at "$before_deletion")  last moment with the thesis"
note "$(at "$deleted")  the thesis is gone"
for number in 2 3 4 5 6 7; do
    head -c 300000 /dev/urandom >"$dir/work/junk-$number"
    change_files <<EOF
cd /photos
rm photo-$number.jpg
write $dir/work/junk-$number photo-$number.jpg.locked
EOF
done
note "$(at "$(now)")  all photos have been replaced by .locked files"
volume_checksums "$dir/work/sums-bad"
if grep -q thesis.txt "$dir/work/sums-bad"; then fail "the thesis is still there"; fi
[ "$(grep -c locked "$dir/work/sums-bad")" = 6 ] || fail "the photos are not damaged"
proof "on the volume the thesis is gone and 6 photos are .locked: the damage is real"

say "The timeline: every write is there, not only the snapshots somebody thought of"
shown "$bin/cdpctl" timeline demo | indent

say "One file back, from one nanosecond before its deletion began, without touching the volume"
view=$(cdpctl --output json view open demo --at "$before_deletion")
note "\$ cdpctl view open demo --at $before_deletion"
view_id=$(jq -r .id <<<"$view")
view_uri=$(jq -r .nbd_uri <<<"$view")
[ "$(number time <<<"$view")" = "$before_deletion" ] || fail "the view shows another instant"
shown nbdcopy "$view_uri" "$dir/work/view.img"
debugfs -R "dump /letters/thesis.txt $dir/work/thesis.txt" "$dir/work/view.img" 2>/dev/null
cmp -s "$dir/work/thesis.txt" "$tree/letters/thesis.txt" || fail "the file from the view is not the thesis"
checksums "$dir/work/view.img" "$dir/work/sums"
cmp -s "$dir/work/sums" "$dir/work/sums-good" || fail "the view's files differ from those of that moment"
proof "thesis.txt is back: $(sum "$dir/work/thesis.txt"); all other files in the view are those of that moment"
shown "$bin/cdpctl" view close "$view_id" | indent

say "The whole volume back to the marker good-evening"
shown "$bin/cdpctl" revert demo --at good-evening --dry-run | indent
reverted=$(cdpctl --output json revert demo --at good-evening)
note "\$ cdpctl revert demo --at good-evening"
undo=$(number undo_time <<<"$reverted")
volume_checksums "$dir/work/sums"
cmp -s "$dir/work/sums" "$dir/work/sums-good" || fail "the reverted volume differs from the good state"
proof "all $(wc -l <"$dir/work/sums") files of that evening are on the volume again; e2fsck finds no fault"

say "The revert undone: it is one more event in the history"
note "\$ cdpctl revert demo --at $undo"
cdpctl revert demo --at "$undo" >/dev/null
volume_checksums "$dir/work/sums"
cmp -s "$dir/work/sums" "$dir/work/sums-bad" || fail "the volume differs from the state before the revert"
proof "every file is as the accident left it: nothing that was ever on the volume is lost"

say "And back to the good state for you; then the agent is killed (kill -9) and started again"
cdpctl revert demo --at good-evening >/dev/null
kill -9 "$agent"
wait "$agent" 2>/dev/null || true
start_agent
volume_checksums "$dir/work/sums"
cmp -s "$dir/work/sums" "$dir/work/sums-good" || fail "after a kill the volume differs"
proof "after kill -9 right behind the revert the volume shows the good state"
cdpctl info demo | indent

# PostgreSQL's programs, where everything is there that a mounted database needs.
pg=$({ find /usr/lib/postgresql -path '*/bin/initdb' -printf '%h\n' 2>/dev/null || true; } | sort -V | tail -n 1)
postgres() { (cd / && LC_ALL=C setpriv --reuid=postgres --regid="$(id -g postgres)" --clear-groups -- "$@"); }
sql() { postgres "$pg/psql" -X -q -A -t -v ON_ERROR_STOP=1 -h "$1/data" -U postgres -c "$2" postgres; }
start_database() {
    rm -f "$1/data/postmaster.pid" "$1"/data/.s.PGSQL.*
    postgres "$pg/pg_ctl" -D "$1/data" -l "$1/data/log" -w -t 60 -s start
}
mount_volume() {
    device=$(losetup --find --show "$dir/volumes/db")
    mount "$device" "$dir/db"
}
if [ -n "$pg" ] && [ "$(id -u)" = 0 ] && id postgres >/dev/null 2>&1 && [ -e "$dir/volumes/demo" ] && losetup -f >/dev/null 2>&1; then
    say "A database: a table is dropped, seen as it was, and taken back"
    note "\$ cdpctl volume add db --path $dir/db.img --size 256MiB --create"
    cdpctl edit demo --reserve-capacity 500MiB >/dev/null
    cdpctl volume add db --path "$dir/db.img" --size 256MiB --create >/dev/null
    cdpctl edit db --reserve-capacity 450MiB --reserve-duration 1h >/dev/null
    cdpctl enable db >/dev/null
    chmod 711 "$dir"
    mkdir "$dir/db"
    mkfs.ext4 -q -F "$dir/volumes/db"
    mount_volume
    chown postgres "$dir/db"
    postgres "$pg/initdb" -D "$dir/db/data" -U postgres -A trust -N --wal-segsize=4 >/dev/null
    printf "listen_addresses = ''\nunix_socket_directories = '.'\nwal_level = minimal\nmax_wal_senders = 0\nmax_wal_size = 64MB\nmin_wal_size = 16MB\n" \
        >>"$dir/db/data/postgresql.conf"
    sync -f "$dir/db"
    start_database "$dir/db"
    sql "$dir/db" "CREATE TABLE orders AS SELECT id, md5(id::text) AS item FROM generate_series(1, 10000) AS id"
    question="SELECT count(*), md5(string_agg(item, '' ORDER BY id)) FROM orders"
    orders=$(sql "$dir/db" "$question")
    note "orders: $orders"
    before_drop=$(now)
    note "\$ psql -c 'DROP TABLE orders'"
    sql "$dir/db" "DROP TABLE orders"
    ! sql "$dir/db" "$question" >/dev/null 2>&1 || fail "the table is still there"
    note "\$ cdpctl view open db --at $before_drop --writable --mount $dir/then"
    view_id=$(cdpctl --output json view open db --at "$before_drop" --writable --mount "$dir/then" | jq -r .id)
    start_database "$dir/then"
    [ "$(sql "$dir/then" "$question")" = "$orders" ] || fail "the database on the view has other orders"
    postgres "$pg/pg_ctl" -D "$dir/then/data" -m immediate -s stop
    cdpctl view close "$view_id" >/dev/null
    proof "PostgreSQL starts on a view of the nanosecond before, beside the one that runs, and has all its orders"
    postgres "$pg/pg_ctl" -D "$dir/db/data" -m immediate -s stop
    leave_database
    note "\$ cdpctl revert db --at $before_drop"
    cdpctl revert db --at "$before_drop" >/dev/null
    mount_volume
    start_database "$dir/db"
    [ "$(sql "$dir/db" "$question")" = "$orders" ] || fail "the reverted database has other orders"
    postgres "$pg/pg_ctl" -D "$dir/db/data" -m fast -s stop
    leave_database
    proof "the volume is back, and the database with it: $orders"
fi

kill "$agent"
wait "$agent" || fail "the agent did not stop cleanly"
agent=
cmp "$dir/primary.img" "$dir/work/volume.img" >/dev/null || fail "after a clean stop the primary differs"
rm -rf "$dir/work/pieces" "$dir/work/view.img" "$dir/work/volume.img"
finished=yes

cat <<EOF

Done in $((SECONDS - started)) s. Everything above was checked; nothing was only shown.

To play with it, start the agent again:
  $bin/cdp-agent --dev $dir --size 64MiB --cdp-size 1GiB
and in another terminal:
  export CDP_AGENT=unix:$dir/agent.sock PATH=$bin:\$PATH
  cdpctl info demo
  cdpctl timeline demo
  cdpctl view open demo --at $before_deletion         # read it with nbdcopy, qemu-img, qemu-nbd, nbdfuse ...
  cdpctl revert demo --at good-evening --dry-run
The thesis was deleted between $before_deletion and $deleted.
To remove it all: rm -rf $dir
EOF
