"""The model of docs/performance.md as a program: predicts a protected volume's rates from what the disk, the socket and one core give.

`bench.py` draws it beside the curves, from figures of the same run: none of them is a rate of a protected volume, only the processor time of a write is
taken from one. Run by itself it prints what it says of three kinds of hosts.
"""
import math
from dataclasses import dataclass

BLOCK = 4096
# Up to so many writes in flight each has a frame of its own. With more, two frames are on their way at once; up to so many writes in flight half of them are
# company enough, with more it takes so many blocks (`EngineConfig`).
ALONE, FRAMES, FEW_WRITES, COMPANY = 4, 2, 16, 20
# Logs that a reservation is cut into, and what a log is charged for a write of a block: the block, its before-image, their overhead.
LOGS, CHARGED = 8, 2 * BLOCK + 400
# The destager takes over at half of the backlog's bound.
BACKLOG = 32 << 20


@dataclass
class Figures:
    """What a host gives."""

    # An append takes so long, and its bytes at this rate besides.
    append_s: float
    append_bytes_s: float
    # Random blocks read and written a second on the primary's disk, half of each, 64 in flight, beside the appends that come with so many.
    random: float
    # Bytes a second that the primary's disk moves in both directions, 512 KiB at a time.
    both_bytes_s: float
    # What a request costs between guest and server, one in flight: a raw server's latency without that of its disk.
    path_s: float
    # Processor time of a write of a block up to its ack, of each random block that is read or written behind that, and of each further byte of a larger write.
    cpu_s: float
    cpu_move_s: float
    cpu_byte_s: float
    # Bytes a second of a CDP disk of its own. `None`: it shares the primary's disk.
    own_bytes_s: float | None = None


def touched_first(writes, blocks):
    """Share of so many uniform random writes that touch a block none of them touched before."""
    return blocks * -math.expm1(-writes / blocks) / writes


def bus(figures, appended, rest):
    """Times a second that so many bytes can be appended and so many others read and written on the primary."""
    if figures.own_bytes_s is None:
        return figures.both_bytes_s / (appended + rest)
    return min(figures.own_bytes_s / appended, figures.both_bytes_s / rest)


def in_step(depth, servers):
    """Requests a second of `depth` clients that wait for each one: `servers` are time alone and requests a second at the most of each server on the way. One that is
    busy a share of its time takes as much longer as if requests came at random (M/M/1): time / (1 - share)."""
    low, high = 0.0, min(most for _, most in servers)
    for _ in range(60):
        rate = (low + high) / 2
        needed = rate * sum(alone / (1 - rate / most) for alone, most in servers)
        low, high = (rate, high) if needed < depth else (low, rate)
    return low


def writes_s(figures, depth=32, size=BLOCK, set_bytes=8 << 30, reserve=8 << 30, volumes=1):
    """Writes a second of uniform random writes, `depth` in flight for each volume, all of one shard, when the backlog is as full as it stays."""
    blocks = set_bytes // BLOCK
    first = touched_first(max(1, reserve // LOGS // CHARGED), blocks)
    reach = touched_first(BACKLOG // BLOCK, blocks)
    # Writes that share a frame.
    per = max(1, size // BLOCK)
    together = 1 if depth <= ALONE else depth / FRAMES if depth <= FEW_WRITES else max(depth / FRAMES, depth - COMPANY / per)
    frame = BLOCK + together * size
    appended, rest = frame / together + first * size, (first + reach) * size
    core = 1 / (figures.cpu_s + (first + reach) * figures.cpu_move_s + (size - BLOCK) * figures.cpu_byte_s)
    disk = min(figures.random / (first + reach), bus(figures, appended, rest))
    # The append waits for what else its disk does; on a disk of its own that is only appends.
    append = disk if figures.own_bytes_s is None else figures.own_bytes_s / appended
    way = [(figures.path_s, core), (figures.append_s + frame / figures.append_bytes_s, append)]
    return min(in_step(depth * volumes, way), disk)


def sequential_bytes_s(figures):
    """Bytes a second of sequential writes: append, read of the old content, its before-image, write to the primary."""
    return bus(figures, 2, 2)


def main():
    # The way through a socket; processor time up to the ack, of each block that is moved behind it, of each further byte; that of a raw server.
    core, raw_cpu_s = (31e-6, 4e-6, 12e-6, 1.7e-9), 16e-6
    hosts = {
        "NVMe": (Figures(20e-6, 2e9, 500e3, 3e9, *core), 500e3, 2.5e9),
        "SATA SSD": (Figures(60e-6, 480e6, 75e3, 500e6, *core), 75e3, 480e6),
        "HDD, the journal on a SATA SSD": (Figures(60e-6, 480e6, 200, 180e6, *core, own_bytes_s=480e6), 200, 180e6),
    }
    print("| host | random, 1 in flight | 4 | 32 | of the raw disk, 32 | sequential, MiB/s | of the raw disk |\n|---|---|---|---|---|---|---|")
    for name, (figures, raw, raw_bytes_s) in hosts.items():
        one, four, many = (writes_s(figures, depth=depth) for depth in (1, 4, 32))
        line = sequential_bytes_s(figures)
        print(f"| {name} | {one:,.0f}/s | {four:,.0f}/s | {many:,.0f}/s | {many / min(raw, 1 / raw_cpu_s):.2f} | {line / (1 << 20):,.0f} | {line / raw_bytes_s:.2f} |")


if __name__ == "__main__":
    main()
