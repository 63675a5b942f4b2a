#!/usr/bin/env bash
# The agent's unit tests under ThreadSanitizer: its reports, sorted and counted. The standard library is not built with it, so what that synchronises is not
# seen, and most reports say nothing (docs/testing.md, "Threads"). What counts are reports of which both accesses are in this project's own code (frames of
# Rust's core and of memcpy aside): they are printed, and the exit status is 1. So it is when a test fails.
#
# usage: scripts/tsan.sh [TEST...]      (parts of the names of tests; default: all)
#
# Wants a nightly toolchain, and llvm-symbolizer or addr2line. What it builds is in target/tsan.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

case ${1:-} in
-h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" && exit 0 ;;
-*) sed -n 's/^# usage: /usage: /p' "$0" >&2 && exit 2 ;;
esac
host=$(rustc +nightly -vV 2>/dev/null | sed -n 's/^host: //p')
[ -n "$host" ] || { echo "tsan: there is no nightly toolchain: rustup toolchain install nightly" >&2; exit 1; }
command -v llvm-symbolizer >/dev/null || command -v addr2line >/dev/null ||
    { echo "tsan: there is no llvm-symbolizer (Debian: llvm) and no addr2line (binutils)" >&2; exit 1; }
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
trap 'exit 130' INT TERM

failed=0
# Reports alone fail no test: they are sorted below.
TSAN_OPTIONS="exitcode=0 log_path=$logs/report ${TSAN_OPTIONS:-}" \
    RUSTFLAGS="-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer" \
    cargo +nightly test --locked -p cdp-agent --lib --target "$host" --target-dir target/tsan -- "$@" || failed=1

find "$logs" -name 'report.*' -exec cat {} + | awk -v root="$PWD/" '
    function ends() {
        if (!inside) return
        inside = access = looking = 0
        reports++
        if (accesses == 2 && owned == 2) { own++; print text }
        else if (arc) arcs++
        else others++
    }
    /^WARNING: ThreadSanitizer: / { ends(); inside = 1; accesses = owned = arc = 0; text = "" }
    inside { text = text $0 "\n" }
    # The heading of a stack: of an access, or of where threads and memory come from.
    inside && /^  [^ ]/ {
        access = looking = ($0 ~ /^  (Previous )?([Aa]tomic )?([Rr]ead|[Ww]rite) of size/)
        accesses += access
    }
    access && /^    #/ && /alloc::sync::Arc/ && /drop/ { arc = 1 }
    inside && /\.rs:/ { named = 1 }
    # The first frame that says whose access it is.
    looking && /^    #/ && !/library\/core\// && !/#[0-9]+ (__tsan_[a-z0-9_]*|mem(cpy|move|set|cmp)|bcmp) / {
        looking = 0
        if (index($0, root) || $0 ~ / (agent|journal|proto)\/src\//) owned++
    }
    /^SUMMARY: ThreadSanitizer: / { ends() }
    END {
        ends()
        if (reports && !named) { print "tsan: the reports name no places: does the symbolizer work?"; exit 1 }
        printf "tsan: %d reports: %d between two accesses of own code, %d where an Arc is dropped, %d others\n", reports, own, arcs, others
        exit (own > 0)
    }' || failed=1
exit "$failed"
