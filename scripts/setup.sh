#!/usr/bin/env bash
# Installs what the demo and the tests need and is not there yet (as root on Debian or Ubuntu); otherwise says what is missing
# and ends with status 1. Called without change on every `make demo` and `make test`, so it is quick when all is there.
#
# usage: scripts/setup.sh [--demo | --bench]      --demo: only what the demo needs; --bench: what the benches need, too
set -euo pipefail

PATH="$PATH:/usr/sbin:/sbin"

# command  package
demo_needs="
cc           gcc
jq           jq
mkfs.ext4    e2fsprogs
debugfs      e2fsprogs
nbdcopy      libnbd-bin
qemu-io      qemu-utils
cmp          diffutils
"
test_needs="
nbdinfo      libnbd-bin
nbdfuse      libnbd-bin
nbdkit       nbdkit
qemu-img     qemu-utils
qemu-nbd     qemu-utils
fio          fio
mkfs.xfs     xfsprogs
mkfs.btrfs   btrfs-progs
sfdisk       fdisk
setpriv      util-linux
pg_ctlcluster        postgresql
qemu-system-x86_64   qemu-system-x86
xfs_repair   xfsprogs
e2fsck       e2fsprogs
losetup      util-linux
mount        mount
fusermount3  fuse3
python3      python3
"

bench_needs="
qemu-storage-daemon qemu-system-common
"

needs=$demo_needs
[ "${1:-}" = --demo ] || needs+=$test_needs
[ "${1:-}" != --bench ] || needs+=$bench_needs

# Debian's packages of the commands that are not there, each once.
missing() {
    while read -r command package; do
        [ -z "$command" ] || command -v "$command" >/dev/null 2>&1 || echo "$package"
    done <<<"$needs" | sort -u
}

install() {
    echo "setup: installing $*"
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" >/dev/null
}

mapfile -t packages < <(missing)
if [ ${#packages[@]} -gt 0 ]; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "setup: missing packages (Debian's names): ${packages[*]}" >&2
        echo "setup: install them, for example: sudo apt-get install ${packages[*]}" >&2
        exit 1
    fi
    # The package lists may be old, or not there at all.
    install "${packages[@]}" 2>/dev/null || { apt-get update >/dev/null && install "${packages[@]}"; }
    # To install one package apt may have taken away another that is not of this Debian (qemu-utils of a newer one, for the sake
    # of qemu-system-x86): its command is missing only now.
    mapfile -t packages < <(missing)
    [ ${#packages[@]} = 0 ] || install "${packages[@]}"
    mapfile -t packages < <(missing)
    if [ ${#packages[@]} -gt 0 ]; then
        echo "setup: apt has installed ${packages[*]}, and a command of theirs is still missing" >&2
        exit 1
    fi
fi

if ! command -v cargo >/dev/null; then
    echo "setup: Rust is missing: install it with rustup (a distribution's cargo may be too old), at least Rust $(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$(dirname "$0")/../Cargo.toml")" >&2
    exit 1
fi
