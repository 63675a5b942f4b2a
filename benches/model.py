"""The model of docs/performance.md as a program: predicts the curves of a protected volume from what the disk, the socket and one core give.

Everything here is arithmetic on figures that `bench.py` measured in the same run, none of them on a protected volume but the processor time of a write.
"""
import math
from dataclasses import dataclass

BLOCK = 4096
# Frames of a volume on their way at once, and up to how many writes in flight half of them are company enough (`EngineConfig`).
FRAMES, FEW_WRITES = 2, 16
# Logs that a reservation is cut into, and what a log is charged for a write of a block: the block, its before-image, their overhead.
LOGS, CHARGED = 8, 2 * BLOCK + 400
# The destager takes over at half of the backlog's bound.
BACKLOG = 32 << 20


@dataclass
class Figures:
    """Device figures: an append's time is `append_s` and its bytes over `append_bytes_s`."""

    append_s: float
    append_bytes_s: float
    # Random blocks read and written a second, half of each, 64 in flight.
    random: float
    # Bytes a second in both directions, 1 MiB at a time, a quarter of them reads.
    both_bytes_s: float
    # What a request costs between guest and server, one in flight: a raw server's latency without that of its disk.
    path_s: float
    # Processor time of a write of a block, and of each further byte.
    cpu_s: float
    cpu_byte_s: float


def touched_first(writes, blocks):
    """Share of so many uniform random writes that touch a block none of them touched before."""
    return blocks * -math.expm1(-writes / blocks) / writes


def writes_s(figures, depth=32, size=BLOCK, set_bytes=8 << 30, reserve=8 << 30, volumes=1):
    """Writes a second of uniform random writes, `depth` in flight for each volume. The least of what the disk, the bus and the core allow."""
    blocks = set_bytes // BLOCK
    per = max(1, size // BLOCK)
    first = touched_first(max(1, reserve // LOGS // CHARGED), blocks)
    reach = touched_first(BACKLOG // BLOCK, blocks)
    # Writes that share a frame: half of those in flight while they are few; all but those in a second frame of 20 blocks otherwise.
    together = max(1, depth / FRAMES) if depth <= FEW_WRITES else max(depth / FRAMES, depth - 20 / per)
    frame = BLOCK + together * size
    in_flight = depth / (figures.path_s + figures.append_s + frame / figures.append_bytes_s)
    header = BLOCK / (together * size)
    moved = size * (1 + header + 2 * first + reach)
    requests = figures.random / (first + reach)
    # Blocks of one write lie together: one request each way.
    bus = figures.both_bytes_s / moved
    core = 1 / (figures.cpu_s + (size - BLOCK) * figures.cpu_byte_s)
    return min(in_flight * volumes, requests, bus, core)
