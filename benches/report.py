"""What `bench.py` found, as JSON, plots and docs/benchmarks.md. Run with such a JSON file it writes the docs anew."""
import datetime
import json
import os
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)


def run(*command, **kwargs):
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True, **kwargs).stdout


ORDER = [
    "randwrite", "randwrite_limit", "cbw", "cbw_copying", "hot", "randwrite_qd4", "randwrite_qd8", "flush", "flush_limit", "p50", "p50_limit", "p99", "p99_limit", "seqwrite", "seqwrite_limit",
    "randread", "randread_files", "seqread", "seqread_limit", "engine", "cpu", "cpu_limit", "journal_bytes", "journal_bytes_engine", "amplification", "view_open", "view_open_flat",
    "view_read_young", "view_read_middle", "view_read_old", "view_read_files", "guest_beside_view", "revert_call", "revert_copy", "revert_limit", "restart", "memory_loaded", "memory_idle",
    "memory_records", "scaling", "scaling_each", "scaling_limit", "stability", "stability_disk", "stability_peer", "stability_peer_disk",
    "stability_mix", "stability_mix_disk",
]
# The rows that have a target: what a run did not measure is said in its place. The last word is the step of bench.py that measures it.
TARGETS = {
    "randwrite": ("NBD 4K random write QD32 / qemu-nbd raw cache=none", (">=", 1.0), "writes"),
    "cbw": ("the same / qemu-storage-daemon copy-before-write, 60 s from a fresh start", (">=", 2.0), "peers"),
    "hot": ("the same on a 64 MiB hot set / qemu-nbd raw", (">=", 1.2), "peers"),
    "flush": ("NBD 4K write + flush QD1 / qemu-nbd raw", (">=", 1.0), "latency"),
    "p50": ("NBD 4K random write QD1 latency p50 / qemu-nbd raw", ("<=", 1.1), "latency"),
    "p99": ("NBD 4K random write QD1 latency p99 / qemu-nbd raw", ("<=", 1.5), "latency"),
    "seqwrite": ("NBD 1 MiB sequential write / qemu-nbd raw", (">=", 0.9), "sequential"),
    "randread": ("NBD 4K random read QD32 / qemu-nbd raw", (">=", 1.0), "sequential"),
    "seqread": ("NBD 1 MiB sequential read / qemu-nbd raw", (">=", 1.0), "sequential"),
    "engine": ("engine alone, 4K random write QD32 / fio with the same physical mix", (">=", 0.7), "engine"),
    "cpu": ("CPU time per 4K write, whole process / qemu-nbd raw", ("<=", 1.5), "writes"),
    "journal_bytes": ("bytes written to the CDP disk / guest bytes, 4K QD32, before-images aside", ("<=", 1.05), "writes"),
    "view_open": ("view open with 10,000,000 records, p99, ms", ("<=", 10), "records"),
    **{f"view_read_{age}": (f"view 4K random read QD32 / volume 4K random read, {age} instant", (">=", 0.8), "views") for age in ("young", "middle", "old")},
    "guest_beside_view": ("guest IOPS while a view is read at full speed / without", (">=", 0.5), "views"),
    "revert_call": ("revert over 1 GiB of changed blocks: until the call returns, ms", ("<=", 200), "revert"),
    "revert_copy": ("its background copy / disk bandwidth", (">=", 0.5), "revert"),
    "restart": ("start after kill -9 with 8 GiB of history until the first read is served, s", ("<=", 1.0), "restart"),
    "memory_loaded": ("memory: 1 volume under load, MiB", ("<=", 256), "memory"),
    "memory_idle": ("memory: 1,000 idle protected volumes, MiB", ("<=", 1024), "idle"),
    "memory_records": ("memory with 10,000,000 records / 1,000,000", ("<=", 1.2), "records"),
    "scaling": ("sum of IOPS of 64 volumes written at once / one volume's", (">=", 0.9), "scaling"),
    "scaling_each": ("the same, 32 requests in flight in each volume: 64 of them / one", (">=", 0.9), "scaling"),
    "stability": ("write latency over 10 minutes of random writes, 8 in flight: longest, ms", ("<=", 100), "stability"),
}
COLOURS = ["#1f6fb4", "#d1622b", "#3a923a", "#8a5fb0"]
# They answer from the page cache of the host: what they acknowledge is in memory.
CACHED = {"nbdkit file", "qemu-nbd writeback"}


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
        dashes = ' stroke-dasharray="5 4"' if name == "predicted" else ""
        line = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in points)
        out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        out += [f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3" fill="{colour}"/>' for x, y in points]
        out.append(f'<text x="{left + 8}" y="{top + 14 * number + 4}" fill="{colour}">{name}</text>')
    return "\n".join(out + ["</svg>"]) + "\n"


def commit():
    """The commit that is measured, and whether anything but what a bench writes differs from it."""
    written = [":(exclude)" + path for path in ("benches/results", "docs/bench", "docs/benchmarks.md")]
    changed = run("git", "-C", ROOT, "status", "--porcelain", "--", ".", *written).strip()
    return (run("git", "-C", ROOT, "rev-parse", "--short", "HEAD").strip() or "unknown") + ("-dirty" if changed else "")


def machine(b):
    with open("/proc/cpuinfo") as info:
        model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "unknown")
    version = lambda *c: run(*c).splitlines()[0]
    return {
        "machine": f"{os.cpu_count()} cores, {model}, Linux {os.uname().release}, {run('stat', '-f', '-c', '%T', b.args.dir).strip()}",
        "versions": "; ".join([version("qemu-nbd", "--version"), version("qemu-storage-daemon", "--version"), version("fio", "--version"),
                               version("nbdkit", "--version"), version("rustc", "--version")]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
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


def predictions(figures):
    """The model beside what was measured."""
    compared = {name: curve for name, curve in figures["curves"].items() if "predicted" in curve["series"]}
    if not compared:
        return []
    taken = ", ".join(f"{name} {value:.3g}" for name, value in figures["facts"]["device"].items())
    lines = ["", "The dashed lines are the model of `docs/performance.md` (`benches/model.py`), from these figures of the disk, the socket and one core, "
             f"taken in the same run: {taken}.", "", "| curve | point | measured | predicted | predicted / measured |", "|---|---|---|---|---|"]
    for curve in compared.values():
        for (x, measured), (_, predicted) in zip(curve["series"]["cdp-agent"], curve["series"]["predicted"]):
            lines.append(f"| {curve['y']} over {curve['x']} | {x:,} | {measured:,.0f} | {predicted:,.0f} | {predicted / max(1e-9, measured):.2f} |")
    return lines


def in_the_way(figures):
    """For each target that was missed: what was measured in the same run of what stands in the way."""
    rows, facts = figures["rows"], figures["facts"]
    value = lambda name: f"{rows[name]['median']:.2f}"
    median = lambda turns, key: statistics.median(turn[key] for turn in turns)
    # Of one core: a volume is served by one.
    core = lambda turns, key="cpu_us": f"{statistics.median(turn[key] * turn['iops'] for turn in turns) / 1e6:.2f} of a core ({median(turns, key):.1f} us each)"
    spread = lambda name: f"{value(name)} ({rows[name]['low']:.2f} to {rows[name]['high']:.2f})"
    rates = lambda turns: " ".join(f"{turn['iops']:,.0f}" for turn in turns)
    stalled = lambda seen: seen["stalls_over_100_ms"] if "stalls_over_100_ms" in seen else seen["seconds_over_100_ms"]
    stalls = lambda name: f"{len(stalled(facts[name]))} stalls in {len(facts[name]['longest_each_second'])} seconds, the longest {facts[name]['max_us'] / 1000:.0f} ms"
    others = facts.get("randwrite_others", {})
    later = next((name for name in others if name.startswith("copy-before-write, ")), None)

    def disk(name, what, of=None):
        row, limit = rows[of or name.removesuffix("_limit")], rows[name]
        fits, (op, bound) = row["median"] / limit["median"], row["target"]
        if limit["median"] > 1.05 if op == ">=" else limit["median"] < 0.95:
            return f"not what was tried as its limit: ours is beyond what fio reached. {what}, in the same turns: {limit['note']}; ours is {spread(name)} of that."
        who = "the disk" if (fits < bound if op == ">=" else fits > bound) else "not the disk alone"
        return f"{who}. {what}, in the same turns: {limit['note']}; ours is {spread(name)} of that."

    def headers():
        index = rows["journal_bytes"].get("index")
        blocks = 1 / (rows["journal_bytes"]["median"] - (index or 0) - 1)
        return (f"headers. A frame has a header of 4 KiB, and here {blocks:.0f} blocks of payload: of 32 writes in flight two frames are on their way. "
                + ("" if index is None else f"The index is {index:.3f} of it. ")
                + f"In the process, without a socket, it is {value('journal_bytes_engine')}. One frame at a time has fewer headers and fewer writes a second (`docs/performance.md`, log).")

    def processor():
        ours, qemu = (median(facts["randwrite_qd32"][name], "cpu_us") for name in ("cdp-agent", "qemu-nbd"))
        moves = statistics.median(turn["cpu_us"] for turn in facts["randwrite_fio_same_mix"])
        return (f"in the same turns qemu-nbd takes {qemu:.1f} us a write, socket and all; ours {ours:.1f} us; fio straight on the files {moves:.1f} us for the "
                f"reads, writes and appends of a protected write alone, that is {value('cpu_limit')} of qemu-nbd.")

    def scaled():
        limit, bound = rows["scaling_limit"], rows["scaling"]["target"][1]
        return (f"{'the disk' if limit['median'] < bound else 'not the disk alone'}. fio straight on the same files, all of them / one, in the same rounds: {spread('scaling_limit')} "
                f"({limit['note']}). Ours: {rows['scaling']['note']}.")

    def beside():
        rates = facts["guest_beside_view"]["alone_and_beside"]
        alone, busy = (statistics.median(of) for of in zip(*rates))
        reads = statistics.median(facts["guest_beside_view"]["reads_s"])
        return (f"reader and guest share disk and processors: {alone:,.0f} writes/s alone; beside the reader {busy:,.0f} writes/s and "
                f"{reads:,.0f} reads/s, {(busy + reads) / alone:.2f} requests for one.")

    ways = {
        "randwrite": lambda: disk("randwrite_limit", "fio straight on the peers' file with the same random reads and writes and the same appends, 64 in flight"),
        "cbw": lambda: f"the peer copies the less, the longer it runs: what it has copied it need not copy again, and it keeps one instant only. "
        f"Writes/s of its turns while it copies: {rates(others['copy-before-write'])}; afterwards: {rates(others[later]) if later else 'not measured'}; "
        f"ours beside them, at every instant: {rates(others['cdp-agent beside them'])}.",
        "journal_bytes": headers,
        "cpu": processor,
        "hot": lambda: f"ours takes {core(facts['hot_set']['cdp-agent'])}, qemu-nbd {core(facts['hot_set']['qemu-nbd'])}; "
        f"fio, their client, runs beside either on the same {figures['about']['machine'].split(',')[0]}.",
        "randread": lambda: f"fio straight on the protected volume's file reads {spread('randread_files')} of what it reads on the peers', in the same turns; "
        f"ours is {spread('randread')} of qemu-nbd.",
        "engine": lambda: f"the engine takes {core(facts['engine']['runs'], 'cpu_us_per_write')}; "
        f"{median(facts['engine']['runs'], 'throttled'):,.0f} writes of a run waited for room in the backlog. "
        f"fio has two processes for the same mix, in which {statistics.median(facts['engine']['fio_same_mix_iops']):,.0f}/s fit.",
        "guest_beside_view": beside,
        "flush": lambda: disk("flush_limit", "Appends of 8 KiB and a sync of each to qemu-nbd, as many random reads and writes of fio beside them"),
        "p50": lambda: disk("p50_limit", "Appends of 8 KiB to qemu-nbd, as many random reads and writes of fio beside them"),
        "p99": lambda: disk("p99_limit", "Appends of 8 KiB to qemu-nbd, as many random reads and writes of fio beside them"),
        "seqwrite": lambda: disk("seqwrite_limit", "Each byte moves four times on one disk (append, old content read, its before-image, primary). fio with these moves"),
        "seqread": lambda: disk("seqread_limit", "fio straight on the same file"),
        "revert_copy": lambda: disk("revert_limit", "Each byte moves four times on one disk (the target's content and the present one read, that appended, the target's written). fio with these moves", "revert_copy"),
        **{f"view_read_{age}": lambda: f"where its blocks lie. fio straight on the CDP disk's file reads {spread('view_read_files')} of what it reads on the volume's, in the same turns." for age in ("young", "middle", "old")},
        "memory_records": lambda: f"{rows['memory_records']['note']}.",
        "scaling": scaled,
        "scaling_each": lambda: f"as for the row before; {rows['scaling_each']['note']}.",
        "stability": lambda: f"{stalls('stability')}; `qemu-nbd` raw, afterwards: {stalls('stability_peer')}"
        + (f"; fio straight on the disk with the physical mix of ours: {stalls('stability_mix')}" if "stability_mix" in facts else "")
        + f". Single writes straight to the disk saw beside ours: {rows['stability_disk']['note']}.",
    }
    missed = [name for name in ORDER if rows.get(name, {}).get("met") is False]
    if not missed:
        return []

    def told(name):
        try:
            return ways[name]()
        except (KeyError, TypeError, ZeroDivisionError, statistics.StatisticsError):
            # Of a row that has nothing else, or that an earlier bench measured without it.
            return f"{rows[name]['note']}." if rows[name]["note"] else f"nothing was measured beside it; its turns: {spread(name)}."

    lines = ["", "## What stands in the way of the targets that were missed", ""]
    return lines + [f"- **{rows[name]['what']}** ({rows[name]['target'][0]} {rows[name]['target'][1]}: {rows[name]['median']:.3g}): {told(name)}" for name in missed]


def collect(b, load_before, path):
    """All figures of a run, with those rows of the last run of its kind that it left out."""
    about = b.about | {"load": os.getloadavg()[0], "minutes": (time.monotonic() - b.began) / 60, "only": b.args.only, "failed": b.failed, "load_before": load_before, "priority": priority(), "cdp_mib": b.cdp_size, "seconds": b.seconds, "pairs": b.pairs, "remarks": b.args.remark}
    kept, rows, curves, facts, commands = [], b.rows, b.curves, b.facts, b.commands
    if b.args.only and os.path.exists(path):
        with open(path) as file:
            last = json.load(file)
        if last.get("volume_mib") == b.size:
            earlier = last.get("kept", [])
            fresh = set(last["rows"]).difference(rows, *(run_["rows"] for run_ in earlier))
            kept = [{**run_, "rows": sorted(set(run_["rows"]) - set(rows))} for run_ in [*earlier, {**last["about"], "rows": fresh}]]
            kept = [run_ for run_ in kept if run_["rows"]]
            commands = {**dict.fromkeys(last.get("commands", [])), **commands}
            rows, curves, facts = {**last["rows"], **rows}, {**last["curves"], **curves}, {**last["facts"], **facts}
    return {"about": about, "kept": kept, "volume_mib": b.size, "rows": rows, "curves": curves, "facts": facts, "commands": list(commands)}


def render(figures):
    """docs/benchmarks.md, and the plots by their names."""
    about, rows, facts = figures["about"], figures["rows"], figures["facts"]
    kind = {"quick": "QUICK=1 ", "full": "FULL=1 ", "default": ""}[about["mode"]]
    minutes = lambda run_: f", in {run_['minutes']:.0f} minutes" if "minutes" in run_ else ""
    renewed = f" (a part of it: {', '.join(about['only'])}; the other figures are of earlier runs, named below)" if about.get("only") else ""
    lines = ["# Benchmarks", "", f"Written by `{kind}make bench` on {about['date']}{minutes(about)}{renewed}; the raw figures are in "
             f"`benches/results/{about['mode']}.json`. Ratios are of turns side by side in one run on one disk; the", "median counts, the spread is from the lowest to the highest. "
             "What stands behind the figures is in `docs/performance.md`.", "",
             f"- Machine: {about['machine']}; load average {about.get('load_before', about['load']):.1f} {'before' if 'load_before' in about else 'at the end of'} the run"
             f"{about.get('priority', '')}.",
             f"- Versions: {about['versions']}; commit {about['commit']}.",
             f"- Volume: {figures['volume_mib']} MiB, written before, uniform random unless a row says otherwise; CDP disk "
             f"{about.get('cdp_mib', 'of an unknown number of')} MiB, written before, so that the ring wraps on blocks that are there." + (f" {about['seconds']} s a turn, {about['pairs']} pairs." if "seconds" in about else ""),
             *(f"- {remark}" for remark in about.get("remarks", [])),
             *(f"- Not measured: {name}: {words}" for name, words in about.get("failed", {}).items()),
             *(f"- From an earlier run, on {run_['date']}, commit {run_['commit']}{minutes(run_)}, load average {run_['load']:.1f} at its end"
               f"{'' if run_.get('machine') == about['machine'] else ', on another machine (' + run_.get('machine', 'unknown') + ')'}: {', '.join(run_['rows'])}."
               for run_ in figures.get("kept", [])), "", "| what | target | median | spread | met |", "|---|---|---|---|---|"]
    for name in ORDER:
        row = rows.get(name)
        if not row:
            if name in TARGETS:
                what, target, step = TARGETS[name]
                why = "not measured: its step failed, see above" if step in about.get("failed", {}) else "not measured in this run"
                lines.append(f"| {what} | {target[0]} {target[1]} | {why} | | |")
            continue
        value = "not measured" if row["median"] is None else f"{row['median']:.3g}"
        spread = "" if row.get("count", 0) < 2 else f"{row['low']:.3g} to {row['high']:.3g} ({row['count']})"
        target = f"{row['target'][0]} {row['target'][1]}" if row["target"][0] else "reported"
        note = f" ({row['note']})" if row["note"] else ""
        lines.append(f"| {row['what']}{note} | {target} | {value} | {spread} | {'' if row['met'] is None else 'yes' if row['met'] else '**no**'} |")
    lines += in_the_way(figures)
    if "randwrite_qd32" in facts:
        lines += ["", "## 4K random writes, 32 in flight", "", "| server | IOPS, each turn | mean us | p99 us | CPU us a write |", "|---|---|---|---|---|"]
        for name, turns in {**facts["randwrite_qd32"], **facts.get("randwrite_others", {})}.items():
            med = lambda key: statistics.median(t.get(key, 0) for t in turns)
            cpu = f"{med('cpu_us'):.1f}" if "cpu_us" in turns[0] else ""
            each = ", ".join(f"{turn['iops']:,.0f}" for turn in turns)
            lines.append(f"| {name}{' (page cache)' if name in CACHED else ''} | {each} | {med('mean_us'):.0f} | {med('p99_us'):.0f} | {cpu} |")
    lines += ["", "## Curves", "", *(f"![{curve['y']} over {curve['x']}](bench/{name}.svg)" for name, curve in figures["curves"].items()), *predictions(figures)]
    lines += ["", "## Commands", "", "Every command of a server, of fio, of cdp-bench, of cdpctl and of qemu-io, once:", "", "```", *figures.get("commands", []), "```", ""]
    return "\n".join(lines), {name: svg(curve) for name, curve in figures["curves"].items()}


def write_docs(figures):
    """docs/benchmarks.md and its plots."""
    text, plots = render(figures)
    os.makedirs(f"{ROOT}/docs/bench", exist_ok=True)
    for name, plot in plots.items():
        with open(f"{ROOT}/docs/bench/{name}.svg", "w") as out:
            out.write(plot)
    with open(f"{ROOT}/docs/benchmarks.md", "w") as out:
        out.write(text)


def save(b, load_before, done=True):
    """The raw figures, in one step: a run that is broken off leaves those of the last whole one, and beside them what it has."""
    os.makedirs(f"{HERE}/results", exist_ok=True)
    whole = f"{HERE}/results/{b.about['mode']}.json"
    partial = f"{whole}.partial"
    figures = collect(b, load_before, whole)
    with open(partial, "w") as out:
        json.dump(figures, out, indent=1)
        out.write("\n")
    if done:
        os.replace(partial, whole)
    return figures


def write(b, load_before):
    """The raw figures and, unless they are not wanted, the docs."""
    figures = save(b, load_before)
    if not b.args.no_docs:
        write_docs(figures)
    print(render(figures)[0])


if __name__ == "__main__":
    # From what an earlier run left: benches/report.py benches/results/full.json
    with open(sys.argv[1]) as file:
        write_docs(json.load(file))
