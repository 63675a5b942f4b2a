#!/usr/bin/env bash
# Everything that must hold before a change lands: format, lints, docs, unit tests, simulator, whole-agent tests with real
# clients. The last line is "N passed, N failed"; the exit status is 0 only when nothing failed. What this machine cannot run is skipped, but not
# for want of root, FUSE or loop devices where all three are there: CDP_REQUIRE_ALL=1, set here unless the caller did, makes failures of that.
#
# usage: scripts/test.sh
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
passed=0
failed=0
broken=()

# Steps without counts of their own count as one.
step() {
    local name=$1 start=$SECONDS
    shift
    echo "==> $name: $*"
    "$@" 2>&1 | tee "$logs/step"
    local status=${PIPESTATUS[0]}
    local p f
    p=$(sed -n 's/^test result: .* \([0-9]*\) passed; .*/\1/p' "$logs/step" | paste -sd+ | bc_sum)
    f=$(sed -n 's/^test result: .* \([0-9]*\) failed; .*/\1/p' "$logs/step" | paste -sd+ | bc_sum)
    if [ "$((p + f))" = 0 ]; then
        if [ "$status" = 0 ]; then p=1; else f=1; fi
    elif [ "$status" != 0 ] && [ "$f" = 0 ]; then
        f=1 # a test process that died did not count its failure
    fi
    passed=$((passed + p))
    failed=$((failed + f))
    [ "$status" = 0 ] || broken+=("$name")
    echo "==> $name: status $status, $((SECONDS - start)) s"
    return "$status"
}

bc_sum() {
    local sum
    read -r sum || true
    echo $((${sum:-0}))
}

# The units as they are, but with the binary just built: systemd checks that it exists. Silence is its good answer.
check_units() {
    local unit said
    for unit in systemd/*.service; do
        sed "s#/usr/bin/cdp-agent#$CDP_BIN/cdp-agent#g" "$unit" >"$logs/$(basename "$unit")"
        said=$(systemd-analyze verify --man=no "$logs/$(basename "$unit")" 2>&1) || { echo "$said"; return 1; }
        [ -z "$said" ] || { echo "$said"; return 1; }
    done
}

# Whether tests have what they ask for in `tests/src/local.rs`.
has_all() {
    [ "$(id -u)" = 0 ] && [ -c /dev/fuse ] && [ -c /dev/loop-control ] &&
        (exec 3<>/dev/fuse 4<>/dev/loop-control) 2>/dev/null && PATH="$PATH:/usr/sbin:/sbin" losetup --find >/dev/null 2>&1
}

finish() {
    [ ${#broken[@]} = 0 ] || printf 'failed: %s\n' "${broken[@]}"
    # They ended well, and have shown nothing, or not all: this machine cannot run them.
    local skipped=0
    if [ -s "$logs/skipped" ]; then
        sed 's/^/skipped: /' "$logs/skipped"
        skipped=$(sed 's/: .*//' "$logs/skipped" | sort -u | wc -l)
        echo "$skipped skipped"
    fi
    echo "$((passed - skipped)) passed, $failed failed"
    [ "$failed" = 0 ] && [ ${#broken[@]} = 0 ]
    exit
}

export CARGO_TERM_COLOR=never

step setup scripts/setup.sh || finish
step format cargo fmt --all --check
# The rest wants code that compiles.
step lints cargo clippy --locked --workspace --all-targets -- -D warnings || finish
step docs env RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --document-private-items
step "unit tests" cargo test --locked --workspace --exclude cdp-tests --no-fail-fast
# Without the fuzz targets: their doors to the parsers are not for a product.
step build cargo build --locked --release --workspace --exclude cdp-fuzz || finish
# With panics caught: they are findings with a seed.
step "build of the simulator" cargo build --locked --profile sim -p cdp-sim || finish
# Fixed seeds, so that a change fails by its own fault; `make soak` takes others. At least 20,000 histories have crashes.
histories=${CDP_SIM_HISTORIES:-32000}
step simulator target/sim/cdp-sim --seed 200000 --histories "$histories" --least-crashed "$((histories * 5 / 8))" --threads 2
# What came after the profiles of `all`; a history of `ring` takes as long as many others.
later=$((histories / 32))
step "simulator, later profiles" target/sim/cdp-sim --profile more --seed 200000 --histories "$later" --least-crashed "$((later / 2))" --threads 2
step exhaustion target/sim/cdp-sim --exhaust 3 --subsets 1 --stride 2 --threads 2
step "deliberate faults" cargo test --locked -p cdp-sim --features mutations --test mutations
# A workspace of its own, with a flag of its own.
step loom env RUSTFLAGS="--cfg loom" cargo test --locked --release --manifest-path loom/Cargo.toml --target-dir target/loom
export CDP_BIN="$PWD/target/release"
export CDP_SKIPPED="$logs/skipped"
if [ -z "${CDP_REQUIRE_ALL+set}" ] && has_all; then export CDP_REQUIRE_ALL=1; fi
step "whole-agent tests" cargo test --locked --release -p cdp-tests --no-fail-fast
if command -v systemd-analyze >/dev/null; then
    step units check_units
else
    echo "==> units: skipped, there is no systemd-analyze here"
fi
finish
