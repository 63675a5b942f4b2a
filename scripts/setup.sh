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

packages=()
while read -r command package; do
    [ -n "$command" ] || continue
    command -v "$command" >/dev/null 2>&1 || packages+=("$package")
done <<<"$needs"

if [ ${#packages[@]} -gt 0 ]; then
    mapfile -t packages < <(printf '%s\n' "${packages[@]}" | sort -u)
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "setup: installing ${packages[*]}"
        export DEBIAN_FRONTEND=noninteractive
        apt-get install -y --no-install-recommends "${packages[@]}" >/dev/null 2>&1 || {
            # The package lists may be old, or not there at all.
            apt-get update >/dev/null
            apt-get install -y --no-install-recommends "${packages[@]}" >/dev/null
        }
    else
        echo "setup: missing packages (Debian's names): ${packages[*]}" >&2
        echo "setup: install them, for example: sudo apt-get install ${packages[*]}" >&2
        exit 1
    fi
fi

if ! command -v cargo >/dev/null; then
    echo "setup: Rust is missing: install rustup or Debian's cargo, at least Rust $(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$(dirname "$0")/../Cargo.toml")" >&2
    exit 1
fi
