#!/usr/bin/env python3
"""Measures protected volumes beside other block servers on the same disk, in turns, and writes docs/benchmarks.md.

Benches measure; they judge nothing and never fail for a figure. Called by `make bench`.

usage: benches/bench.py [--quick | --full] [--dir FOLDER] [--size MiB] [--only ROW,...] [--no-docs]

          under 20 minutes without --quick and --full
--quick   under 3 minutes: short turns, few of them, small files
--full    an hour: longer turns, and the rows that take 60 s and more (10 and 30 million records, 10 minutes of writes)
--size    MiB of the volume (default 8192, with --quick 512, less when the disk has little room)
--only    steps by their names (writes, peers, latency, sequential, curves, memory, views, revert, restart, engine, records, scaling, idle, stability); the other
          rows stay as the last run of the same mode and size left them, and the report says so
"""
import argparse
import concurrent.futures
import contextlib
import datetime
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
BIN = os.path.join(ROOT, "target", "release")
TICK = os.sysconf("SC_CLK_TCK")


def run(*command, **kwargs):
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True, **kwargs).stdout


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def memory_mib(pid, field="VmRSS"):
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field + ":"))


def fill(path, mib):
    """A file whose blocks are all there: the first write to a hole would measure the file system."""
    piece = random.Random(mib).randbytes(1 << 20)
    with open(path, "wb") as out:
        for _ in range(mib):
            out.write(piece)
        os.fsync(out.fileno())


def rewrite(path):
    """Turns what was only reserved into written blocks, in place."""
    with open(path, "r+b") as file:
        while piece := file.read(4 << 20):
            file.seek(-len(piece), 1)
            file.write(piece)
        os.fsync(file.fileno())


def wait_for(path, process):
    deadline = time.monotonic() + 30
    while not os.path.exists(path):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no {path}: the agent's own words are in the log of the servers")
        time.sleep(0.05)


