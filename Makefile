# The commands of everyday: each does all that it needs, also on a fresh machine.

.PHONY: demo test soak bench bench-first build man

build:            ## release binaries in target/release
	cargo build --locked --release

man:              ## manual pages in target/man
	cargo build --locked --release -p cdpctl
	target/release/cdpctl man target/man

demo:             ## protect a volume, damage it, look back, take it back (a minute after the build)
	scripts/demo.sh

test:             ## everything that must hold before a change lands
	scripts/test.sh

SOAK_S ?= 600
soak:             ## the random tests with fresh seeds, SOAK_S seconds long
	scripts/soak.sh $(SOAK_S)

BENCH_FLAGS = $(if $(QUICK),--quick) $(if $(FULL),--full) $(if $(SIZE),--size $(SIZE)) $(if $(DIR),--dir $(DIR))
bench:            ## beside other block servers on the same disk: docs/benchmarks.md (QUICK=1: 3 minutes; FULL=1: all rows)
	scripts/setup.sh --bench
	cargo build --locked --release --bin cdp-agent --bin cdpctl --bin cdp-bench
	python3 benches/bench.py $(BENCH_FLAGS)

bench-first:      ## one figure only: protected random writes beside qemu-nbd
	scripts/bench-first.sh
