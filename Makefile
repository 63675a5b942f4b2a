# The commands of everyday: each does all that it needs, also on a fresh machine.

.PHONY: demo test soak bench build man

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

bench:            ## a first figure: protected random writes beside qemu-nbd on the same disk
	scripts/bench-first.sh