class Server:
    """A process that serves one NBD export."""

    # All that were started: whatever ends the bench ends them.
    started = []

    def __init__(self, name, command, uri, log):
        self.name, self.uri = name, uri
        self.process = subprocess.Popen([str(c) for c in command], stdout=log, stderr=log)
        Server.started.append(self)
        deadline = time.monotonic() + 30
        while subprocess.run(["nbdinfo", "--size", uri], capture_output=True).returncode:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} does not serve {uri}")
            time.sleep(0.05)

    def stop(self, how=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(how)
        self.process.wait()


class Bench:
    def __init__(self, args):
        self.args = args
        free = shutil.disk_usage(args.dir).free >> 20
        wanted = args.size or (512 if args.quick else 8192)
        # Files: the volume, a peer's, the target of a copy, and 2.5 times the volume as CDP disk.
        while wanted > 256 and wanted * 5.5 + 2048 > free * 0.8:
            wanted //= 2
        self.size = wanted
        self.cdp_size = max(int(wanted * 1.75), 1536)
        self.seconds = 1 if args.quick else 5 if args.full else 3
        self.pairs = 2 if args.quick else 5
        self.dir = tempfile.mkdtemp(prefix="cdp-bench.", dir=args.dir)
        self.log = open(os.path.join(self.dir, "servers.log"), "w")
        self.stack = contextlib.ExitStack()
        self.rows, self.curves, self.facts, self.commands = {}, {}, {}, {}
        self.ours = self.qemu = None
        self.began = time.monotonic()

    def path(self, name):
        return os.path.join(self.dir, name)

    def say(self, text):
        print(f"[{time.monotonic() - self.began:5.0f} s] {text}", flush=True)

    # -- servers -------------------------------------------------------------------------------------------------------

    def start_ours(self):
        folder = self.path("cdp")
        command = [f"{BIN}/cdp-agent", "--dev", folder, "--size", f"{self.size}MiB", "--cdp-size", f"{self.cdp_size}MiB"]
        self.ours = Server("cdp-agent", command, f"nbd+unix:///demo?socket={folder}/nbd.sock", self.log)
        return self.ours

    def ctl(self, *command):
        return json.loads(run(f"{BIN}/cdpctl", "--agent", f"unix:{self.path('cdp')}/agent.sock", "--output", "json", *command) or "null")

    def start_qemu(self, name="qemu-nbd", cache="none"):
        socket = self.path(f"{name}.sock")
        aio = ["--aio=io_uring"] if cache == "none" else []
        command = ["qemu-nbd", "-f", "raw", f"--cache={cache}", *aio, "--persistent", "--socket", socket, self.path("peer.img")]
        return Server(name, command, f"nbd+unix:///?socket={socket}", self.log)

    def start_qsd(self, copy):
        socket = self.path("qsd.sock")
        node = lambda name, file: f"driver=file,node-name={name},filename={file},cache.direct=on,aio=io_uring"
        command = ["qemu-storage-daemon", "--blockdev", node("f", self.path("peer.img")), "--blockdev", "driver=raw,node-name=r,file=f"]
        if copy:
            command += ["--blockdev", node("tf", self.path("copy.img")), "--blockdev", "driver=raw,node-name=t,file=tf"]
            command += ["--blockdev", "driver=copy-before-write,node-name=c,file=r,target=t"]
        top = "c" if copy else "r"
        command += ["--nbd-server", f"addr.type=unix,addr.path={socket}", "--export", f"type=nbd,id=e,node-name={top},name=x,writable=on"]
        return Server("qemu-storage-daemon", command, f"nbd+unix:///x?socket={socket}", self.log)

    def start_nbdkit(self):
        socket = self.path("nbdkit.sock")
        # What an earlier turn left behind: nbdkit does not replace it.
        with contextlib.suppress(FileNotFoundError):
            os.remove(socket)
        return Server("nbdkit file", ["nbdkit", "-f", "-U", socket, "file", self.path("peer.img")], f"nbd+unix:///?socket={socket}", self.log)

    def prepare(self):
        """The volume, the peers' files, and a CDP disk whose ring has wrapped."""
        self.say(f"files: a volume of {self.size} MiB")
        os.makedirs(self.path("cdp"))
        for name in ["cdp/primary.img", "peer.img"]:
            fill(self.path(name), self.size)
        if self.wanted("peers"):
            fill(self.path("copy.img"), self.size)
        self.start_ours().stop()
        rewrite(self.path("cdp/cdp.img"))
        self.start_ours()
        self.qemu = self.start_qemu()
        self.say("warming up: until the ring has wrapped")
        # A log is charged 8 KiB for each write, so this is more than the CDP disk holds.
        for _ in range(1 if self.args.quick else 3 if self.args.full else 2):
            for server in [self.ours, self.qemu]:
                # The peers' file too: reads of blocks that were overwritten need not be as fast as those of fresh ones.
                self.fio(server.uri, rw="write", bs="1m", depth=8, seconds=600, extra=["--time_based=0", "--loops=1"], ramp=0)
        self.settle()

    # -- one turn ------------------------------------------------------------------------------------------------------

    def fio(self, uri, rw="randwrite", bs="4k", depth=32, seconds=None, size=None, extra=(), ramp=0.5):
        seconds = seconds or self.seconds
        target = ["--ioengine=nbd", f"--uri={uri}"] if uri.startswith("nbd") else ["--ioengine=io_uring", "--direct=1", f"--filename={uri}"]
        command = ["fio", "--name=t", *target, f"--rw={rw}", f"--bs={bs}", f"--iodepth={depth}", f"--size={size or self.size}m", "--randrepeat=0",
                   "--norandommap", "--time_based", f"--runtime={seconds}", f"--ramp_time={ramp}", "--output-format=json",
                   "--percentile_list=50:99:99.9", *extra]
        self.shown(command)
        out = run(*command)
        job = json.loads(out[out.index("{"):])["jobs"][0]
        if job["error"]:
            raise RuntimeError(f"fio: error {job['error']}")
        side = job["write"] if job["write"]["total_ios"] else job["read"]
        lat = side["clat_ns"]
        return {"iops": side["iops"], "mib_s": side["bw"] / 1024, "both_mib_s": (job["read"]["bw"] + job["write"]["bw"]) / 1024, "ios": side["total_ios"], "mean_us": lat["mean"] / 1e3,
                "p50_us": lat["percentile"]["50.000000"] / 1e3, "p99_us": lat["percentile"]["99.000000"] / 1e3,
                "p999_us": lat["percentile"]["99.900000"] / 1e3, "max_us": lat["max"] / 1e3}

    def shown(self, command):
        """Keeps a command for the report, once, with a name for the folder of the files."""
        text = " ".join(str(part) for part in command).replace(self.dir, "DIR")
        self.commands[re.sub(r"view-?[0-9a-f-]{8,}", "VIEW", text)] = None

    def settle(self):
        """Waits until the agent has brought its backlog to the primary: it must not work in the peer's turn."""
        deadline = time.monotonic() + 10
        while self.ctl("info", "demo")["backlog_bytes"] and time.monotonic() < deadline:
            time.sleep(0.1)

    def moved(self):
        """Bytes that the guest wrote so far, and those that this brought about."""
        with open(os.path.join(self.path("cdp"), "metrics.addr")) as address:
            page = urllib.request.urlopen(f"http://{address.read().strip()}/metrics").read().decode()
        kinds = re.findall(r"^cdp_volume_(write|journal|before_image|destaged)_bytes_total\{[^}]*\} (\d+)$", page, re.M)
        return {kind: int(count) for kind, count in kinds}

    def turn(self, server, **kwargs):
        before = cpu_seconds(server.process.pid)
        result = self.fio(server.uri, **kwargs)
        if server is self.ours:
            self.settle()
        # With the ramp and what ran behind the acks: all of it belongs to the writes.
        share = kwargs.get("seconds") or self.seconds
        result["cpu_us"] = (cpu_seconds(server.process.pid) - before) * 1e6 / max(1, result["ios"] * (share + 0.5) / share)
        return result

    def interleaved(self, servers, pairs=None, after=None, **kwargs):
        """Turns of each server in order, again and again, and `after` behind each round: results by server."""
        results = {server.name: [] for server in servers}
        for _ in range(pairs or self.pairs):
            for server in servers:
                results[server.name].append(self.turn(server, **kwargs))
            if after:
                after()
        return results

    def ratios(self, results, ours, peer, key="iops"):
        return [a[key] / b[key] for a, b in zip(results[ours], results[peer]) if b[key]]

    def row(self, name, what, target, ratios, better="more", note="", **more):
        ratios = [r for r in ratios if r is not None]
        value = statistics.median(ratios) if ratios else None
        op, bound = target
        met = None if value is None or op is None else (value >= bound if op == ">=" else value <= bound)
        self.rows[name] = {"what": what, "target": target, "median": value, "low": min(ratios, default=None), "high": max(ratios, default=None),
                           "count": len(ratios), "met": met, "note": note, **more}
        shown = "not measured" if value is None else f"{value:.3g} ({min(ratios):.3g} to {max(ratios):.3g})"
        self.say(f"{what}: {shown}, target {op} {bound}" if op else f"{what}: {shown}")

    def wanted(self, *names):
        return not self.args.only or any(name in self.args.only for name in names)


# -- the rows ----------------------------------------------------------------------------------------------------------


def writes(b):
    ours, qemu = b.ours, b.qemu
    seconds = 60 if b.args.full else b.seconds
    limits, seen = [], [b.moved()]

    def limit():
        seen.append(b.moved())
        old, new = seen[-2:]
        # Each byte of the guest came with so many of each kind; it wrote in its own turn only.
        share = lambda kind: (new[kind] - old[kind]) / (new["write"] - old["write"])
        moved = {"journal_bytes_per_guest_byte": share("journal"), "before_image_bytes_per_guest_byte": share("before_image"),
                 "primary_bytes_per_guest_byte": share("destaged")}
        limits.append({"moved": moved, "iops": mix(b, moved, 30000)})

    results = b.interleaved([ours, qemu], after=limit, rw="randwrite", depth=32, seconds=seconds)
    b.facts["randwrite_qd32"], b.facts["randwrite_fio_same_mix"] = results, limits
    b.row("randwrite", f"NBD 4K random write QD32 / qemu-nbd raw cache=none", (">=", 1.0), b.ratios(results, ours.name, qemu.name),
          note=f"{seconds} s a turn" + ("" if b.args.full else "; 60 s with FULL=1"))
    fit = statistics.median(most["iops"] / peer["iops"] for most, peer in zip(limits, results[qemu.name]))
    b.row("randwrite_limit", "the same / fio straight on the file, the same random reads, random writes and appends, 64 in flight", (None, None),
          [turn["iops"] / most["iops"] for turn, most in zip(results[ours.name], limits)],
          note=f"median {statistics.median(most['iops'] for most in limits):,.0f}/s fit, that is {fit:.2f} of qemu-nbd")
    b.row("cpu", "CPU time per 4K write, whole process / qemu-nbd raw", ("<=", 1.5), b.ratios(results, ours.name, qemu.name, "cpu_us"),
          note="what runs behind the ack counted in")


def peers(b):
    """Other servers of the same file: only one of them is up at a time."""
    starts = {"copy-before-write": lambda: b.start_qsd(True), "qemu-storage-daemon raw": lambda: b.start_qsd(False), "nbdkit file": b.start_nbdkit,
              "qemu-nbd writeback": lambda: b.start_qemu("qemu-nbd-writeback", "writeback")}
    others, ours = {name: [] for name in starts}, []
    b.qemu.stop()
    for number in range(b.pairs):
        ours.append(b.turn(b.ours, rw="randwrite", depth=32))
        for name, start in starts.items():
            if name != "copy-before-write" and number >= (1 if b.args.quick else 5 if b.args.full else 2):
                continue
            # A fresh start each time: the copy's point in time begins anew, as ours does with each log.
            server = start()
            others[name].append(b.turn(server, rw="randwrite", depth=32))
            server.stop()
    others["fio on the file"] = [b.fio(b.path("peer.img"), rw="randwrite", depth=32, ramp=0) for _ in range(1 if b.args.quick else 5 if b.args.full else 3)]
    b.qemu = b.start_qemu()
    b.facts["randwrite_others"] = {"cdp-agent beside them": ours, **others}
    b.row("cbw", "the same / qemu-storage-daemon copy-before-write", (">=", 2.0), [a["iops"] / r["iops"] for a, r in zip(ours, others["copy-before-write"])],
          note="the peer from a fresh start each turn")
    hot = b.interleaved([b.ours, b.qemu], rw="randwrite", depth=32, size=64)
    b.facts["hot_set"] = hot
    b.row("hot", "the same on a 64 MiB hot set / qemu-nbd raw", (">=", 1.2), b.ratios(hot, b.ours.name, b.qemu.name))


def latency(b):
    servers = [b.ours, b.qemu]
    flush = b.interleaved(servers, rw="randwrite", depth=1, extra=["--fsync=1"])
    b.facts["write_flush_qd1"] = flush
    b.row("flush", "NBD 4K write + flush QD1 / qemu-nbd raw", (">=", 1.0), b.ratios(flush, b.ours.name, b.qemu.name))
    one = b.interleaved(servers, rw="randwrite", depth=1)
    b.facts["randwrite_qd1"] = one
    b.row("p50", "NBD 4K random write QD1 latency p50 / qemu-nbd raw", ("<=", 1.1), b.ratios(one, b.ours.name, b.qemu.name, "p50_us"))
    b.row("p99", "NBD 4K random write QD1 latency p99 / qemu-nbd raw", ("<=", 1.5), b.ratios(one, b.ours.name, b.qemu.name, "p99_us"))


def both_ways(b, reads):
    """MiB/s that the disk moves, straight and in both directions together, when so many percent are reads: the limit of what moves bytes several times."""
    return b.fio(b.path("peer.img"), rw="rw", bs="1m", depth=8, seconds=min(b.seconds, 3), ramp=0, extra=[f"--rwmixread={reads}"])["both_mib_s"]


def sequential(b):
    servers = [b.ours, b.qemu]
    # Where the disk itself may be the limit: how often it moves each byte, and how many percent of these moves are reads.
    # Of a byte written: append, read of the old content, its before-image, write to the primary.
    for name, what, rw, bound, moves, reads, limit in [
        ("seqwrite", "NBD 1 MiB sequential write", "write", 0.9, 4, 25, "fio straight on the file, the four moves of each byte on one disk"),
        ("seqread", "NBD 1 MiB sequential read", "read", 1.0, 1, 100, "fio straight on the file"),
    ]:
        limits = []
        results = b.interleaved(servers, after=lambda: limits.append(both_ways(b, reads) / moves), rw=rw, bs="1m", depth=8)
        b.facts[name] = {**results, "limit_mib_s": limits}
        b.row(name, f"{what} / qemu-nbd raw", (">=", bound), b.ratios(results, b.ours.name, b.qemu.name))
        b.row(name + "_limit", f"the same / {limit}", (None, None), [turn["mib_s"] / most for turn, most in zip(results[b.ours.name], limits)],
              note=f"median {statistics.median(limits):.0f} MiB/s fit, that is {statistics.median(m / q['mib_s'] for m, q in zip(limits, results[b.qemu.name])):.2f} of qemu-nbd")
    # Two files of one disk need not be equally fast: a host may keep one of them elsewhere.
    files = {"protected": os.path.join(b.path("cdp"), "primary.img"), "peers": b.path("peer.img")}
    straight = {name: [] for name in files}
    each = lambda: [straight[name].append(b.fio(path, rw="randread", seconds=min(b.seconds, 2), ramp=0)["iops"]) for name, path in files.items()]
    results = b.interleaved(servers, after=each, rw="randread")
    b.facts["randread"] = {**results, "fio_on_the_file": straight}
    b.row("randread", "NBD 4K random read QD32 / qemu-nbd raw", (">=", 1.0), b.ratios(results, b.ours.name, b.qemu.name))
    b.row("randread_files", "fio straight on the protected volume's file / on that of the peers, 4K random read QD32", (None, None),
          [own / peer for own, peer in zip(*straight.values())], note="how much of the row before is the disk's")


def engine_bench(b, *options):
    folder = b.path("engine")
    return json.loads(run(f"{BIN}/cdp-bench", "engine", folder, *options))


def mix(b, moved, guest):
    """fio with the physical mix of protected writes: random reads and writes in the proportion that was measured, appends at the rate of `guest` writes a second
    and then at the one that came out. Answers how many writes of the guest fit into that."""
    appends = b.path("appends.img")
    if not os.path.exists(appends):
        fill(appends, 512)
    reads, writes_ = moved["before_image_bytes_per_guest_byte"], moved["primary_bytes_per_guest_byte"]
    appended = moved["journal_bytes_per_guest_byte"] + reads
    share = reads + writes_
    for _ in range(2):
        command = ["fio", "--ioengine=io_uring", "--direct=1", "--time_based", f"--runtime={b.seconds}", "--randrepeat=0", "--norandommap",
                   "--output-format=json", "--name=random", f"--filename={b.path('peer.img')}", f"--size={b.size}m", "--rw=randrw", "--bs=4k",
                   "--iodepth=64", f"--rwmixread={round(100 * reads / share)}", "--name=appends", f"--filename={appends}",
                   "--rw=write", "--bs=128k", "--iodepth=2", f"--rate={int(guest * 4096 * appended)}"]
        out = run(*command)
        job = json.loads(out[out.index("{"):])["jobs"][0]
        guest = (job["read"]["iops"] + job["write"]["iops"]) / share
        b.shown(re.sub(r"^--(rate|rwmixread)=.*", r"--\1=AS_MEASURED", part) for part in command)
    return guest


def engine(b):
    size = min(b.size, 512 if b.args.quick else 4096 if b.args.full else 2048)
    options = ["--size", size, "--reserve", size, "--seconds", b.seconds * 2, "--ramp", 1 if b.args.quick else 3]
    runs, limits = [], []
    for _ in range(2 if b.args.quick else 5):
        runs.append(engine_bench(b, *options, "--depth", 32))
        limits.append(mix(b, runs[-1], runs[-1]["iops"]))
    b.facts["engine"] = {"runs": runs, "fio_same_mix_iops": limits}
    b.row("engine", "engine alone, 4K random write QD32 / fio with the same physical mix", (">=", 0.7),
          [run_["iops"] / limit for run_, limit in zip(runs, limits)], note=f"{size} MiB")
    b.row("journal_bytes", "bytes written to the CDP disk / guest bytes, 4K QD32, before-images aside", ("<=", 1.05),
          [run_["journal_bytes_per_guest_byte"] for run_ in runs], note=f"engine alone, {size} MiB")
    total = lambda r: r["journal_bytes_per_guest_byte"] + r["before_image_bytes_per_guest_byte"] + r["primary_bytes_per_guest_byte"]
    b.row("amplification", "total write amplification, before-images and primary counted in", (None, None), [total(r) for r in runs],
          note="engine alone, QD32, uniform")
    depth = [32] if b.args.quick else [1, 4, 16, 32, 128]
    # A smaller volume: each point makes its own files.
    of_depth = ["--size", min(size, 1024), "--reserve", min(size, 1024), "--seconds", 2, "--ramp", 1]
    points = [(d, engine_bench(b, *of_depth, "--depth", d)) for d in depth]
    b.curves["amplification_depth"] = {"x": "writes in flight", "y": "bytes written / guest bytes", "log": True, "series": {
        "CDP disk, without before-images": [(d, r["journal_bytes_per_guest_byte"]) for d, r in points], "all": [(d, total(r)) for d, r in points]}}
    sets = [64] if b.args.quick else [64, 256, 1024, size]
    small = lambda mib: options[:4] if mib > 1024 else of_depth[:4]
    points = [(s, engine_bench(b, *small(s), "--seconds", 3, "--ramp", 2, "--working-set", s)) for s in sorted(set(sets))]
    b.curves["amplification_set"] = {"x": "MiB that are written to", "y": "bytes written / guest bytes", "log": True, "series": {
        "before-images": [(s, r["before_image_bytes_per_guest_byte"]) for s, r in points],
        "primary": [(s, r["primary_bytes_per_guest_byte"]) for s, r in points], "all": [(s, total(r)) for s, r in points]}}
    # How long a block is left alone decides whether the backlog or its log knows it still.
    # In the seconds that are measured each block must come round.
    apart = [16] if b.args.quick else [4, 16, 64]
    points = [(d, engine_bench(b, *small(d), "--seconds", 3, "--ramp", 2, "--distance", d)) for d in apart]
    b.curves["amplification_distance"] = {"x": "MiB written between two writes of a block", "y": "bytes written / guest bytes", "log": True, "series": {
        "before-images": [(d, r["before_image_bytes_per_guest_byte"]) for d, r in points],
        "primary": [(d, r["primary_bytes_per_guest_byte"]) for d, r in points], "all": [(d, total(r)) for d, r in points]}}


def records(b):
    counts = [100_000, 300_000 if b.args.quick else 1_000_000]
    if b.args.full:
        counts += [10_000_000, 30_000_000]
    elif not b.args.quick:
        counts += [3_000_000]
    runs = {}
    for count in counts:
        runs[count] = json.loads(run(f"{BIN}/cdp-bench", "views", b.path("engine"), "--records", count))
        b.say(f"{count} records: {json.dumps(runs[count]['open'])}")
    b.facts["records"] = runs
    # The targets speak of 10 million against one; what comes after them shows whether it goes on growing.
    most = min(counts[-1], 10_000_000)
    open_ = lambda count: runs[count]["open"]
    b.row("view_open", f"view open with {most:,} records, p99, ms", ("<=", 10), [open_(most)["p99_us"] / 1000],
          note=f"p50 {open_(most)['p50_us'] / 1000:.2g}; engine alone" + ("" if b.args.full else "; 10 million with FULL=1"))
    fewer = max(count for count in counts if count < most)
    b.row("view_open_flat", f"view open p50, {most:,} records / {fewer:,}", (None, None), [open_(most)["p50_us"] / max(1e-9, open_(fewer)["p50_us"])],
          note=f"with {fewer:,} p50 {open_(fewer)['p50_us'] / 1000:.2g}, p99 {open_(fewer)['p99_us'] / 1000:.2g} ms; flat is near 1, or far below the bound")
    steps = {"memory_records": (most, fewer), "memory_records_more": (counts[-1], most)}
    for name, (more, fewer) in steps.items():
        if more > fewer:
            resident = lambda count: runs[count]["resident_mib"]
            b.row(name, f"memory with {more:,} records / {fewer:,}", ("<=", 1.2) if more >= 10_000_000 else (None, None), [resident(more) / max(1, resident(fewer))],
                  note=f"flat; {resident(fewer)} and {resident(more)} MiB, engine alone")
    b.curves["records"] = {"x": "records in the journal", "y": "microseconds, p99", "log": True, "series": {
        "view open": [(c, r["open"]["p99_us"]) for c, r in runs.items()], "view read, old": [(c, r["read_old"]["p99_us"]) for c, r in runs.items()],
        "view read, young": [(c, r["read_young"]["p99_us"]) for c, r in runs.items()]}}


def views(b):
    old = b.ctl("mark", "demo")["time"]
    b.fio(b.ours.uri, rw="randwrite", depth=32)
    young = b.ctl("mark", "demo")["time"]
    b.fio(b.ours.uri, rw="randwrite", depth=32, seconds=1)
    b.settle()
    opened = {}
    for age, at in [("old", old), ("young", young)]:
        began = time.monotonic()
        view = b.ctl("view", "open", "demo", "--at", at)
        opened[age] = (view, (time.monotonic() - began) * 1000)
    ratios = []
    for _ in range(b.pairs):
        volume = b.fio(b.ours.uri, rw="randread", depth=32)
        for view, _ms in opened.values():
            ratios.append(b.fio(view["nbd_uri"], rw="randread", depth=32)["iops"] / volume["iops"])
    b.facts["views"] = {"open_ms_with_cdpctl": {age: ms for age, (_, ms) in opened.items()}, "read_ratios": ratios}
    b.row("view_read", "view 4K random read QD32 / volume 4K random read, young and old", (">=", 0.8), ratios)
    ratios, errors = [], 0
    for view, _ms in opened.values():
        b.ctl("view", "close", view["id"])
    for _ in range(b.pairs):
        alone = b.fio(b.ours.uri, rw="randwrite", depth=32)
        # Of now: a view of long ago may lose its log to the writes of this very row, as it should.
        view = b.ctl("view", "open", "demo", "--at", b.ctl("mark", "demo")["time"])
        reader = subprocess.Popen(["fio", "--name=v", "--ioengine=nbd", f"--uri={view['nbd_uri']}", "--rw=randread", "--bs=4k",
                                   "--iodepth=32", f"--size={b.size}m", "--time_based", f"--runtime={b.seconds + 2}", "--norandommap"],
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.5)
        ratios.append(b.fio(b.ours.uri, rw="randwrite", depth=32)["iops"] / alone["iops"])
        errors += reader.wait() != 0
        b.ctl("view", "close", view["id"])
    b.row("guest_beside_view", "guest IOPS while a view is read at full speed / without", (">=", 0.5), ratios, note=f"{errors} view readers ended with an error")


def revert(b):
    changed = min(1024, b.size // 4)
    rounds = []
    for _ in range(1 if b.args.quick else b.pairs):
        point = b.ctl("mark", "demo")["time"]
        b.fio(b.ours.uri, rw="write", bs="1m", depth=8, size=changed, seconds=600, extra=["--time_based=0", "--loops=1"], ramp=0)
        b.settle()
        began = time.monotonic()
        b.ctl("revert", "demo", "--at", point, "--force", "--release")
        call_ms = (time.monotonic() - began) * 1000
        with concurrent.futures.ThreadPoolExecutor() as pool:
            guest = pool.submit(b.fio, b.ours.uri, rw="randrw", depth=1, seconds=1, ramp=0)
            blocks = 0
            while total := (b.ctl("info", "demo").get("revert") or {}).get("blocks_total"):
                blocks = total
                time.sleep(0.01)
            copy_s = time.monotonic() - began
            guest = guest.result()
        disk = b.fio(b.path("peer.img"), rw="write", bs="1m", depth=8, seconds=1, ramp=0)["mib_s"]
        # Of each byte: read of the target's content and of the present one, its before-image, write to the primary.
        limit = both_ways(b, 50) / 4
        # Of the logs back to the instant all blocks are copied, also those that were written there before it only.
        copied = max(changed, blocks >> 8)
        rounds.append({"changed_mib": changed, "copied_mib": copied, "call_ms": call_ms, "until_copied_s": copy_s, "guest_writes_meanwhile": guest,
                       "disk_mib_s": disk, "limit_mib_s": limit})
    b.facts["revert"] = rounds
    median = lambda of: statistics.median(of(r) for r in rounds)
    b.row("revert_call", f"revert over {changed} MiB of changed blocks: until the call returns, ms", ("<=", 200), [r["call_ms"] for r in rounds],
          note="with the start of cdpctl")
    b.row("revert_copy", "its background copy / disk bandwidth", (">=", 0.5), [r["copied_mib"] / r["until_copied_s"] / r["disk_mib_s"] for r in rounds],
          note=f"{median(lambda r: r['copied_mib']):.0f} MiB in all; guest writes meanwhile: {median(lambda r: r['guest_writes_meanwhile']['iops']):.0f}/s and as many reads, one at a time, none failed")
    b.row("revert_limit", "its background copy / fio straight on the file, four moves of each byte on one disk", (None, None),
          [r["copied_mib"] / r["until_copied_s"] / r["limit_mib_s"] for r in rounds],
          note=f"{median(lambda r: r['limit_mib_s']):.0f} MiB/s fit, that is {median(lambda r: r['limit_mib_s'] / r['disk_mib_s']):.2f} of the disk's bandwidth")


def restart(b):
    used = b.ctl("info", "demo")["used_bytes"] / (1 << 30)
    b.fio(b.ours.uri, rw="randwrite", depth=32, seconds=1)
    times = []
    for _ in range(b.pairs):
        b.ours.stop(signal.SIGKILL)
        began = time.monotonic()
        folder = b.path("cdp")
        process = subprocess.Popen([f"{BIN}/cdp-agent", "--dev", folder, "--size", f"{b.size}MiB", "--cdp-size", f"{b.cdp_size}MiB"], stdout=b.log, stderr=b.log)
        while subprocess.run(["qemu-io", "-f", "raw", "-r", "-c", "read 0 4k", b.ours.uri], capture_output=True).returncode:
            time.sleep(0.01)
        times.append(time.monotonic() - began)
        b.ours.process = process
    b.row("restart", f"start after kill -9 with {used:.1f} GiB of history until the first read is served, s", ("<=", 1.0), times)


def memory(b):
    b.row("memory_loaded", "memory: 1 volume under load, MiB", ("<=", 256), [memory_mib(b.ours.process.pid, "VmHWM")], note="the most in this run")


def scaling(b):
    """Many volumes on one CDP disk, written at once."""
    counts = [1, 2, 8] if b.args.quick else [1, 2, 8, 64]
    sums = {count: [] for count in counts}
    folder = b.path("many")
    os.makedirs(folder)
    mib, reserve = 32, 64
    with open(f"{folder}/cdp.img", "wb") as file:
        file.truncate((counts[-1] * reserve + 256) << 20)
    with open(f"{folder}/config.toml", "w") as config:
        config.write(f'state_dir = "{folder}/state"\n[grpc]\nunix = "{folder}/agent.sock"\n[nbd]\nunix = "{folder}/nbd.sock"\n'
                     '[metrics]\nlisten = "off"\n')
    agent = subprocess.Popen([f"{BIN}/cdp-agent", "--config", f"{folder}/config.toml"], stdout=b.log, stderr=b.log)
    ctl = lambda *c: run(f"{BIN}/cdpctl", "--agent", f"unix:{folder}/agent.sock", "--output", "json", *c)
    try:
        wait_for(f"{folder}/agent.sock", agent)
        ctl("disk", "init", f"{folder}/cdp.img", "--segment-size", "1MiB")
        for number in range(counts[-1]):
            fill(f"{folder}/v{number}.img", mib)
            ctl("volume", "add", f"v{number}", "--path", f"{folder}/v{number}.img")
        names = [f"v{number}" for number in range(counts[-1])]
        ctl("edit", *names, "--reserve-capacity", f"{reserve}MiB", "--reserve-duration", "1h", "--priority", "mid")
        ctl("enable", *names)
        for count in counts * b.pairs:
            jobs = [f for n in range(count) for f in [f"--name=v{n}", f"--uri=nbd+unix:///v{n}?socket={folder}/nbd.sock"]]
            # The same requests in flight in all.
            command = ["fio", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", f"--iodepth={max(1, 64 // count)}", f"--size={mib}m", "--randrepeat=0",
                       "--norandommap", "--time_based", f"--runtime={min(b.seconds, 2)}", "--ramp_time=0.5", "--thread", "--output-format=json"]
            b.shown([*command, *jobs[:2], *(["AND SO ON"] if count > 1 else [])])
            out = run(*command, *jobs)
            sums[count].append(sum(job["write"]["iops"] for job in json.loads(out[out.index("{"):])["jobs"]))
    finally:
        agent.terminate()
        agent.wait()
        shutil.rmtree(folder)
    b.facts["scaling"] = sums
    b.row("scaling", f"sum of IOPS of {counts[-1]} volumes written at once / one volume's", (">=", 0.9), [many / one for many, one in zip(sums[counts[-1]], sums[1])],
          note="64 requests in flight in all" + ("; 64 volumes without QUICK=1" if b.args.quick else ""))
    b.curves["volumes"] = {"x": "volumes written at once", "y": "4K writes/s, sum", "log": True, "series": {"protected": [(count, statistics.median(of)) for count, of in sums.items()]}}


def curves(b):
    servers = [b.ours, b.qemu]
    seconds = 1 if b.args.quick else 3 if b.args.full else 2
    depths = [1, 32] if b.args.quick else [1, 2, 4, 8, 16, 32, 64, 128]
    sizes = ["4k", "1m"] if b.args.quick else ["4k", "16k", "64k", "256k", "1m"]
    by_depth = {s.name: [(d, b.turn(s, depth=d, seconds=seconds)["iops"]) for d in depths] for s in servers}
    b.curves["depth"] = {"x": "requests in flight", "y": "4K random writes/s", "log": True, "series": by_depth}
    kib = lambda text: int(text[:-1]) * (1024 if text.endswith("m") else 1)
    by_size = {s.name: [(kib(z), b.turn(s, bs=z, depth=8, seconds=seconds)["mib_s"]) for z in sizes] for s in servers}
    b.curves["block_size"] = {"x": "KiB of a write", "y": "MiB/s, 8 in flight", "log": True, "series": by_size}
    sets = sorted({64, 256, min(1024, b.size), min(4096, b.size), b.size} if not b.args.quick else {64, b.size})
    by_set = {s.name: [(z, b.turn(s, size=z, seconds=seconds)["iops"]) for z in sets] for s in servers}
    b.curves["working_set"] = {"x": "MiB that are written to", "y": "4K random writes/s, 32 in flight", "log": True, "series": by_set}


def longest_each_second(path):
    """The longest latency, in ms, of each second of a fio log."""
    longest = {}
    with open(path) as log:
        for line in log:
            at, value = (int(field) for field in line.split(",")[:2])
            longest[at // 1000] = max(longest.get(at // 1000, 0), value / 1e6)
    return longest


def stability_of(b, server, name, seconds):
    """What the guest of a server and, beside it, a prober of the disk see: one request of 4 KiB at a time goes straight to a file of its own, 20 a second."""
    logs = lambda who: [f"--write_lat_log={b.path(who)}", "--log_avg_msec=1000", "--log_max_value=1"]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        probe = pool.submit(b.fio, b.path("probe.img"), rw="randwrite", depth=1, size=64, seconds=seconds, ramp=0,
                            extra=["--sync=dsync", "--rate_iops=20", *logs(f"{name}-probe")])
        guest = b.fio(server.uri, rw="randwrite", depth=8, seconds=seconds, ramp=0, extra=logs(f"{name}-guest"))
        probe = probe.result()
    guest_s, disk_s = longest_each_second(b.path(f"{name}-guest_clat.1.log")), longest_each_second(b.path(f"{name}-probe_clat.1.log"))
    beside = lambda at: max(disk_s.get(near, 0) for near in (at - 1, at, at + 1))
    stalls = [(at, ms, beside(at)) for at, ms in guest_s.items() if ms > 100]
    return {**guest, "probe": probe, "seconds_over_100_ms": stalls, "longest_each_second": guest_s, "probe_longest_each_second": disk_s}


def stability(b, seconds=600):
    """Ours and then the raw peer for the same time: what is slow for both, and for the prober beside them, is the disk's."""
    fill(b.path("probe.img"), 64)
    minutes = f"{seconds // 60} minutes of random writes, 8 in flight"
    for server, name, what, target in [(b.ours, "stability", f"write latency over {minutes}: longest, ms", ("<=", 100)),
                                       (b.qemu, "stability_peer", f"qemu-nbd raw over {minutes}: longest, ms", (None, None))]:
        seen = b.facts[name] = stability_of(b, server, name, seconds)
        b.settle()
        stalls, probe = seen["seconds_over_100_ms"], seen["probe"]
        b.row(name, what, target, [seen["max_us"] / 1000], note=f"p99.9 {seen['p999_us'] / 1000:.1f} ms; {seen['iops']:,.0f}/s; {len(stalls)} of "
              f"{len(seen['longest_each_second'])} seconds have one over 100 ms")
        b.row(name + "_disk", "single writes straight to the disk, 20 a second beside it: longest, ms", (None, None), [probe["max_us"] / 1000],
              note=f"p99.9 {probe['p999_us'] / 1000:.1f} ms; over 50 ms within a second of {sum(ms > 50 for _, _, ms in stalls)} of these {len(stalls)}")


def idle_volumes(b):
    """1,000 protected volumes that do nothing. Their CDP disk takes 34 GiB: what no later step needs makes room for it."""
    if os.path.exists(b.path("copy.img")):
        os.remove(b.path("copy.img"))
    folder = b.path("idle")
    os.makedirs(folder)
    with open(f"{folder}/cdp.img", "wb") as file:
        file.truncate((1000 * 34 + 512) << 20)
    with open(f"{folder}/config.toml", "w") as config:
        config.write(f'state_dir = "{folder}/state"\n[grpc]\nunix = "{folder}/agent.sock"\n[nbd]\nunix = "{folder}/nbd.sock"\n'
                     '[metrics]\nlisten = "off"\n')
    agent = subprocess.Popen([f"{BIN}/cdp-agent", "--config", f"{folder}/config.toml"], stdout=b.log, stderr=b.log)
    ctl = lambda *c: run(f"{BIN}/cdpctl", "--agent", f"unix:{folder}/agent.sock", "--output", "json", *c)
    try:
        wait_for(f"{folder}/agent.sock", agent)
        ctl("disk", "init", f"{folder}/cdp.img", "--segment-size", "1MiB")
        names = [f"v{number}" for number in range(1000)]
        for name in names:
            with open(f"{folder}/{name}.img", "wb") as file:
                file.truncate(1 << 20)
            ctl("volume", "add", name, "--path", f"{folder}/{name}.img")
        ctl("edit", *names, "--reserve-capacity", "34MiB", "--reserve-duration", "1h", "--priority", "mid")
        ctl("enable", *names)
        time.sleep(2)
        used = memory_mib(agent.pid)
    finally:
        agent.terminate()
        agent.wait()
        shutil.rmtree(folder)
    b.row("memory_idle", "memory: 1,000 idle protected volumes, MiB", ("<=", 1024), [used])


# Steps that make all of their files themselves.
SELF_CONTAINED = {"records", "scaling", "idle"}


# -- what is written ---------------------------------------------------------------------------------------------------

ORDER = ["randwrite", "randwrite_limit", "cbw", "hot", "flush", "p50", "p99", "seqwrite", "seqwrite_limit", "randread", "randread_files", "seqread", "seqread_limit", "engine", "cpu", "journal_bytes", "amplification",
         "view_open", "view_open_flat", "view_read", "guest_beside_view", "revert_call", "revert_copy", "revert_limit", "restart", "memory_loaded", "memory_idle",
         "memory_records", "memory_records_more", "scaling", "stability", "stability_disk", "stability_peer", "stability_peer_disk"]
UNMEASURED = {
    "memory_idle": ("memory: 1,000 idle protected volumes, MiB", ("<=", 1024)),
    "stability": ("write latency over 10 minutes of random writes, 8 in flight: longest, ms", ("<=", 100)),
}
COLOURS = ["#1f6fb4", "#d1622b", "#3a923a", "#8a5fb0"]


def svg(curve):
    """A plain line plot: the x axis in equal steps, the y axis from 0."""
    width, height, left, bottom, top = 560, 300, 70, 50, 20
    series = curve["series"]
    xs = sorted({x for points in series.values() for x, _ in points})
    peak = max((y for points in series.values() for _, y in points), default=1) or 1
    at_x = lambda x: left + (xs.index(x) + 0.5) * (width - left - 20) / len(xs)
    at_y = lambda y: height - bottom - y / peak * (height - bottom - top)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
           f'<rect width="{width}" height="{height}" fill="white"/>']
    for step in range(5):
        value = peak * step / 4
        out.append(f'<line x1="{left}" x2="{width - 20}" y1="{at_y(value):.1f}" y2="{at_y(value):.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 6}" y="{at_y(value) + 4:.1f}" text-anchor="end">{value:,.4g}</text>')
    for x in xs:
        out.append(f'<text x="{at_x(x):.1f}" y="{height - bottom + 16}" text-anchor="middle">{x:,}</text>')
    out.append(f'<text x="{(left + width) / 2}" y="{height - 12}" text-anchor="middle">{curve["x"]}</text>')
    out.append(f'<text x="14" y="{(height - bottom) / 2}" text-anchor="middle" transform="rotate(-90 14 {(height - bottom) / 2})">{curve["y"]}</text>')
    for number, (name, points) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        line = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in points)
        out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3" fill="{colour}"/>' for x, y in points]
        out.append(f'<text x="{left + 8}" y="{top + 14 * number + 4}" fill="{colour}">{name}</text>')
    return "\n".join(out + ["</svg>"]) + "\n"


def machine(b):
    with open("/proc/cpuinfo") as info:
        model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "unknown")
    version = lambda *c: run(*c).splitlines()[0]
    return {
        "machine": f"{os.cpu_count()} cores, {model}, Linux {os.uname().release}, {run('stat', '-f', '-c', '%T', b.args.dir).strip()}",
        "versions": "; ".join([version("qemu-nbd", "--version"), version("qemu-storage-daemon", "--version"), version("fio", "--version"),
                               version("nbdkit", "--version"), version("rustc", "--version")]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": run("git", "-C", ROOT, "rev-parse", "--short", "HEAD").strip() or "unknown",
        "load": os.getloadavg()[0],
        "minutes": (time.monotonic() - b.began) / 60,
        "mode": "full" if b.args.full else "quick" if b.args.quick else "default",
    }


def priority():
    """A machine that others use, too: whoever runs the bench may give its session more of the processor, peers and clients included."""
    try:
        with open("/proc/self/autogroup") as group:
            nice = int(group.read().split()[-1])
    except (OSError, ValueError, IndexError):
        return ""
    return f"; the session of the bench, all servers and clients in it, ran at autogroup nice {nice}" if nice else ""


def report(b, load_before):
    about = machine(b)
    os.makedirs(f"{HERE}/results", exist_ok=True)
    results = f"{HERE}/results/{about['mode']}.json"
    kept = []
    if b.args.only and os.path.exists(results):
        with open(results) as file:
            last = json.load(file)
        if last["volume_mib"] == b.size:
            earlier = last.get("kept", [])
            fresh = set(last["rows"]).difference(b.rows, *(run_["rows"] for run_ in earlier))
            kept = [{**run_, "rows": sorted(set(run_["rows"]) - set(b.rows))} for run_ in [*earlier, {**last["about"], "rows": fresh}]]
            kept = [run_ for run_ in kept if run_["rows"]]
            b.commands = {**dict.fromkeys(last.get("commands", [])), **b.commands}
            b.rows, b.curves, b.facts = {**last["rows"], **b.rows}, {**last["curves"], **b.curves}, {**last["facts"], **b.facts}
    figures = {"about": about, "kept": kept, "volume_mib": b.size, "rows": b.rows, "curves": b.curves, "facts": b.facts, "commands": list(b.commands)}
    with open(results, "w") as out:
        json.dump(figures, out, indent=1)
        out.write("\n")
    lines = ["# Benchmarks", "", f"Written by `{'QUICK=1 ' if b.args.quick else 'FULL=1 ' if b.args.full else ''}make bench` on {about['date']}, in {about['minutes']:.0f} minutes; the raw figures are in "
             f"`benches/results/{about['mode']}.json`. Ratios are of turns side by side in one run on one disk; the", "median counts, the spread is from the lowest to the highest. "
             "What stands behind the figures is in `docs/performance.md`.", "", f"- Machine: {about['machine']}; load average {load_before:.1f} before the run{priority()}.",
             f"- Versions: {about['versions']}; commit {about['commit']}.",
             f"- Volume: {b.size} MiB, written before, uniform random unless a row says otherwise; CDP disk {b.cdp_size} MiB, written before, so that the ring wraps"
             f" on blocks that are there. {b.seconds} s a turn, {b.pairs} pairs.",
             *(f"- From an earlier run, on {run_['date']}, commit {run_['commit']}, load average {run_['load']:.1f} at its end: {', '.join(run_['rows'])}."
               for run_ in kept), "", "| what | target | median | spread | met |", "|---|---|---|---|---|"]
    for name in ORDER:
        row = b.rows.get(name)
        if not row:
            if name in UNMEASURED:
                what, target = UNMEASURED[name]
                lines.append(f"| {what} | {target[0]} {target[1]} | not measured in this mode | | |")
            continue
        value = "not measured" if row["median"] is None else f"{row['median']:.3g}"
        spread = "" if row["count"] < 2 else f"{row['low']:.3g} to {row['high']:.3g} ({row['count']})"
        target = f"{row['target'][0]} {row['target'][1]}" if row["target"][0] else "reported"
        note = f" ({row['note']})" if row["note"] else ""
        lines.append(f"| {row['what']}{note} | {target} | {value} | {spread} | {'' if row['met'] is None else 'yes' if row['met'] else '**no**'} |")
    if "randwrite_qd32" in b.facts:
        lines += ["", "## 4K random writes, 32 in flight", "", "| server | IOPS, each turn | mean us | p99 us | CPU us a write |", "|---|---|---|---|---|"]
        for name, turns in {**b.facts["randwrite_qd32"], **b.facts.get("randwrite_others", {})}.items():
            med = lambda key: statistics.median(t.get(key, 0) for t in turns)
            cpu = f"{med('cpu_us'):.1f}" if "cpu_us" in turns[0] else ""
            each = ", ".join(f"{turn['iops']:,.0f}" for turn in turns)
            lines.append(f"| {name} | {each} | {med('mean_us'):.0f} | {med('p99_us'):.0f} | {cpu} |")
    lines += ["", "## Curves", ""]
    for name, curve in b.curves.items():
        if not b.args.no_docs:
            os.makedirs(f"{ROOT}/docs/bench", exist_ok=True)
            with open(f"{ROOT}/docs/bench/{name}.svg", "w") as out:
                out.write(svg(curve))
        lines.append(f"![{curve['y']} over {curve['x']}](bench/{name}.svg)")
    lines += ["", "## Commands", "", "```", "cdp-agent --dev DIR --size SIZE --cdp-size CDP_SIZE", "qemu-nbd -f raw --cache=none --aio=io_uring --persistent --socket S FILE",
              "qemu-storage-daemon --blockdev driver=file,node-name=f,filename=FILE,cache.direct=on,aio=io_uring --blockdev driver=raw,node-name=r,file=f \\",
              "    [--blockdev driver=copy-before-write,node-name=c,file=r,target=t] --nbd-server addr.type=unix,addr.path=S --export type=nbd,id=e,node-name=r,name=x,writable=on",
              "nbdkit -f -U S file FILE", "cdp-bench engine DIR --depth 32; cdp-bench views DIR --records N", "```", "",
              "Every command of fio, once:", "", "```", *b.commands, "```", ""]
    if not b.args.no_docs:
        with open(f"{ROOT}/docs/benchmarks.md", "w") as out:
            out.write("\n".join(lines))
    print("\n".join(lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--dir", default="/var/tmp")
    parser.add_argument("--size", type=int, default=0)
    parser.add_argument("--only", type=lambda text: text.split(","), default=[])
    parser.add_argument("--no-docs", action="store_true")
    args = parser.parse_args()
    load_before = os.getloadavg()[0]
    b = Bench(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if not args.only or set(args.only) - SELF_CONTAINED:
            b.prepare()
        steps = [("writes", writes), ("peers", peers), ("latency", latency), ("sequential", sequential), ("curves", curves), ("memory", memory), ("views", views), ("revert", revert),
                 ("restart", restart), ("engine", engine), ("records", records), ("scaling", scaling)]
        if not args.quick:
            steps.append(("idle", idle_volumes))
        if args.full:
            steps.append(("stability", stability))
        for name, step in steps:
            if not b.wanted(name):
                continue
            try:
                step(b)
            except (subprocess.SubprocessError, RuntimeError, KeyError, ValueError, OSError) as error:
                # One row that cannot be measured must not cost the others.
                words = getattr(error, "stderr", None) or str(error)
                b.say(f"{name}: not measured: {words.strip()[-400:]}")
                for server in (b.ours, b.qemu):
                    if server and server.process.poll() is not None:
                        b.ours.stop(), b.qemu.stop()
                        b.start_ours()
                        b.qemu = b.start_qemu()
                        break
        report(b, load_before)
    finally:
        for server in Server.started:
            server.stop()
        shutil.rmtree(b.dir, ignore_errors=True)
    b.say("done")


if __name__ == "__main__":
    main()
