#!/usr/bin/env python3
"""Measures protected volumes beside other block servers on the same disk, in turns, and writes docs/benchmarks.md.

Benches measure; they judge nothing and never fail for a figure. Called by `make bench`.

usage: benches/bench.py [--quick | --full] [--dir FOLDER] [--size MiB] [--only ROW,...] [--no-docs] [--remark TEXT]...

          under 20 minutes without --quick and --full
--quick   under 3 minutes: short turns, few of them, small files
--full    an hour and a half: longer turns, and the rows that take 60 s and more (10 million records, 25 minutes for stability)
--size    MiB of the volume (default 8192, with --quick 512, less when the disk has little room)
--only    steps by their names (writes, peers, latency, sequential, device, curves, views, revert, memory, restart, engine, records, scaling, idle, stability); the other
          rows stay as the last run of the same mode and size left them, and the report says so
--remark  what the report is to say of the run, such as what else went on beside it
"""
import argparse
import concurrent.futures
import contextlib
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

import model
import report
from report import ROOT, run

BIN = os.path.join(ROOT, "target", "release")
TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def memory_mib(pid, field="VmRSS"):
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field + ":"))


def disk_requests(path):
    """Reads and writes that the disk under a file has completed so far; None where the kernel does not count them."""
    device = os.stat(path).st_dev
    try:
        with open(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat") as stat:
            fields = stat.read().split()
    except OSError:
        return None
    return int(fields[0]) + int(fields[4])


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
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(60)


class Bench:
    def __init__(self, args):
        self.args = args
        free = shutil.disk_usage(args.dir).free >> 20
        wanted = args.size or (512 if args.quick else 8192)
        # Files: the volume, a peer's, a third one, 1.75 times the volume as CDP disk; later those of the engine alone.
        self.size = wanted
        while self.size > 256 and self.size * 5.75 + 2048 > free * 0.85:
            self.size //= 2
        if self.size < wanted:
            args.remark.append(f"The volume was to have {wanted} MiB; with {free} MiB free there was room for {self.size}.")
        self.cdp_size = max(int(wanted * 1.75), 1536)
        self.seconds = 1 if args.quick else 5 if args.full else 2
        # Until the backlog of a guest that writes at random is as full as it stays: what is measured is no burst.
        self.ramp = 0.2 if args.quick else 2 if args.full else 1
        # For the rows of 32 random writes in flight: the backlog takes 16,384 writes of 4 KiB before any of them waits.
        self.long_ramp = self.ramp if args.quick or args.full else 4
        self.pairs = 2 if args.quick else 5
        self.dir = tempfile.mkdtemp(prefix="cdp-bench.", dir=args.dir)
        self.log = open(os.path.join(self.dir, "servers.log"), "w")
        self.stack = contextlib.ExitStack()
        self.rows, self.curves, self.facts, self.commands, self.failed = {}, {}, {}, {}, {}
        self.ours = self.qemu = None
        self.last_iops = 0
        self.began = time.monotonic()

    def path(self, name):
        return os.path.join(self.dir, name)

    def say(self, text):
        print(f"[{time.monotonic() - self.began:5.0f} s] {text}", flush=True)

    # -- servers -------------------------------------------------------------------------------------------------------

    def start_ours(self):
        folder = self.path("cdp")
        command = [f"{BIN}/cdp-agent", "--dev", folder, "--size", f"{self.size}MiB", "--cdp-size", f"{self.cdp_size}MiB"]
        self.shown(command)
        self.ours = Server("cdp-agent", command, f"nbd+unix:///demo?socket={folder}/nbd.sock", self.log)
        return self.ours

    def ctl(self, *command):
        command = [f"{BIN}/cdpctl", "--agent", f"unix:{self.path('cdp')}/agent.sock", "--output", "json", *command]
        self.shown(command)
        return json.loads(run(*command) or "null")

    def start_qemu(self, name="qemu-nbd", cache="none", file="peer.img"):
        socket = self.path(f"{name}.sock")
        aio = ["--aio=io_uring"] if cache == "none" else []
        command = ["qemu-nbd", "-f", "raw", f"--cache={cache}", *aio, "--persistent", "--socket", socket, self.path(file)]
        self.shown(command)
        return Server(name, command, f"nbd+unix:///?socket={socket}", self.log)

    def start_qsd(self, copy):
        socket = self.path("qsd.sock")
        node = lambda name, file: f"driver=file,node-name={name},filename={file},cache.direct=on,aio=io_uring"
        file = self.path("peer.img" if copy else "third.img")
        command = ["qemu-storage-daemon", "--blockdev", node("f", file), "--blockdev", "driver=raw,node-name=r,file=f"]
        if copy:
            command += ["--blockdev", node("tf", self.path("third.img")), "--blockdev", "driver=raw,node-name=t,file=tf"]
            command += ["--blockdev", "driver=copy-before-write,node-name=c,file=r,target=t"]
        top = "c" if copy else "r"
        command += ["--nbd-server", f"addr.type=unix,addr.path={socket}", "--export", f"type=nbd,id=e,node-name={top},name=x,writable=on"]
        self.shown(command)
        return Server("qemu-storage-daemon", command, f"nbd+unix:///x?socket={socket}", self.log)

    def start_nbdkit(self):
        socket = self.path("nbdkit.sock")
        # What an earlier turn left behind: nbdkit does not replace it.
        with contextlib.suppress(FileNotFoundError):
            os.remove(socket)
        command = ["nbdkit", "-f", "-U", socket, "file", self.path("third.img")]
        self.shown(command)
        return Server("nbdkit file", command, f"nbd+unix:///?socket={socket}", self.log)

    def prepare(self):
        """The volume, the peers' files, and a CDP disk whose ring has wrapped."""
        self.say(f"files: a volume of {self.size} MiB")
        os.makedirs(self.path("cdp"))
        # The third is for other servers and as the target of a copy. What fio reads and writes at random as a limit it does in the peer's file: of a file that
        # nobody used for minutes a disk may give a fraction of what it gives of one in use.
        for name in ["cdp/primary.img", "peer.img", "third.img"]:
            fill(self.path(name), self.size)
        fill(self.path("appends.img"), 512)
        self.start_ours().stop()
        rewrite(self.path("cdp/cdp.img"))
        self.start_ours()
        self.qemu = self.start_qemu()
        self.say("warming up: until the ring has wrapped")
        # A log is charged 8 KiB for each write, so this is more than the CDP disk holds.
        for _ in range(3 if self.args.full else 1):
            for target in [self.ours.uri, self.qemu.uri, self.path("third.img")]:
                # The other files too: blocks that were overwritten need not be as fast as fresh ones, nor fresh ones as these.
                self.fio(target, rw="write", bs="1m", depth=8, seconds=600, extra=["--time_based=0", "--loops=1"], ramp=0)
        self.settle()

    def restart_servers(self):
        """After a step that was broken off: nothing of it runs on, and those that all steps need run again."""
        # Jobs of a client that timed out are processes of their own.
        subprocess.run(["pkill", "-KILL", "-f", f"^fio .*{re.escape(self.dir)}"], check=False)
        for server in Server.started:
            server.stop()
        if self.ours:
            self.start_ours()
            self.qemu = self.start_qemu()

    # -- one turn ------------------------------------------------------------------------------------------------------

    def fio(self, uri, rw="randwrite", bs="4k", depth=32, seconds=None, size=None, extra=(), ramp=None):
        seconds, ramp = seconds or self.seconds, self.ramp if ramp is None else ramp
        target = ["--ioengine=nbd", f"--uri={uri}"] if uri.startswith("nbd") else ["--ioengine=io_uring", "--direct=1", f"--filename={uri}"]
        command = ["fio", "--name=t", *target, f"--rw={rw}", f"--bs={bs}", f"--iodepth={depth}", f"--size={size or self.size}m", "--randrepeat=0",
                   "--norandommap", "--time_based", f"--runtime={seconds}", f"--ramp_time={round(ramp * 1000)}ms", "--output-format=json",
                   "--percentile_list=50:99:99.9", *extra]
        self.shown(command)
        out = run(*command, timeout=3 * (seconds + ramp) + 120)
        job = json.loads(out[out.index("{"):])["jobs"][0]
        if job["error"]:
            raise RuntimeError(f"fio: error {job['error']}")
        side = job["write"] if job["write"]["total_ios"] else job["read"]
        lat = side["clat_ns"]
        return {"iops": side["iops"], "mib_s": side["bw"] / 1024, "both_mib_s": (job["read"]["bw"] + job["write"]["bw"]) / 1024,
                "both_iops": job["read"]["iops"] + job["write"]["iops"], "ios": side["total_ios"], "mean_us": lat["mean"] / 1e3,
                "p50_us": lat["percentile"]["50.000000"] / 1e3, "p99_us": lat["percentile"]["99.000000"] / 1e3,
                "p999_us": lat["percentile"]["99.900000"] / 1e3, "max_us": lat["max"] / 1e3}

    @contextlib.contextmanager
    def guest(self, uri, *options):
        """A guest that goes on until the block ends; its result is in the dictionary then."""
        command = ["fio", "--name=t", "--ioengine=nbd", f"--uri={uri}", "--bs=4k", f"--size={self.size}m", "--randrepeat=0", "--norandommap", "--time_based",
                   "--runtime=600", "--output-format=json", *options]
        self.shown(command)
        result, process = {}, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            yield result
        finally:
            process.send_signal(signal.SIGINT)
            try:
                out, _ = process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                out, _ = process.communicate()
            with contextlib.suppress(ValueError, KeyError):
                job = json.loads(out[out.index("{"):])["jobs"][0]
                result.update(iops=job["read"]["iops"] + job["write"]["iops"], error=job["error"],
                              max_ms=max(job[kind]["clat_ns"].get("max", 0) for kind in ("read", "write")) / 1e6)

    def shown(self, command):
        """Keeps a command for the report, once, with names for the folder of the files, views, instants and one of many volumes."""
        text = " ".join(str(part) for part in command).replace(self.dir, "DIR").replace(f"{BIN}/", "")
        for noise, name in [(r"/bench-\d+-", "/bench-PID-"), (r"[0-9a-f]{8}-[0-9a-f-]{27}", "VIEW"), (r"--at \d+", "--at INSTANT"), (r"\bv\d+\b", "vN"),
                            (r"\bvN(?: vN)+", "vN AND SO ON")]:
            text = re.sub(noise, name, text)
        self.commands[text] = None

    def settle(self):
        """Waits until the agent has brought its backlog to the primary: it must not work in the peer's turn."""
        deadline = time.monotonic() + 10
        while left := self.ctl("info", "demo")["backlog_bytes"]:
            if time.monotonic() > deadline:
                self.say(f"{left >> 20} MiB of the backlog are not on the primary after 10 s: the next turn has them beside it")
                return
            time.sleep(0.1)

    def moved(self):
        """Bytes that the guest wrote so far, and those that this brought about: frames and their indexes apart."""
        with open(os.path.join(self.path("cdp"), "metrics.addr")) as address:
            page = urllib.request.urlopen(f"http://{address.read().strip()}/metrics", timeout=30).read().decode()
        kinds = re.findall(r"^cdp_volume_(write|journal|index|before_image|before_index|destaged)_bytes_total\{[^}]*\} (\d+)$", page, re.M)
        return {kind: int(count) for kind, count in kinds}

    def counter(self, name):
        """A counter of the volume, by the middle of its name."""
        with open(os.path.join(self.path("cdp"), "metrics.addr")) as address:
            page = urllib.request.urlopen(f"http://{address.read().strip()}/metrics", timeout=30).read().decode()
        found = re.search(rf"^cdp_volume_{name}_total\{{[^}}]*\}} (\d+)$", page, re.M)
        return int(found[1]) if found else 0

    def turn(self, server, **kwargs):
        requests = lambda: self.counter("reads") + self.counter("writes")
        before, done = cpu_seconds(server.process.pid), requests() if server is self.ours else 0
        result = self.fio(server.uri, **kwargs)
        # With the ramp and what ran behind the acks: all of it belongs to the requests. A ramp may be faster than what comes after it.
        share, ramp = kwargs.get("seconds") or self.seconds, kwargs.get("ramp", self.ramp)
        in_all = result["ios"] * (share + ramp) / share
        if server is self.ours:
            self.settle()
            self.last_iops = result["iops"]
            in_all = requests() - done
        result["cpu_us"] = (cpu_seconds(server.process.pid) - before) * 1e6 / max(1, in_all)
        return result

    def interleaved(self, servers, pairs=None, after=None, **kwargs):
        """Turns of each server, there and back again, and `after` behind each round: results by server."""
        results = {server.name: [] for server in servers}
        for number in range(pairs or self.pairs):
            for server in servers if number % 2 == 0 else servers[::-1]:
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
    limits, seen, evicted = [], [b.moved()], b.counter("evicted_capacity")

    def shares(old, new):
        # Each byte of the guest came with so many of each kind; it wrote in its own turn only.
        share = lambda *kinds: sum(new[kind] - old[kind] for kind in kinds) / (new["write"] - old["write"])
        return {"journal_bytes_per_guest_byte": share("journal", "index"), "index_bytes_per_guest_byte": share("index"),
                "before_image_bytes_per_guest_byte": share("before_image", "before_index"), "before_index_bytes_per_guest_byte": share("before_index"),
                "primary_bytes_per_guest_byte": share("destaged")}

    def limit():
        seen.append(b.moved())
        moved = shares(*seen[-2:])
        iops, cpu_us = mix(b, moved, 30000, b.path("peer.img"))
        limits.append({"moved": moved, "iops": iops, "cpu_us": cpu_us})

    results = b.interleaved([ours, qemu], after=limit, rw="randwrite", depth=32, seconds=seconds, ramp=b.long_ramp)
    b.facts["randwrite_qd32"], b.facts["randwrite_fio_same_mix"] = results, limits
    b.row("randwrite", f"NBD 4K random write QD32 / qemu-nbd raw cache=none", (">=", 1.0), b.ratios(results, ours.name, qemu.name),
          note=f"{seconds} s a turn, after {b.long_ramp} s of the same; {b.counter('evicted_capacity') - evicted} logs evicted in all of them"
          + ("" if b.args.full else "; 60 s with FULL=1"))
    fit = statistics.median(most["iops"] / peer["iops"] for most, peer in zip(limits, results[qemu.name]))
    b.row("randwrite_limit", "the same / fio straight on the file, the same random reads, random writes and appends, 64 in flight", (None, None),
          [turn["iops"] / most["iops"] for turn, most in zip(results[ours.name], limits)],
          note=f"median {statistics.median(most['iops'] for most in limits):,.0f}/s fit, that is {fit:.2f} of qemu-nbd")
    # Over all turns: what a log's end costs falls into one of several.
    whole, each = shares(seen[0], seen[-1]), [most["moved"]["journal_bytes_per_guest_byte"] for most in limits]
    b.row("journal_bytes", "bytes written to the CDP disk / guest bytes, 4K QD32, before-images aside", ("<=", 1.05), [whole["journal_bytes_per_guest_byte"]],
          note=f"the turns over NBD of the first row together, index counted in, {whole['index_bytes_per_guest_byte']:.3f} of it; one by one {min(each):.3f} to {max(each):.3f}; "
          f"before-images and their index: {whole['before_image_bytes_per_guest_byte']:.3f}", index=whole["index_bytes_per_guest_byte"])
    b.row("cpu", "CPU time per 4K write, whole process / qemu-nbd raw", ("<=", 1.5), b.ratios(results, ours.name, qemu.name, "cpu_us"),
          note="32 in flight, the turns of the first row; what runs behind the ack counted in")
    b.row("cpu_limit", "processor time of fio for the same physical mix / qemu-nbd raw's for the write", (None, None),
          [most["cpu_us"] / peer["cpu_us"] for most, peer in zip(limits, results[qemu.name]) if peer["cpu_us"]],
          note="straight on the files: no socket and no checksums, which the servers have")
    for depth in (4, 8) if b.args.full else ():
        results = b.interleaved([ours, qemu], rw="randwrite", depth=depth)
        b.facts[f"randwrite_qd{depth}"] = results
        b.row(f"randwrite_qd{depth}", f"NBD 4K random write QD{depth} / qemu-nbd raw cache=none", (None, None), b.ratios(results, ours.name, qemu.name),
              note=f"processor time {statistics.median(b.ratios(results, ours.name, qemu.name, 'cpu_us')):.2f} of it")


@contextlib.contextmanager
def stopped(server):
    """Stops the server at the end, however that comes."""
    try:
        yield server
    finally:
        server.stop()


def peers(b):
    """Other servers, one at a time."""
    starts = {"copy-before-write": lambda: b.start_qsd(True), "qemu-storage-daemon raw": lambda: b.start_qsd(False), "nbdkit file": b.start_nbdkit,
              "qemu-nbd writeback": lambda: b.start_qemu("qemu-nbd-writeback", "writeback", "third.img")}
    copying, later = "copy-before-write", "copy-before-write, 5 to 60 s after its start"
    others, ours = {name: [] for name in [copying, *([later] if b.args.full else []), *starts]}, []
    others["fio on the file"] = []
    b.qemu.stop()

    def own():
        ours.append(b.turn(b.ours, rw="randwrite", depth=32, seconds=15 if b.args.full else None, ramp=b.long_ramp))

    # Round -1 is thrown away: the target of the copy is written to for the first time in a while.
    for number in range(0 if b.args.quick else -1, b.pairs):
        if number >= 0 and number % 2 == 0:
            own()
        for name, start in starts.items():
            if name != copying and (number < 0 or number >= (1 if b.args.quick else 3 if b.args.full else 2)):
                continue
            # A fresh start each time: the copy's point in time begins anew. It has the more to copy, the less of it is copied yet.
            with stopped(start()) as server:
                first = b.turn(server, rw="randwrite", depth=32, ramp=0)
                rest = b.turn(server, rw="randwrite", depth=32, seconds=55, ramp=0) if later in others and name == copying else None
            # What a server with a page cache has left is not to be written in the next one's turn.
            os.sync()
            if number >= 0:
                others[name].append(first)
                if rest:
                    others[later].append(rest)
        if number >= 0:
            others["fio on the file"].append(b.fio(b.path("third.img"), rw="randwrite", depth=32))
            if number % 2:
                own()
    b.qemu = b.start_qemu()
    b.facts["randwrite_others"] = {"cdp-agent beside them": ours, **others}
    early = [turn["iops"] for turn in others[copying]]
    ratios = lambda peer: [a["iops"] / rate for a, rate in zip(ours, peer)]
    what = "the same / qemu-storage-daemon copy-before-write"
    if b.args.full:
        whole = [(5 * first + 55 * turn["iops"]) / 60 for first, turn in zip(early, others[later])]
        b.row("cbw", f"{what}, 60 s from a fresh start", (">=", 2.0), ratios(whole),
              note="it keeps one instant, that of its start: what it has copied it need not copy again")
    b.row("cbw_copying", f"{what}, {b.seconds} s from a fresh start", (None, None) if b.args.full else (">=", 2.0), ratios(early),
          note="while it copies" + ("" if b.args.full else "; 60 s with FULL=1"))
    seconds = 20 if b.args.full else b.seconds
    hot = b.interleaved([b.ours, b.qemu], rw="randwrite", depth=32, size=64, seconds=seconds)
    b.facts["hot_set"] = hot
    b.row("hot", "the same on a 64 MiB hot set / qemu-nbd raw", (">=", 1.2), b.ratios(hot, b.ours.name, b.qemu.name), note=f"{seconds} s a turn")


def latency(b):
    servers, name = [b.ours, b.qemu], b.ours.name
    with stopped(b.start_qemu("qemu-nbd-appends", file="appends.img")) as appender:
        for rows, options in [({"flush": ("4K write + flush QD1", (">=", 1.0), "iops")}, {"extra": ["--fsync=1"]}),
                              ({"p50": ("4K random write QD1 latency p50", ("<=", 1.1), "p50_us"), "p99": ("4K random write QD1 latency p99", ("<=", 1.5), "p99_us")}, {})]:
            limits = []
            results = b.interleaved(servers, after=lambda: limits.append(appends_beside(b, appender, b.last_iops, **options)), rw="randwrite", depth=1, **options)
            b.facts["write_flush_qd1" if options else "randwrite_qd1"] = {**results, "limit": limits}
            for row, (what, target, key) in rows.items():
                b.row(row, f"NBD {what} / qemu-nbd raw", target, b.ratios(results, name, b.qemu.name, key))
                fit = statistics.median(most[key] / peer[key] for most, peer in zip(limits, results[b.qemu.name]))
                b.row(row + "_limit", "the same / appends of 8 KiB one at a time to qemu-nbd, as many random reads and writes of fio beside them", (None, None),
                      [turn[key] / most[key] for turn, most in zip(results[name], limits)], note=f"that is {fit:.2f} of qemu-nbd with writes of 4 KiB and nothing beside them")


def appends_beside(b, server, rate, extra=()):
    """What any server can give a guest with one write in flight when it appends a header and a block, while as many blocks a second are read and written at random."""
    command = ["fio", "--time_based", f"--runtime={b.seconds}", "--randrepeat=0", "--norandommap", "--output-format=json",
               "--percentile_list=50:99:99.9", "--name=appends", "--ioengine=nbd", f"--uri={server.uri}", "--size=512m", "--rw=write", "--bs=8k", "--iodepth=1", *extra,
               "--name=behind", "--ioengine=io_uring", "--direct=1", f"--filename={b.path('peer.img')}", f"--size={b.size}m", "--rw=randrw", "--bs=4k", "--iodepth=2",
               f"--rate_iops={int(rate)},{int(rate)}"]
    out = run(*command)
    b.shown(re.sub(r"^--rate_iops=.*", "--rate_iops=AS_MEASURED", part) for part in command)
    side = json.loads(out[out.index("{"):])["jobs"][0]["write"]
    percentiles = side["clat_ns"]["percentile"]
    return {"iops": side["iops"], "p50_us": percentiles["50.000000"] / 1e3, "p99_us": percentiles["99.000000"] / 1e3}


def both_ways(b, reads, file="peer.img"):
    """MiB/s that the disk moves, straight and in both directions together, when so many percent are reads: the limit of what moves bytes several times."""
    # Of 512 KiB: a buffer of 1 MiB in small pages is more than a request to a disk may have, and each would be cut in two.
    return b.fio(b.path(file), rw="rw", bs="512k", depth=16, seconds=min(b.seconds, 3), ramp=0, extra=[f"--rwmixread={reads}"])["both_mib_s"]


def sequential(b):
    servers = [b.ours, b.qemu]
    # Where the disk itself may be the limit: how often it moves each byte, and how many percent of these moves are reads.
    # Of a byte written: append, read of the old content, its before-image, write to the primary.
    for name, what, rw, bound, moves, reads, file, limit in [
        ("seqwrite", "NBD 1 MiB sequential write", "write", 0.9, 4, 25, "peer.img", "fio straight on the disk, the four moves of each byte"),
        ("seqread", "NBD 1 MiB sequential read", "read", 1.0, 1, 100, "cdp/primary.img", "fio straight on the same file"),
    ]:
        limits = []
        results = b.interleaved(servers, after=lambda: limits.append(both_ways(b, reads, file) / moves), rw=rw, bs="1m", depth=8)
        b.facts[name] = {**results, "limit_mib_s": limits}
        b.row(name, f"{what} / qemu-nbd raw", (">=", bound), b.ratios(results, b.ours.name, b.qemu.name))
        b.row(name + "_limit", f"the same / {limit}", (None, None), [turn["mib_s"] / most for turn, most in zip(results[b.ours.name], limits)],
              note=f"median {statistics.median(limits):.0f} MiB/s fit, that is {statistics.median(m / q['mib_s'] for m, q in zip(limits, results[b.qemu.name])):.2f} of qemu-nbd")
    # Two files of one disk need not be equally fast: a host may keep one of them elsewhere.
    files = {"protected": os.path.join(b.path("cdp"), "primary.img"), "peers": b.path("peer.img")}
    straight = {name: [] for name in files}
    each = lambda: [straight[name].append(b.fio(path, rw="randread", seconds=max(1, b.seconds // 2), ramp=0)["iops"]) for name, path in files.items()]
    results = b.interleaved(servers, after=each, rw="randread")
    b.facts["randread"] = {**results, "fio_on_the_file": straight}
    b.row("randread", "NBD 4K random read QD32 / qemu-nbd raw", (">=", 1.0), b.ratios(results, b.ours.name, b.qemu.name))
    b.row("randread_files", "fio straight on the protected volume's file / on that of the peers, 4K random read QD32", (None, None),
          [own / peer for own, peer in zip(*straight.values())], note="how much of the row before is the disk's")


def cdp_bench(b, what, *options):
    command = [f"{BIN}/cdp-bench", what, b.path("engine"), *options]
    b.shown(command)
    return json.loads(run(*command))


def engine_bench(b, *options):
    return cdp_bench(b, "engine", *options)


def late(runs):
    """For a note on bytes: runs whose last writes were not destaged in time are counted short."""
    count = sum(not run_["drained"] for run_ in runs)
    return f"; the last writes of {count} of {len(runs)} runs were not destaged when they ended" if count else ""


def mix(b, moved, guest, file, appends=None):
    """fio with the physical mix of protected writes: random reads and writes in the proportion that was measured, appends at the rate of `guest` writes a second
    and then at the one that came out. Answers how many writes of the guest fit into that, and the processor time of fio for each, in microseconds."""
    appends = appends or b.path("appends.img")
    before, writes_ = moved["before_image_bytes_per_guest_byte"], moved["primary_bytes_per_guest_byte"]
    appended = moved["journal_bytes_per_guest_byte"] + before
    # No old content is read for an index.
    reads = before - moved.get("before_index_bytes_per_guest_byte", 0)
    share = reads + writes_
    for _ in range(2):
        command = ["fio", "--ioengine=io_uring", "--direct=1", "--time_based", f"--runtime={b.seconds}", "--randrepeat=0", "--norandommap",
                   "--output-format=json", "--name=random", f"--filename={file}", f"--size={os.path.getsize(file) >> 20}m", "--rw=randrw", "--bs=4k",
                   "--iodepth=64", f"--rwmixread={round(100 * reads / share)}", "--name=appends", f"--filename={appends}",
                   "--rw=write", "--bs=128k", "--iodepth=2", f"--rate={int(guest * 4096 * appended)}"]
        out = run(*command)
        job, behind = json.loads(out[out.index("{"):])["jobs"]
        asked, appended_s = guest, behind["write"]["iops"] * (128 << 10) / (4096 * appended)
        guest = (job["read"]["iops"] + job["write"]["iops"]) / share
        # Appends that fell behind the rate that they were to have are what does not fit.
        if appended_s < 0.95 * asked:
            guest = max(1, min(guest, appended_s))
        b.shown(re.sub(r"^--(rate|rwmixread)=.*", r"--\1=AS_MEASURED", part) for part in command)
    # User and system time are in percent of the job's own run, which is in milliseconds.
    busy_us = lambda job: (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] * 1e3
    moves, frames = job["read"]["total_ios"] + job["write"]["total_ios"], behind["write"]["io_bytes"]
    return guest, busy_us(job) / max(1, moves) * share + busy_us(behind) / max(1, frames) * 4096 * appended


def engine(b):
    size = min(b.size, 512 if b.args.quick else 8192 if b.args.full else 2048)
    # A write is charged 8 KiB: the ring wraps while the ramp runs, and logs are evicted all the time.
    options = ["--size", size, "--reserve", min(size, 2048) if b.args.full else size // 4, "--seconds", b.seconds * 2, "--ramp", 1 if b.args.quick else 15 if b.args.full else 4]
    runs, limits = [], []
    for _ in range(2 if b.args.quick else 5):
        kept = engine_bench(b, *options, "--depth", 32, "--keep")
        runs.append(kept)
        # On the very files: what a disk gives of one depends on when it was used last.
        try:
            limits.append(mix(b, kept, kept["iops"], kept["primary"], kept["cdp"])[0])
        finally:
            for file in (kept.pop("primary"), kept.pop("cdp")):
                os.remove(file)
    b.facts["engine"] = {"runs": runs, "fio_same_mix_iops": limits}
    evicted = statistics.median(run_["evicted"] for run_ in runs)
    b.row("engine", "engine alone, 4K random write QD32 / fio with the same physical mix", (">=", 0.7),
          [run_["iops"] / limit for run_, limit in zip(runs, limits)],
          note=f"{size} MiB; {evicted:.0f} logs evicted in a turn" + (", so the ring wraps" if evicted else ""))
    b.row("journal_bytes_engine", "the same, engine alone", (None, None), [run_["journal_bytes_per_guest_byte"] for run_ in runs],
          note=f"{size} MiB; from the first write until nothing waits to be destaged or merged, index counted in, "
          f"{statistics.median(run_['index_bytes_per_guest_byte'] for run_ in runs):.3f} of it"
          + late(runs))
    total = lambda r: r["journal_bytes_per_guest_byte"] + r["before_image_bytes_per_guest_byte"] + r["primary_bytes_per_guest_byte"]
    b.row("amplification", "total write amplification, before-images and primary counted in", (None, None), [total(r) for r in runs],
          note="engine alone, QD32, uniform; index counted in" + late(runs))
    # A smaller volume: each point makes its own files. One reservation for all points, since a log is a share of it; bytes are counted from the first write on, so
    # there is no ramp.
    small = lambda mib, seconds: ["--size", max(mib, min(size, 1024)), "--reserve", min(size, 1024), "--seconds", seconds, "--ramp", 0]
    depths = [1, 2, 4, 8, 16, 32, 128] if b.args.full else [1, 8, 32]
    points = [(32, runs[0])] if b.args.quick else [(d, engine_bench(b, *small(0, 3), "--depth", d)) for d in depths]
    b.curves["amplification_depth"] = {"x": "writes in flight", "y": "bytes written / guest bytes", "series": {
        "CDP disk, without before-images": [(d, r["journal_bytes_per_guest_byte"]) for d, r in points], "all": [(d, total(r)) for d, r in points]}}
    if b.args.quick:
        return
    points = [(s, engine_bench(b, *small(s, 3), "--working-set", s)) for s in sorted({64, 256, 1024, size})]
    b.curves["amplification_set"] = {"x": "MiB that are written to", "y": "bytes written / guest bytes", "series": {
        "before-images": [(s, r["before_image_bytes_per_guest_byte"]) for s, r in points],
        "primary": [(s, r["primary_bytes_per_guest_byte"]) for s, r in points], "all": [(s, total(r)) for s, r in points]}}
    # How long a block is left alone decides whether the backlog or its log knows it still.
    # While it is measured each block must come round, at 10,000 writes a second or more.
    apart = [4, 16, 64, 256, 1024] if b.args.full else [4, 16, 64]
    points = [(d, engine_bench(b, *small(d, max(3, d * 256 // 10_000)), "--distance", d)) for d in apart]
    b.curves["amplification_distance"] = {"x": "MiB written between two writes of a block", "y": "bytes written / guest bytes", "series": {
        "before-images": [(d, r["before_image_bytes_per_guest_byte"]) for d, r in points],
        "primary": [(d, r["primary_bytes_per_guest_byte"]) for d, r in points], "all": [(d, total(r)) for d, r in points]}}


def records(b):
    counts = [100_000, 300_000 if b.args.quick else 1_000_000]
    if b.args.full:
        counts += [10_000_000]
    runs = {}
    # One reservation for all, with room for the most: a log is a fixed share of it, and what is in memory is a share of a log.
    reserve = 1024 + counts[-1] * 200 // (1 << 20)
    for count in counts:
        # A file with holes, and zeroes into it: a large one takes no room.
        runs[count] = cdp_bench(b, "views", "--records", count, "--reserve", reserve, *([] if b.args.quick else ["--size", 8192]))
        b.say(f"{count} records: {json.dumps(runs[count]['open'])}")
    b.facts["records"] = runs
    most, gone = counts[-1], max(run_["evicted"] for run_ in runs.values())
    kind = f"4 KiB write-zeroes, at random over {1024 if b.args.quick else 8192} MiB; "
    kind += (f"{gone} logs were evicted, and their records with them" if gone else "none of their logs evicted")
    open_ = lambda count: runs[count]["open"]
    b.row("view_open", f"view open with {most:,} records, p99, ms", ("<=", 10), [open_(most)["p99_us"] / 1000],
          note=f"p50 {open_(most)['p50_us'] / 1000:.2g}; engine alone; {kind}" + ("" if b.args.full else "; 10 million with FULL=1"))
    fewer = max(count for count in counts if count < most)
    b.row("view_open_flat", f"view open p50, {most:,} records / {fewer:,}", (None, None), [open_(most)["p50_us"] / max(1e-9, open_(fewer)["p50_us"])],
          note=f"with {fewer:,} p50 {open_(fewer)['p50_us'] / 1000:.2g}, p99 {open_(fewer)['p99_us'] / 1000:.2g} ms; flat is near 1, or far below the bound")
    resident = lambda count: runs[count]["resident_after_filling_mib"]
    b.row("memory_records", f"memory with {most:,} records / {fewer:,}", ("<=", 1.2) if b.args.full else (None, None), [resident(most) / max(1, resident(fewer))],
          note=f"flat; {resident(fewer)} and {resident(most)} MiB, engine alone, both in a reservation of {reserve} MiB; after 10,000 reads of 200 views, whose pages of "
          f"the index are kept up to a bound, {runs[fewer]['resident_mib']} and {runs[most]['resident_mib']}")
    b.curves["records"] = {"x": "records in the journal", "y": "microseconds, p99", "series": {
        "view open": [(c, r["open"]["p99_us"]) for c, r in runs.items()], "view read, old": [(c, r["read_old"]["p99_us"]) for c, r in runs.items()],
        "view read, young": [(c, r["read_young"]["p99_us"]) for c, r in runs.items()]}}


def views(b):
    b.fio(b.ours.uri, rw="randwrite", depth=32)
    b.settle()
    history = lambda: (b.ctl("info", "demo")["coverage"][-1]["start"], b.ctl("mark", "demo")["time"])
    _, now = history()
    b.fio(b.ours.uri, rw="randwrite", depth=32, seconds=1)
    b.settle()
    # Only now: those writes may have cost the oldest log. A second from the end, which moves on by logs. The young instant has that second of writes, and their way
    # to the primary, behind it: at the very end of the history a view has nothing to ask but the volume.
    young, (oldest, now) = now, history()
    instants = {"old": oldest + 1_000_000_000, "middle": (oldest + now) // 2, "young": young}
    opened = {}
    for age, at in instants.items():
        began = time.monotonic()
        view = b.ctl("view", "open", "demo", "--at", at)
        opened[age] = (view, (time.monotonic() - began) * 1000)
    targets = {"volume": b.ours.uri, **{age: view["nbd_uri"] for age, (view, _) in opened.items()}}
    iops, files = {name: [] for name in targets}, []
    # The first round is thrown away: nobody has read here for a while, and each file grows faster with use.
    for number in range(0 if b.args.quick else -1, b.pairs):
        for name, uri in list(targets.items())[::1 if number % 2 else -1]:
            rate = b.fio(uri, rw="randread", depth=32, ramp=min(b.ramp, 0.5))["iops"]
            if number >= 0:
                iops[name].append(rate)
        journal, primary = (b.fio(b.path(f"cdp/{file}.img"), rw="randread", seconds=max(1, b.seconds // 2), ramp=0)["iops"] for file in ("cdp", "primary"))
        if number >= 0:
            files.append(journal / primary)
    ratios = {age: [mine / volume for mine, volume in zip(iops[age], iops["volume"])] for age in opened}
    b.facts["views"] = {"open_ms_with_cdpctl": {age: ms for age, (_, ms) in opened.items()}, "read_iops": iops, "history_s": (now - oldest) / 1e9}
    for age in opened:
        back = (now - instants[age]) / 1e9
        b.row(f"view_read_{age}", f"view 4K random read QD32 / volume 4K random read, {age} instant", (">=", 0.8), ratios[age],
              note=f"{back:.{1 if back < 10 else 0}f} s back of {(now - oldest) / 1e9:.0f} s of history"
              f"{', a second of random writes since' if age == 'young' else ''}; opened in {opened[age][1]:.1f} ms, the start of cdpctl counted in")
        b.ctl("view", "close", opened[age][0]["id"])
    b.row("view_read_files", "fio straight on the CDP disk / on the protected volume's file, 4K random read QD32", (None, None), files,
          note="an old view reads what has changed since from the first, and once a page of an index")
    ratios, rates, readers = [], [], []

    def guest_alone():
        rate = b.fio(b.ours.uri, rw="randwrite", depth=32)["iops"]
        b.settle()
        return rate

    def guest_beside():
        # From the middle of the history: one from its end may lose its log to the writes of this very row, as it should.
        oldest, now = history()
        view = b.ctl("view", "open", "demo", "--at", (oldest + now) // 2)
        with b.guest(view["nbd_uri"], "--rw=randread", "--iodepth=32") as reader:
            time.sleep(0.5)
            rate = b.fio(b.ours.uri, rw="randwrite", depth=32)["iops"]
        readers.append(reader)
        b.ctl("view", "close", view["id"])
        b.settle()
        return rate

    for number in range(b.pairs):
        if number % 2 == 0:
            alone, beside_ = guest_alone(), guest_beside()
        else:
            beside_, alone = guest_beside(), guest_alone()
        ratios.append(beside_ / alone)
        rates.append((alone, beside_))
    reads, errors = statistics.median(reader.get("iops", 0) for reader in readers), sum(bool(reader.get("error", 1)) for reader in readers)
    b.facts["guest_beside_view"] = {"alone_and_beside": rates, "reads_s": [reader.get("iops", 0) for reader in readers]}
    b.row("guest_beside_view", "guest IOPS while a view is read at full speed / without", (">=", 0.5), ratios,
          note=f"a view from the middle of the history, read with 32 in flight: {reads:,.0f} reads/s; {errors} readers ended with an error")


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
        with b.guest(b.ours.uri, "--rw=randrw", "--iodepth=1") as guest:
            blocks = 0
            while total := (b.ctl("info", "demo").get("revert") or {}).get("blocks_total"):
                blocks = total
                time.sleep(0.01)
                if time.monotonic() - began > 600:
                    raise RuntimeError("the revert is copied for ten minutes")
            copy_s = time.monotonic() - began
        disk = b.fio(b.path("peer.img"), rw="write", bs="512k", depth=16, seconds=1, ramp=0)["mib_s"]
        # Of each byte: read of the target's content and of the present one, its before-image, write to the primary.
        limit = both_ways(b, 50) / 4
        # Of the logs back to the instant all blocks are copied, also those that were written there before it only.
        copied = max(changed, blocks >> 8)
        rounds.append({"changed_mib": changed, "copied_mib": copied, "call_ms": call_ms, "until_copied_s": copy_s, "guest_meanwhile": guest,
                       "disk_mib_s": disk, "limit_mib_s": limit})
    b.facts["revert"] = rounds
    median = lambda of: statistics.median(of(r) for r in rounds)
    b.row("revert_call", f"revert over {changed} MiB of changed blocks: until the call returns, ms", ("<=", 200), [r["call_ms"] for r in rounds],
          note="with the start of cdpctl")
    b.row("revert_copy", "its background copy / disk bandwidth", (">=", 0.5), [r["copied_mib"] / r["until_copied_s"] / r["disk_mib_s"] for r in rounds],
          note=f"{median(lambda r: r['copied_mib']):.0f} MiB in all; a guest beside all of it, one read or write at a time: {median(lambda r: r['guest_meanwhile'].get('iops', 0)):.0f}/s, longest "
          f"{max(r['guest_meanwhile'].get('max_ms', 0) for r in rounds):.0f} ms, {sum(bool(r['guest_meanwhile'].get('error', 1)) for r in rounds)} guests with an error")
    b.row("revert_limit", "its background copy / fio straight on the file, four moves of each byte on one disk", (None, None),
          [r["copied_mib"] / r["until_copied_s"] / r["limit_mib_s"] for r in rounds],
          note=f"{median(lambda r: r['limit_mib_s']):.0f} MiB/s fit, that is {median(lambda r: r['limit_mib_s'] / r['disk_mib_s']):.2f} of the disk's bandwidth")


def restart(b):
    used = b.ctl("info", "demo")["used_bytes"] / (1 << 30)
    times = []
    read = ["qemu-io", "-f", "raw", "-r", "-c", "read 0 4k", b.ours.uri]
    b.shown(read)
    for _ in range(1 if b.args.quick else b.pairs):
        with b.guest(b.ours.uri, "--rw=randwrite", "--iodepth=32"):
            time.sleep(1.5)
            b.ours.stop(signal.SIGKILL)
        began = time.monotonic()
        folder = b.path("cdp")
        process = subprocess.Popen([f"{BIN}/cdp-agent", "--dev", folder, "--size", f"{b.size}MiB", "--cdp-size", f"{b.cdp_size}MiB"], stdout=b.log, stderr=b.log)
        b.ours.process = process
        while subprocess.run(read, capture_output=True).returncode:
            time.sleep(0.01)
            if process.poll() is not None or time.monotonic() - began > 60:
                raise RuntimeError("the agent does not come up after a kill")
        times.append(time.monotonic() - began)
    b.row("restart", f"start after kill -9 with {used:.1f} GiB of history until the first read is served, s", ("<=", 1.0), times, note="killed while 32 writes are in flight")


def memory(b):
    b.row("memory_loaded", "memory: 1 volume under load, MiB", ("<=", 256), [memory_mib(b.ours.process.pid, "VmHWM")], note="the most in this run")


def end(agent):
    """Ends an agent, one that hangs too."""
    agent.terminate()
    try:
        agent.wait(120)
    except subprocess.TimeoutExpired:
        agent.kill()
        agent.wait(60)


def many_agent(b, folder, more=""):
    """An agent without volumes, and the way to ask it."""
    with open(f"{folder}/config.toml", "w") as config:
        config.write(f'state_dir = "{folder}/state"\n[grpc]\nunix = "{folder}/agent.sock"\n[nbd]\nunix = "{folder}/nbd.sock"\n'
                     f'[metrics]\nlisten = "off"\n{more}')
    command = [f"{BIN}/cdp-agent", "--config", f"{folder}/config.toml"]
    b.shown(command)
    agent = subprocess.Popen(command, stdout=b.log, stderr=b.log)
    try:
        wait_for(f"{folder}/agent.sock", agent)
    except RuntimeError:
        agent.kill()
        agent.wait(60)
        shutil.rmtree(folder, ignore_errors=True)
        raise

    def ctl(*command):
        command = [f"{BIN}/cdpctl", "--agent", f"unix:{folder}/agent.sock", "--output", "json", *command]
        b.shown(command)
        return run(*command)

    return agent, ctl


def scaling(b):
    """Many volumes on one CDP disk, written at once."""
    counts = [1, 8] if b.args.quick else [1, 2, 8, 64]
    sums, requests, straight, each = {count: [] for count in counts}, {count: [] for count in counts}, {1: [], counts[-1]: []}, {1: [], counts[-1]: []}
    folder = b.path("many")
    os.makedirs(folder)
    # All together are as large as the volume of the other rows: the backlogs must not hold them.
    mib = b.size // 64
    reserve = max(64, mib)
    fill(f"{folder}/cdp.img", counts[-1] * reserve + 256)
    agent, ctl = many_agent(b, folder)
    try:
        # It holds no journal: what fills it is not known, and may look like anything.
        ctl("disk", "init", f"{folder}/cdp.img", "--segment-size", "1MiB", "--force")
        for number in range(counts[-1]):
            fill(f"{folder}/v{number}.img", mib)
            ctl("volume", "add", f"v{number}", "--path", f"{folder}/v{number}.img")
        names = [f"v{number}" for number in range(counts[-1])]
        ctl("edit", *names, "--reserve-capacity", f"{reserve}MiB", "--reserve-duration", "1h", "--priority", "mid")
        ctl("enable", *names)
        # Twice as much as its reservation holds into each volume: the ring has wrapped in all of them.
        uri = lambda name: f"--uri=nbd+unix:///{name}?socket={folder}/nbd.sock"
        for group in range(0, counts[-1], 8):
            command = ["fio", "--ioengine=nbd", "--rw=write", "--bs=1m", "--iodepth=2", f"--size={mib}m", "--thread", f"--loops={-(-reserve // mib)}"]
            b.shown([*command, f"--name={names[0]}", uri(names[0]), "AND SO ON"])
            run(*command, *(part for name in names[group:group + 8] for part in (f"--name={name}", uri(name))), timeout=1200)

        def at_once(count, depth):
            """4K writes/s of the first so many volumes together, so many in flight in each."""
            jobs = [part for name in names[:count] for part in (f"--name={name}", uri(name))]
            command = ["fio", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", f"--iodepth={depth}", f"--size={mib}m", "--randrepeat=0",
                       "--norandommap", "--time_based", f"--runtime={b.seconds}", f"--ramp_time={round(min(1, b.ramp) * 1000)}ms", "--thread", "--output-format=json"]
            b.shown([*command, *jobs[:2], *(["AND SO ON"] if count > 1 else [])])
            out = run(*command, *jobs, timeout=300)
            return sum(job["write"]["iops"] for job in json.loads(out[out.index("{"):])["jobs"])

        def settle():
            deadline = time.monotonic() + 30
            while any(volume["backlog_bytes"] for volume in json.loads(ctl("list"))["list"]) and time.monotonic() < deadline:
                time.sleep(0.2)

        rounds = [count for number in range(b.pairs) for count in counts[::1 if number % 2 else -1] if b.args.full or count in (1, counts[-1]) or number == 0]
        for count in rounds:
            before, began = disk_requests(folder), time.monotonic()
            # The same requests in flight in all.
            sums[count].append(at_once(count, max(1, 64 // count)))
            seconds, after = time.monotonic() - began, disk_requests(folder)
            if before is not None:
                requests[count].append((after - before) / seconds)
            settle()
            if b.args.full and count in each:
                each[count].append(at_once(count, 32))
                settle()
            if count in straight:
                # What the disk gives for one file and for all, past the agent: the content of these volumes is nobody's, and they go at the end of this step.
                command = ["fio", "--ioengine=io_uring", "--direct=1", "--rw=randwrite", "--bs=4k", f"--iodepth={max(1, 64 // count)}", f"--size={mib}m", "--randrepeat=0",
                           "--norandommap", "--time_based", f"--runtime={min(b.seconds, 2)}", "--thread", "--output-format=json"]
                files = [part for name in names[:count] for part in (f"--name={name}", f"--filename={folder}/{name}.img")]
                b.shown([*command, *files[:2], *(["AND SO ON"] if count > 1 else [])])
                out = run(*command, *files, timeout=300)
                straight[count].append(sum(job["write"]["iops"] for job in json.loads(out[out.index("{"):])["jobs"]))
    finally:
        end(agent)
        shutil.rmtree(folder)
    b.facts["scaling"], b.facts["scaling_disk_requests"], b.facts["scaling_straight"], b.facts["scaling_each"] = sums, requests, straight, each
    # What a write costs the disk: alone in its volume, a write has an append of its own.
    asked = ""
    if requests[1]:
        one, many = (statistics.median(requests[count]) for count in (1, counts[-1]))
        asked = (f"; the disk does {one:,.0f} requests/s for one and {many:,.0f} for {counts[-1]}, that is {one / statistics.median(sums[1]):.1f} and "
                 f"{many / statistics.median(sums[counts[-1]]):.1f} for a write")
    b.row("scaling", f"sum of IOPS of {counts[-1]} volumes written at once / one volume's", (">=", 0.9), [many / one for many, one in zip(sums[counts[-1]], sums[1])],
          note=f"64 requests in flight in all, each volume {mib} MiB{asked}; the best of the counts: {max(statistics.median(of) for of in sums.values()):,.0f}/s" + ("; 64 volumes without QUICK=1" if b.args.quick else ""))
    if b.args.full:
        b.row("scaling_each", f"the same, 32 requests in flight in each volume: {counts[-1]} of them / one", (">=", 0.9), [many / one for many, one in zip(each[counts[-1]], each[1])],
              note=f"in the same rounds; {statistics.median(each[1]):,.0f}/s in one volume of {mib} MiB, {statistics.median(each[counts[-1]]):,.0f}/s in all")
    b.row("scaling_limit", f"the same, fio straight on those files: {counts[-1]} of them / one", (None, None), [many / one for many, one in zip(straight[counts[-1]], straight[1])],
          note=f"64 requests in flight in all, in the same rounds; {statistics.median(straight[1]):,.0f}/s on one file of {mib} MiB, "
          f"{statistics.median(straight[counts[-1]]):,.0f}/s on all")
    b.curves["volumes"] = {"x": "volumes written at once", "y": "4K writes/s, sum", "series": {"cdp-agent": [(count, statistics.median(of)) for count, of in sums.items()]}}


def curves(b):
    servers = [b.ours, b.qemu]
    seconds = 3 if b.args.full else 1
    rounds = 2 if b.args.full else 1
    # Fewer points where the whole run is to take less than 20 minutes.
    depths, fewer = ([1, 2, 4, 8, 16, 32, 64, 128], [1, 4, 16, 64]) if b.args.full else ([1, 4, 16, 64], [1, 16, 64])
    sizes = ["4k", "16k", "64k", "256k", "1m"] if b.args.full else ["4k", "64k", "1m"]
    sets = sorted({64, 256, min(1024, b.size), min(4096, b.size), b.size} if b.args.full else {64, min(1024, b.size), b.size})
    kib = lambda text: int(text[:-1]) * (1024 if text.endswith("m") else 1)

    def curve(name, x, y, points, key, options, suffix=""):
        series = b.curves.setdefault(name, {"x": x, "y": y, "series": {}})["series"]
        for at, value in points:
            turns = b.interleaved(servers, pairs=rounds, seconds=seconds, ramp=min(b.ramp, 1), **options(value))
            for server in servers:
                series.setdefault(server.name + suffix, []).append((at, statistics.median(turn[key] for turn in turns[server.name])))

    curve("depth", "requests in flight", "4K random writes/s", [(d, d) for d in depths], "iops", lambda d: {"depth": d})
    curve("block_size", "KiB of a write", "MiB/s, 8 in flight", [(kib(z), z) for z in sizes], "mib_s", lambda z: {"bs": z, "depth": 8})
    curve("working_set", "MiB that are written to", "4K random writes/s, 32 in flight", [(z, z) for z in sets], "iops", lambda z: {"size": z})
    for gib in (1, 4):
        if gib << 10 < b.size:
            curve(f"depth_{gib}_gib", f"requests in flight, {gib} GiB written to", "4K random writes/s", [(d, d) for d in fewer], "iops",
                  lambda d: {"depth": d, "size": gib << 10})


def device(b):
    """What the disk gives, straight: the figures of the model. And the way of a request between guest and server, from the raw server."""
    seconds = min(b.seconds, 3)
    one = lambda bs: b.fio(b.path("appends.img"), rw="write", bs=bs, depth=1, seconds=seconds, size=512, ramp=0)["mean_us"] / 1e6
    small, large = one("8k"), one("1m")
    append_bytes_s = ((1 << 20) - (8 << 10)) / max(1e-9, large - small)
    # Of each write a block is read and one written.
    moved = {"journal_bytes_per_guest_byte": 1.06, "before_image_bytes_per_guest_byte": 1, "primary_bytes_per_guest_byte": 1}
    raw = b.fio(b.path("peer.img"), rw="randwrite", depth=1, seconds=seconds, ramp=0)["mean_us"] / 1e6
    served = statistics.median(b.turn(b.qemu, depth=1, seconds=seconds)["mean_us"] for _ in range(1 if b.args.quick else 3)) / 1e6

    def busy(**options):
        """Processor time of a write, and random blocks moved behind it."""
        before = b.moved()
        cpu_s = b.turn(b.ours, depth=32, seconds=seconds, **options)["cpu_us"] / 1e6
        grown = {kind: count - before[kind] for kind, count in b.moved().items()}
        return cpu_s, (grown["before_image"] + grown["destaged"]) / max(1, grown["write"])  # an index is not a move

    (uniform_s, uniform_moves), (hot_s, hot_moves), (cpu_64k_s, _) = busy(), busy(size=64), busy(bs="64k")
    cpu_move_s = max(0, (uniform_s - hot_s) / max(0.1, uniform_moves - hot_moves))
    b.facts["device"] = {
        "append_s": max(0, small - (8 << 10) / append_bytes_s), "append_bytes_s": append_bytes_s, "random": 2 * mix(b, moved, 30000, b.path("peer.img"))[0],
        "both_bytes_s": both_ways(b, 25) * (1 << 20), "path_s": max(0, served - raw), "cpu_s": max(0, uniform_s - uniform_moves * cpu_move_s), "cpu_move_s": cpu_move_s,
        "cpu_byte_s": max(0, cpu_64k_s - uniform_s) / (60 << 10)}


def predict(b):
    """Draws what the model says beside each curve that it speaks of, and tells how far apart they are."""
    if "device" not in b.facts:
        return
    figures = model.Figures(**b.facts["device"])
    volume, reserve = b.size << 20, b.cdp_size * 15 // 16 << 20
    of = lambda **options: model.writes_s(figures, **{"set_bytes": volume, "reserve": reserve, **options})
    mib_s = lambda size: of(size=size, depth=8) * size / (1 << 20)
    asked = {"depth": lambda x: of(depth=x), "block_size": lambda x: mib_s(x << 10), "working_set": lambda x: of(set_bytes=x << 20),
             "volumes": lambda x: of(depth=64 / x, volumes=x, set_bytes=(b.size // 64 * x) << 20, reserve=(max(64, b.size // 64) * x) << 20)}
    asked |= {f"depth_{gib}_gib": lambda x, gib=gib: of(depth=x, set_bytes=gib << 30) for gib in (1, 4)}
    for name, at in asked.items():
        series = b.curves.get(name, {}).get("series", {})
        if series.get("cdp-agent"):
            series["predicted"] = [(x, at(x)) for x, _ in series["cdp-agent"]]


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
    with concurrent.futures.ThreadPoolExecutor() as pool:
        probe = pool.submit(probe_of, b, name, seconds)
        guest = b.fio(server.uri, rw="randwrite", depth=8, seconds=seconds, ramp=0, extra=second_by_second(b, f"{name}-guest"))
        probe = probe.result()
    return {**guest, **beside(b, f"{name}-guest", name, probe)}


def second_by_second(b, who):
    return [f"--write_lat_log={b.path(who)}", "--log_avg_msec=1000", "--log_max_value=1"]


def probe_of(b, name, seconds):
    return b.fio(b.path("probe.img"), rw="randwrite", depth=1, size=64, seconds=seconds, ramp=0, extra=["--sync=dsync", "--rate_iops=20", *second_by_second(b, f"{name}-probe")])


def stalls_of(longest):
    """Stalls over 100 ms, each with the second in which it began. One that goes on over a second's border is the longest request of both seconds."""
    stalls, before = [], None
    for at, ms in sorted(longest.items()):
        same = before and before[0] == at - 1 and abs(ms - before[1]) < 0.01 * ms
        if ms > 100 and not same:
            stalls.append((at, ms))
        before = (at, ms)
    return stalls


def beside(b, who, name, probe):
    """The stalls over 100 ms, and what the prober saw within a second of each."""
    guest_s, disk_s = (longest_each_second(b.path(f"{log}_clat.1.log")) for log in (who, f"{name}-probe"))
    near = lambda at: max(disk_s.get(second, 0) for second in (at - 1, at, at + 1))
    return {"probe": probe, "stalls_over_100_ms": [(at, ms, near(at)) for at, ms in stalls_of(guest_s)], "longest_each_second": guest_s, "probe_longest_each_second": disk_s}


def physical_mix(b, guest_s, moved, seconds):
    """What the disk itself does with the load of a protected volume that takes so many random writes a second, of which so many bytes of each kind came; engine and
    socket aside: appends with a header, the old content read and appended, blocks written, a sync for each 8 MiB of both files; and the prober beside it."""
    if not os.path.exists(b.path("third.img")):
        fill(b.path("third.img"), b.size)
    share = lambda kind: moved[kind] / max(1, moved["write"])
    every = lambda job, file, size, rw, bs, depth, syncs, rate: [
        f"--name={job}", f"--filename={b.path(file)}", f"--size={size}m", f"--rw={rw}", f"--bs={bs}", f"--iodepth={depth}", *syncs, f"--rate_iops={rate}", *second_by_second(b, f"mix-{job}")]
    rate = int(guest_s)
    command = ["fio", "--ioengine=io_uring", "--direct=1", "--time_based", f"--runtime={seconds}", "--randrepeat=0", "--norandommap", "--output-format=json",
               "--percentile_list=50:99:99.9",
               # Two frames of four writes each, as with eight in flight.
               *every("appends", "third.img", b.size, "write", "20k", 2, [], rate // 4),
               *every("before-images", "appends.img", 512, "write", "128k", 2, ["--fdatasync=64"], max(1, int(rate * (share("before_image") + share("before_index"))) // 32)),
               *every("old", "peer.img", b.size, "randread", "4k", 16, [], int(rate * share("before_image"))),
               *every("destaging", "peer.img", b.size, "randwrite", "4k", 16, ["--fdatasync=2048"], int(rate * share("destaged")))]
    b.shown(re.sub(r"^--rate_iops=.*", "--rate_iops=AS_MEASURED", part) for part in command)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        probe = pool.submit(probe_of, b, "mix", seconds)
        out = run(*command, timeout=seconds + 300)
        probe = probe.result()
    jobs = json.loads(out[out.index("{"):])["jobs"]
    side = jobs[0]["write"]
    return {"iops": side["iops"] * 4, "asked": rate, "max_us": side["clat_ns"]["max"] / 1e3, "p999_us": side["clat_ns"]["percentile"]["99.900000"] / 1e3, **beside(b, "mix-appends", "mix", probe)}


def stability(b, seconds=600):
    """Ours and the raw peer for the same time, then the disk with the physical mix of ours: a stall that all of them have, and the prober beside them, is the
    disk's; one that the mix has and the peer has not is the price of keeping a history on the same disk."""
    fill(b.path("probe.img"), 64)
    minutes = f"{seconds // 60} minutes of random writes, 8 in flight"
    evicted = lambda: b.counter("evicted_capacity")
    legs = [("stability", f"write latency over {minutes}: longest, ms", ("<=", 100), lambda: stability_of(b, b.ours, "stability", seconds)),
            ("stability_peer", f"qemu-nbd raw over {minutes}: longest, ms", (None, None), lambda: stability_of(b, b.qemu, "stability_peer", seconds)),
            ("stability_mix", f"fio straight on the disk with the physical mix of these writes, {seconds // 120} minutes: longest append, ms", (None, None),
             lambda: physical_mix(b, b.facts["stability"]["iops"], moved, seconds // 2))]
    moved = {}
    for name, what, target, leg in legs:
        before, bytes_before = evicted(), b.moved()
        seen = b.facts[name] = leg()
        b.settle()
        if name == "stability":
            moved.update({kind: count - bytes_before[kind] for kind, count in b.moved().items()})
        stalls, probe = seen["stalls_over_100_ms"], seen["probe"]
        gone = f"; {evicted() - before} logs evicted" if name == "stability" else ""
        b.row(name, what, target, [seen["max_us"] / 1000], note=f"p99.9 {seen['p999_us'] / 1000:.1f} ms; {seen['iops']:,.0f}/s; {len(stalls)} stalls over "
              f"100 ms in {len(seen['longest_each_second'])} seconds{gone}")
        b.row(name + "_disk", "single writes straight to the disk (O_DSYNC), 20 a second beside it: longest, ms", (None, None), [probe["max_us"] / 1000],
              note=f"p99.9 {probe['p999_us'] / 1000:.1f} ms; over 50 ms within a second of {sum(ms > 50 for _, _, ms in stalls)} of these {len(stalls)}; "
              f"{len(stalls_of(seen['probe_longest_each_second']))} over 100 ms")


def idle_volumes(b, count=1000):
    """So many protected volumes that do nothing."""
    folder = b.path("idle")
    os.makedirs(folder)
    # Each of them holds a segment or two of the 34 that it reserves (32 are the least), and a CDP disk's file takes all of its room when it is taken into use.
    # So they share one that is smaller than what they reserve together.
    with open(f"{folder}/cdp.img", "wb") as file:
        file.truncate((count * 4 + 64) << 20)
    agent, ctl = many_agent(b, folder, "[engine]\novercommit = true\n")
    try:
        ctl("disk", "init", f"{folder}/cdp.img", "--segment-size", "1MiB")
        names = [f"v{number}" for number in range(count)]
        for name in names:
            with open(f"{folder}/{name}.img", "wb") as file:
                file.truncate(1 << 20)
            ctl("volume", "add", name, "--path", f"{folder}/{name}.img")
        ctl("edit", *names, "--reserve-capacity", "34MiB", "--reserve-duration", "1h", "--priority", "mid")
        ctl("enable", *names)
        time.sleep(2)
        used = memory_mib(agent.pid)
        protected = sum(volume["cdp_state"] == "on" and volume["health"] == "ok" for volume in json.loads(ctl("list"))["list"])
    finally:
        end(agent)
        shutil.rmtree(folder)
    b.row("memory_idle", f"memory: {count:,} idle protected volumes, MiB", ("<=", 1024), [used],
          note=f"{protected:,} of them with CDP on, on one CDP disk of {count * 4 + 64} MiB, which is less than they reserve together (overcommit)")


# Steps that make all of their files themselves. They come first, while the disk has room.
SELF_CONTAINED = {"records", "scaling", "idle"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true")
    mode.add_argument("--full", action="store_true")
    parser.add_argument("--dir", default="/var/tmp")
    parser.add_argument("--size", type=int, default=0)
    parser.add_argument("--only", type=lambda text: text.split(","), default=[])
    parser.add_argument("--no-docs", action="store_true")
    parser.add_argument("--remark", action="append", default=[])
    args = parser.parse_args()
    # The steps of all kinds, but for what --quick has no time for.
    steps = [("writes", writes), ("peers", peers), ("latency", latency), ("sequential", sequential), ("device", device), ("curves", curves), ("views", views), ("revert", revert), ("memory", memory),
             ("restart", restart), ("engine", engine), ("records", records), ("scaling", scaling)]
    if args.quick:
        steps = [step for step in steps if step[0] not in ("device", "curves")]
    else:
        steps.append(("idle", idle_volumes))
    if args.full:
        steps.append(("stability", stability))
    if unknown := set(args.only) - {name for name, _ in steps}:
        parser.error(f"--only: no step of this mode is called {', '.join(sorted(unknown))}; there are {', '.join(name for name, _ in steps)}")
    load_before = os.getloadavg()[0]
    b = Bench(args)
    b.about = report.machine(b)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for name, step in sorted(steps, key=lambda step: step[0] not in SELF_CONTAINED):
            if not b.wanted(name):
                continue
            if name not in SELF_CONTAINED and not b.ours:
                b.prepare()
            try:
                step(b)
            except Exception as error:
                # One row that cannot be measured must not cost the others.
                words = getattr(error, "stderr", None) or f"{type(error).__name__}: {error}"
                words = (words.decode(errors="replace") if isinstance(words, bytes) else words).strip()[-400:]
                b.failed[name] = words = words.replace(b.dir, "DIR")
                b.say(f"{name}: not measured: {words}")
            # What is measured is kept, whatever comes.
            report.save(b, load_before, done=False)
            if name in b.failed:
                b.restart_servers()
        # A figure of a disk or a core that came out as nothing predicts nothing; the rows are not to be lost for that.
        with contextlib.suppress(ZeroDivisionError):
            predict(b)
        report.write(b, load_before)
    finally:
        for server in Server.started:
            server.stop()
        shutil.rmtree(b.dir, ignore_errors=True)
    b.say("done")


if __name__ == "__main__":
    main()
