#!/usr/bin/env bash
# The random tests with fresh seeds, for as long as asked: the simulator (all profiles), the exhaustion of four operations, kill -9
# loops, power cuts and faults against the built agent, the fuzzers. Goes on after a failure; each prints what replays it. The last line has the counts; the
# exit status is 0 only when nothing failed.
#
# usage: scripts/soak.sh [SECONDS]      (default: 600; the builds before it do not count)
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

seconds=${1:-600}
[[ $seconds =~ ^[0-9]+$ ]] || { sed -n 's/^# usage: /usage: /p' "$0" >&2 && exit 2; }
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
trap 'exit 130' INT TERM
export CARGO_TERM_COLOR=never

scripts/setup.sh || exit 1
cargo build --locked --release --workspace --exclude cdp-fuzz || exit 1
cargo build --locked --profile sim -p cdp-sim || exit 1
# With overflow checks and assertions, which a release has not.
cargo build --locked -p cdp-fuzz || exit 1
cargo test --locked --release -p cdp-tests --no-run || exit 1
export CDP_BIN="$PWD/target/release"

share() { echo $((seconds * $1 / 100)); }
failed=0

# Simulates with some profiles for so many hundredths of the time.
simulate() {
    echo "==> simulator, profiles of $1: $(share "$2") s"
    target/sim/cdp-sim --profile "$1" --seed "$(($(date +%s) * 100000))" --seconds "$(share "$2")" --threads 2 --keep-going | tee "$logs/sim-$1"
    [ "${PIPESTATUS[0]}" = 0 ] || failed=$((failed + 1))
}
simulate all 20
simulate more 10
histories=$(sed -n 's/^\([0-9]*\) histories, .*/\1/p' "$logs"/sim-* | paste -sd+)
histories=${histories:+$((histories))}
violations=$(sed -n 's/^[0-9]* histories, \([0-9]*\) violations.*/\1/p' "$logs"/sim-* | paste -sd+)
violations=${violations:+$((violations))}

# Goes on where the last soak ended it, so that a few short ones try all of it; then it begins anew.
kept=target/exhaust-4
from=$(cat "$kept" 2>/dev/null)
[[ $from =~ ^[0-9]+$ ]] || from=1
echo "==> exhaustion, four operations, from $from on: at most $(share 15) s"
target/sim/cdp-sim --exhaust 4 --subsets 1 --seed "$from" --seconds "$(share 15)" --threads 2 | tee "$logs/exhaust"
[ "${PIPESTATUS[0]}" = 0 ] || failed=$((failed + 1))
next=$(sed -n 's/^[0-9]* of .*; --seed \([0-9]*\) goes on$/\1/p' "$logs/exhaust")
[ -z "$next" ] || echo "$next" >"$kept"
exhausted=$(sed -n 's/^\([0-9]* of [0-9]* sequences of 4, [0-9]* cases, [0-9]* violations\), .*, \(from [0-9]* on\);.*/\1 (\2)/p' "$logs/exhaust")

# Runs a test file again and again, each time with a seed of its own; prints how often, and how often it failed.
again() {
    local name=$1 end=$((SECONDS + $2)) runs=0 bad=0
    shift 2
    while [ "$SECONDS" -lt "$end" ]; do
        runs=$((runs + 1))
        # The other files draw their seeds themselves.
        [ "$name" != faults ] || export CDP_SEED_SHIFT=$((RANDOM * 32768 + RANDOM + 1))
        if ! cargo test --locked --release -p cdp-tests --test "$name" -- --nocapture "$@" >"$logs/$name" 2>&1; then
            bad=$((bad + 1))
            echo "==> $name failed:" >&2
            cat "$logs/$name" >&2
        fi
    done
    echo "$runs $bad"
}

echo "==> kill -9 loops: $(share 15) s"
read -r kills kills_bad < <(again crash "$(share 15)")
echo "==> power cuts: $(share 15) s"
read -r cuts cuts_bad < <(again power_cut "$(share 15)")
echo "==> faults: $(share 5) s"
read -r faults faults_bad < <(again faults "$(share 5)")

echo "==> fuzzers: $(share 20) s"
target/debug/cdp-fuzz "$(share 20)" | tee "$logs/fuzz"
[ "${PIPESTATUS[0]}" = 0 ] || failed=$((failed + 1))
inputs=$(sed -n 's/^fuzz: .* targets, \([0-9]*\) inputs.*/\1/p' "$logs/fuzz")
crashes=$(sed -n 's/^fuzz: .* inputs, \([0-9]*\) crashes.*/\1/p' "$logs/fuzz")

failed=$((failed + kills_bad + cuts_bad + faults_bad))
echo "soak of $seconds s: ${histories:-0} simulated histories with ${violations:-?} violations, ${exhausted:-no exhaustion}, $kills runs of the kill loops ($kills_bad" \
    "failed), $cuts of the power cuts ($cuts_bad failed), $faults of the faults ($faults_bad failed), ${inputs:-0} fuzzed inputs with" \
    "${crashes:-?} crashes; commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
[ "$failed" = 0 ]
