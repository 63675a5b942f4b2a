//! Promise: when disks fail, what design part 6 says is what happens: the guest sees no error of the journal's, protection
//! goes off loudly and comes back, and no gap is ever presented as history (design I8, I9).
//!
//! The agent's disks are files on a file system of ours that fails when told to. All tests need root and /dev/fuse.

use std::time::Duration;

use cdp_tests::faultfs::{Effect, Fault, FaultFs, Op};
use cdp_tests::load::{Load, Plan};
use cdp_tests::nbd::{CMD_READ, Client, Request};
use cdp_tests::process::exit;
use cdp_tests::rig::{CDP, PRIMARY, Rig, SPARE, Sizes};
use cdp_tests::{local, now_ns};
use nix::libc::{EIO, ENOSPC};
use nix::sys::signal::Signal;

const STALL: &str = "stall_max = \"1s\"";
const STALL_MAX: Duration = Duration::from_secs(1);
/// What a busy machine may add to `stall_max` before a request has waited too long: far more than the way out of a failed disk takes, and far
/// less than a hang.
const MARGIN: Duration = Duration::from_secs(10);

fn rig(seed: u64, engine: &str) -> Option<Rig> {
    if FaultFs::possible() {
        return Some(Rig::new(seed, Sizes::SMALL, engine));
    }
    cdp_tests::skip("needs root and /dev/fuse");
    None
}

/// A view of an instant that was not recorded is refused, and info says nothing else.
fn assert_gap(rig: &Rig, at: u64) {
    let refusal = rig.agent.ctl_refused(&["view", "open", "demo", "--at", &at.to_string()], &[]);
    assert!(matches!(refusal.code, Some(exit::OUT_OF_COVERAGE | exit::REFUSED)), "view at {at}: {refusal}");
    let coverage = rig.agent.coverage("demo");
    assert!(!coverage.iter().any(|interval| interval.contains(at)), "info says {at} can be viewed: {coverage:?}");
}

/// Of these instants, in their order, and of the whole span from the first to the last nothing is presented that was not so: what info says can be
/// viewed shows what was there, and the rest is refused.
fn assert_no_gap_is_shown(rig: &Rig, instants: &[u64]) {
    let (first, last) = (instants[0], instants[instants.len() - 1]);
    let coverage = rig.agent.coverage("demo");
    // An interval that claims too much does so at its ends.
    let touching = coverage.iter().filter(|i| i.start <= last && i.end.is_none_or(|end| end >= first));
    let ends = touching.flat_map(|i| [i.start.max(first), i.end.map_or(last, |end| end.min(last))]);
    for at in instants.iter().copied().chain(ends) {
        if coverage.iter().any(|interval| interval.contains(at)) {
            rig.check_view(at);
        } else {
            assert_gap(rig, at);
        }
    }
}

/// Waits for writes of a load, and notes instants between them.
fn note_instants(load: &Load, writes: u64, instants: &mut Vec<u64>) {
    for _ in 0..5 {
        instants.push(now_ns());
        load.wait_for(writes / 5);
    }
    instants.push(now_ns());
}

/// Protection is off, and says so everywhere where somebody may look.
fn assert_loudly_off(rig: &Rig) {
    let info = rig.info();
    assert_eq!(info["health"], "offline", "{info}");
    assert!(info["health_reason"].as_str().is_some_and(|why| why.contains(&rig.cdp)), "{info}");
    assert!(rig.events("offline") > 0, "no event");
    assert!(rig.metric(&["cdp_volume_health{", "\"demo\"", "\"offline\""]) == 1.0, "the metric");
    assert!(rig.metric(&["cdp_disk_online{", &rig.cdp]) == 0.0, "the disk's metric");
    assert!(rig.metric(&["cdp_disk_errors_total{", &rig.cdp]) > 0.0, "the disk's errors");
}

fn assert_loudly_off_at_start(rig: &Rig) {
    assert_ne!(rig.info()["health_reason"], "", "{}", rig.info());
    assert!(rig.metric(&["cdp_volume_health{", "\"demo\"", "\"offline\""]) == 1.0, "the metric");
}

/// The volume is not served before somebody decides, and says so everywhere where somebody may look.
fn assert_loudly_unserved(rig: &Rig, health: &str) {
    let info = rig.info();
    assert_eq!(info["health"], health, "{info}");
    assert!(info["health_reason"].as_str().is_some_and(|why| !why.is_empty()), "{info}");
    // A journal that is there and cannot be believed is told as damage.
    assert!(rig.events(health) + rig.events("damage") > 0, "no event of {health}");
    assert!(rig.metric(&["cdp_volume_health{", "\"demo\"", &format!("{health:?}")]) == 1.0, "the metric of {health}");
    assert!(rig.metric(&["cdp_volume_health{", "\"demo\"", "\"ok\""]) == 0.0, "the metric of ok");
    assert!(Client::connect(&rig.agent.socket(), "demo").is_err(), "it is served");
}

/// Goal: whatever the CDP disk does, the guest sees no error, loses nothing and waits at most `stall_max`; protection goes off loudly, with all views; with
/// another CDP disk and `enable` it is on again, and what lies between is a gap, also after a kill.
fn cdp_disk_fails(seed: u64, op: Op, effect: Effect, after: u64) {
    if let Some(rig) = rig(seed, STALL) {
        cdp_disk_fails_on(rig, seed, &[Fault::sticky(op, effect).after(after)]);
    }
}

fn cdp_disk_fails_on(mut rig: Rig, seed: u64, faults: &[Fault]) {
    let before_all = now_ns();
    let mut instants = vec![before_all];
    let load = rig.load(rig.plan(seed));
    note_instants(&load, 300, &mut instants);
    let viewed = now_ns();
    rig.check_view(viewed);
    let view = rig.agent.open_view("demo", viewed);
    load.wait_for(100);
    rig.disks.inject_all(CDP, faults);
    if faults.iter().all(|fault| fault.op == Op::Read) {
        // Only history is read from the CDP disk.
        // It may be gone already: the destager reads there too.
        if let Ok(mut client) = Client::connect(&rig.agent.socket(), &view.id) {
            client.read_all().expect_err("the view needs what cannot be read");
        }
    }
    rig.wait_for_health("offline");
    note_instants(&load, 300, &mut instants);
    let unprotected = now_ns();
    load.wait_for(100);
    assert!(rig.disks.met() > 0);
    assert_loudly_off(&rig);
    for at in [before_all, viewed, unprotected] {
        assert_gap(&rig, at);
    }
    let read = Client::connect(&rig.agent.socket(), &view.id).map(|mut client| client.read(0, 4096));
    assert!(!matches!(read, Ok(Ok(_))), "a view of a lost disk was read");
    assert!(rig.events("view_lost") > 0, "no event says that the view is lost");

    // Another disk: by itself, or by `enable`.
    rig.add_spare();
    if rig.health() != "ok" {
        rig.agent.ctl(&["enable", "demo"]);
    }
    rig.assert_protected();
    note_instants(&load, 300, &mut instants);
    let protected = now_ns();
    load.wait_for(100);
    // The disk is as bad as ever.
    load.stop_within(STALL_MAX + MARGIN);
    rig.check_live("after the new disk");
    rig.check_view(protected);
    assert_gap(&rig, unprotected);
    assert_no_gap_is_shown(&rig, &instants);
    rig.disks.heal();

    // The failed disk is back: its journal must never be redone.
    rig.agent.kill();
    rig.agent.start();
    rig.check_live("after a kill with the failed disk back");
    rig.check_view(protected);
    for at in [viewed, unprotected] {
        assert_gap(&rig, at);
    }
    assert_no_gap_is_shown(&rig, &instants);
    rig.assert_protected();
    rig.agent.stop();
    let now = now_ns();
    rig.oracle.lock().unwrap().check_image(&rig.disks.content(PRIMARY), now, now).expect("the primary after a stop");
}

#[test]
fn a_cdp_disk_whose_writes_fail_costs_the_guest_nothing() {
    cdp_disk_fails(1, Op::Write, Effect::Fail(EIO), 0);
}

#[test]
fn a_cdp_disk_that_is_full_costs_the_guest_nothing() {
    cdp_disk_fails(2, Op::Write, Effect::Fail(ENOSPC), 17);
}

#[test]
fn a_cdp_disk_whose_syncs_fail_costs_the_guest_nothing() {
    cdp_disk_fails(3, Op::Sync, Effect::Fail(EIO), 1);
}

#[test]
fn a_cdp_disk_whose_reads_fail_costs_the_guest_nothing() {
    cdp_disk_fails(4, Op::Read, Effect::Fail(EIO), 0);
}

#[test]
fn a_cdp_disk_whose_writes_hang_costs_the_guest_nothing() {
    cdp_disk_fails(5, Op::Write, Effect::Hang, 0);
}

#[test]
fn a_cdp_disk_whose_reads_hang_costs_the_guest_nothing() {
    cdp_disk_fails(8, Op::Read, Effect::Hang, 0);
}

#[test]
fn a_cdp_disk_whose_syncs_hang_costs_the_guest_nothing() {
    // A block device: on FUSE the kernel holds a file's lock during a sync, and submitting a write then blocks the caller.
    if local::why_not().is_none() {
        let rig = Rig::on_block_device(6, Sizes::SMALL, STALL);
        cdp_disk_fails_on(rig, 6, &[Fault::sticky(Op::Sync, Effect::Hang)]);
    } else {
        cdp_tests::skip("needs root, /dev/fuse and loop devices");
    }
}

#[test]
fn a_cdp_disk_that_is_far_too_slow_costs_the_guest_nothing() {
    cdp_disk_fails(7, Op::Write, Effect::Delay(Duration::from_secs(4)), 5);
}

/// A cable that is pulled: reads, writes and syncs fail at once, with requests of all kinds under way.
#[test]
fn a_cdp_disk_of_which_every_call_fails_costs_the_guest_nothing() {
    if let Some(rig) = rig(9, STALL) {
        cdp_disk_fails_on(rig, 9, &Fault::every(Effect::Fail(EIO)));
    }
}

/// Goal: a CDP disk of which every call fails from one moment on, and that works again later, is left for good by the process that saw it fail; the next one takes it,
/// by itself or by `enable`, and protects there with a new history: nothing of before, and nothing of the span without protection, is shown that was not so.
#[test]
fn a_cdp_disk_that_works_again_protects_after_a_restart() {
    for (seed, kill) in [(18, false), (19, true)] {
        let Some(mut rig) = rig(seed, STALL) else { return };
        let load = rig.load(rig.plan(seed));
        let mut instants = Vec::new();
        note_instants(&load, 200, &mut instants);
        let old = now_ns();
        rig.check_view(old);
        rig.disks.inject_all(CDP, &Fault::every(Effect::Fail(EIO)));
        rig.wait_for_health("offline");
        note_instants(&load, 200, &mut instants);
        let unprotected = now_ns();
        assert!(rig.disks.met() > 0);
        assert_loudly_off(&rig);
        load.wait_for(100);
        load.stop_within(STALL_MAX + MARGIN);
        rig.check_live("after every call failed");
        for at in [old, unprotected] {
            assert_gap(&rig, at);
        }

        rig.disks.heal();
        let refused = rig.agent.ctl_refused(&["enable", "demo"], &["no CDP disk is online"]);
        assert_eq!(refused.code, Some(exit::REFUSED), "{refused}");
        if kill {
            rig.agent.kill();
        } else {
            rig.agent.stop();
        }
        instants.push(now_ns());
        rig.agent.start();
        if kill {
            rig.wait_for_health("ok");
        } else {
            rig.agent.ctl(&["enable", "demo"]);
        }
        rig.assert_protected();
        rig.check_live("after the restart");
        assert_history_begins_anew(&rig, seed, [old, unprotected], &mut instants);
    }
}

/// Protected again: what is written now can be viewed, and what lies before is a gap.
fn assert_history_begins_anew(rig: &Rig, seed: u64, before: [u64; 2], instants: &mut Vec<u64>) {
    let load = rig.load(rig.plan(seed + 100));
    note_instants(&load, 200, instants);
    let protected = now_ns();
    load.wait_for(100);
    load.stop_within(STALL_MAX + MARGIN);
    rig.check_live("protected again");
    rig.check_view(protected);
    for at in before {
        assert_gap(rig, at);
    }
    assert_no_gap_is_shown(rig, instants);
}

/// Goal: one error is enough: a disk that lost one write, or one sync, is not trusted again, also when it works and the admin enables protection: that wants
/// another disk. With one it is on again in the same process, and what lies between is a gap.
#[test]
fn a_cdp_disk_that_fails_once_is_left_for_good() {
    for (seed, op) in [(11, Op::Write), (12, Op::Sync)] {
        let Some(rig) = rig(seed, STALL) else { return };
        let load = rig.load(rig.plan(seed));
        let mut instants = Vec::new();
        note_instants(&load, 200, &mut instants);
        let old = now_ns();
        rig.disks.inject(CDP, Fault::once(op, Effect::Fail(EIO)));
        rig.wait_for_health("offline");
        note_instants(&load, 200, &mut instants);
        let unprotected = now_ns();
        assert_loudly_off(&rig);
        let writes = rig.disks.calls(CDP, "write");
        load.wait_for(200);
        load.stop_within(STALL_MAX + MARGIN);
        assert_eq!(rig.disks.calls(CDP, "write"), writes, "the failed disk is still written to");
        rig.check_live("after one error");

        rig.disks.heal();
        let refused = rig.agent.ctl_refused(&["enable", "demo"], &["no CDP disk is online"]);
        assert_eq!(refused.code, Some(exit::REFUSED), "{refused}");
        assert_eq!(rig.health(), "offline");
        let told = rig.events("protected");
        rig.add_spare();
        rig.agent.ctl(&["enable", "demo"]);
        rig.assert_protected();
        rig.eventually("an event says that it is protected", || rig.events("protected") > told);
        assert_history_begins_anew(&rig, seed, [old, unprotected], &mut instants);
        assert_eq!(rig.disks.calls(CDP, "write"), writes, "the failed disk is written to again");
    }
}

/// Goal: with another CDP disk free, protection goes on there at once, with a gap in between.
#[test]
fn with_a_spare_cdp_disk_protection_goes_on_by_itself() {
    let Some(mut rig) = rig(13, STALL) else { return };
    rig.add_spare();
    let load = rig.load(rig.plan(13));
    let mut instants = Vec::new();
    note_instants(&load, 200, &mut instants);
    let old = now_ns();
    rig.disks.inject(CDP, Fault::sticky(Op::Write, Effect::Fail(EIO)));
    rig.eventually("a new log on the spare disk", || {
        // Between the two disks, too.
        instants.push(now_ns());
        let info = rig.info();
        info["health"] == "ok" && info["cdp_info"].to_string().contains(SPARE)
    });
    rig.eventually("both changes are told", || rig.events("offline") > 0 && rig.events("protected") > 1);
    note_instants(&load, 200, &mut instants);
    let new = now_ns();
    load.wait_for(50);
    load.stop_within(STALL_MAX + MARGIN);
    rig.assert_protected();
    rig.check_live("on the spare disk");
    rig.check_view(new);
    assert_gap(&rig, old);
    assert_no_gap_is_shown(&rig, &instants);
    rig.agent.stop();
    rig.disks.heal();
    rig.agent.start();
    rig.assert_protected();
    rig.check_view(new);
    assert_gap(&rig, old);
    assert_no_gap_is_shown(&rig, &instants);
}

/// Goal: reads of which a disk does only a part at a time are brought to their end, on either disk, also while a journal is recovered. (Writes in part are for
/// `agent/src/device/tests.rs`: FUSE makes an error of them.)
#[test]
fn reads_that_are_done_in_parts_show_everything() {
    let Some(mut rig) = rig(17, STALL) else { return };
    for file in [CDP, PRIMARY] {
        rig.disks.inject(file, Fault::sticky(Op::Read, Effect::Short));
    }
    let load = rig.load(rig.plan(17));
    load.wait_for(400);
    let before = now_ns();
    load.wait_for(400);
    load.stop();
    rig.assert_protected();
    assert_eq!(rig.events("offline"), 0);
    rig.check_live("in parts");
    rig.check_view(before);
    let parts = |rig: &Rig| [CDP, PRIMARY].map(|file| rig.disks.parts(file));
    let served = parts(&rig);
    rig.agent.kill();
    rig.agent.start();
    rig.check_live("in parts, after a kill");
    rig.check_view(before);
    let all = parts(&rig);
    println!("reads done in parts, of the CDP disk and of the primary: {served:?}, with recovery {all:?}");
    assert!(served[1] > 0 && all[0] > served[0], "too little was done in parts: the test shows nothing");
}

/// Goal: a short hang, below `stall_max`, costs time and nothing else.
#[test]
fn a_cdp_disk_that_is_slow_below_the_bound_keeps_its_protection() {
    let Some(rig) = rig(14, "stall_max = \"10s\"") else { return };
    // What hangs may hold up no write at all: the load must not drive the instant before it out of the capacity meanwhile.
    let load = rig.load(Plan { connections: 2, depth: 1, sizes: vec![512, 4096], ..rig.plan(14) });
    load.wait_for(100);
    let before = now_ns();
    rig.disks.inject(CDP, Fault { op: Op::Write, effect: Effect::Hang, after: 3, times: 1 });
    rig.disks
        .inject(CDP, Fault { op: Op::Sync, effect: Effect::Delay(Duration::from_millis(500)), after: 0, times: 3 });
    rig.eventually("a call that hangs", || rig.disks.hanging() > 0);
    std::thread::sleep(Duration::from_secs(2));
    rig.disks.heal();
    load.wait_for(300);
    load.stop_within(Duration::from_secs(10) + MARGIN);
    rig.assert_protected();
    assert_eq!(rig.events("offline"), 0);
    rig.check_live("after a hang of two seconds");
    rig.check_view(before);
}

/// Goal: an agent that was stopped for ten times `stall_max` and continued keeps its protection.
#[test]
fn a_stopped_and_continued_agent_keeps_its_protection() {
    let Some(rig) = rig(15, "stall_max = \"2s\"") else { return };
    let load = rig.load(rig.plan(15));
    load.wait_for(200);
    let before = now_ns();
    rig.agent.signal(Signal::SIGSTOP);
    std::thread::sleep(Duration::from_secs(20));
    rig.agent.signal(Signal::SIGCONT);
    load.wait_for(200);
    load.stop();
    rig.assert_protected();
    assert_eq!(rig.events("offline"), 0);
    rig.check_live("after the pause");
    rig.check_view(before);
}

/// Goal: a CDP disk whose file is cut short under the agent: the guest notices nothing, no view ever shows wrong bytes, and protection goes
/// off loudly when what is gone is needed: at the latest when the log is full and is sealed, from indexes that are read back.
#[test]
fn a_cdp_disk_that_is_truncated_under_the_agent_costs_the_guest_nothing() {
    let Some(mut rig) = rig(16, STALL) else { return };
    let load = rig.load(rig.plan(16));
    // Several segments and yet far less than a log holds (24 MiB): what is cut off belongs to the log that is being written.
    let mut instants = Vec::new();
    note_instants(&load, 300, &mut instants);
    let old = now_ns();
    load.wait_for(100);
    rig.disks.change(CDP, |content| content.truncate(3 << 20));
    let calls = rig.disks.calls(CDP, "write");
    load.wait_for(100);
    assert!(rig.disks.calls(CDP, "write") > calls, "nothing went to the disk that was cut short: that shows nothing");
    let new = now_ns();
    load.wait_for(50);
    for at in [old, new] {
        // Refused, an error, or right: never wrong.
        let Ok(answer) = rig.agent.try_ctl(&["view", "open", "demo", "--at", &at.to_string()]) else { continue };
        let view = cdp_tests::process::View::from_json(&answer);
        let Ok(mut client) = Client::connect(&rig.agent.socket(), &view.id) else { continue };
        if let Ok(image) = client.read_all() {
            let checked = rig.oracle.lock().unwrap().check_image(&image, at, at);
            checked.unwrap_or_else(|wrong| panic!("view at {at}: {wrong}"));
        }
    }
    // Writes to a file that was cut short succeed, so nothing is noticed before that (docs/decisions/0002).
    rig.wait_for_health("offline");
    note_instants(&load, 300, &mut instants);
    assert_loudly_off(&rig);
    for at in [old, new] {
        assert_gap(&rig, at);
    }
    load.stop_within(STALL_MAX + MARGIN);
    rig.check_live("after the truncation");
    assert_no_gap_is_shown(&rig, &instants);
    // A clean stop leaves everything on the primary, or says that it could not.
    rig.agent.signal(Signal::SIGTERM);
    rig.agent.wait_for_end();
    let now = now_ns();
    rig.oracle.lock().unwrap().check_image(&rig.disks.content(PRIMARY), now, now).expect("the primary after a stop");
    rig.agent.start_unserved();
    // Design part 6 allows nothing else: the first unprotected ack came after a durable `detached`, so the volume is served, its journal is never
    // redone, and no admin has to decide; and it is not `ok`, since there is no other CDP disk and this one is shorter than it was made.
    assert_eq!(rig.health(), "offline", "{}", rig.info());
    assert_loudly_off_at_start(&rig);
    assert!(rig.events("offline") > 0, "no event");
    assert!(rig.metric(&["cdp_disk_online{", &rig.cdp]) == 0.0, "the disk's metric");
    rig.check_live("after the truncation and a restart");
    for at in [old, new] {
        assert_gap(&rig, at);
    }
    assert_no_gap_is_shown(&rig, &instants);
}

/// Goal: a primary whose writes or syncs fail for a while: acks go on, the state is told, nothing is lost, and it is over when
/// the primary works again. A failed sync may have dropped what it covered: it is written again.
#[test]
fn a_primary_that_fails_for_a_while_loses_nothing() {
    let faults = [
        (Op::Write, Effect::Fail(EIO)),
        (Op::Write, Effect::Fail(ENOSPC)),
        (Op::Sync, Effect::Fail(EIO)),
        (Op::Sync, Effect::FailAndForget(EIO)),
    ];
    for (seed, (op, effect)) in (20..).zip(faults) {
        let Some(mut rig) = rig(seed, "backlog = \"1GiB\"") else { return };
        let mut plan = Plan { depth: 2, reads_percent: 0, ..rig.plan(seed) };
        plan.sizes = vec![512, 4096, 8192];
        let load = rig.load(plan);
        load.wait_for(300);
        rig.disks.inject(PRIMARY, Fault::sticky(op, effect));
        rig.wait_for_health("primary_failing");
        load.wait_for(300);
        let at = now_ns();
        load.wait_for(100);
        assert!(rig.events("primary_failing") > 0);
        assert!(rig.metric(&["cdp_volume_health{", "\"demo\"", "\"primary_failing\""]) == 1.0);
        rig.check_view(at);
        rig.disks.heal();
        rig.wait_for_health("ok");
        load.wait_for(100);
        load.stop();
        rig.check_live("after the primary failed for a while");
        rig.check_view(at);
        assert!(rig.events("primary_recovered") > 0);
        rig.agent.stop();
        let now = now_ns();
        let checked = rig.oracle.lock().unwrap().check_image(&rig.disks.content(PRIMARY), now, now);
        checked.unwrap_or_else(|wrong| panic!("the primary after {op:?} {effect:?} and a stop: {wrong}"));
    }
}

/// Goal: with a primary that fails for good and the backlog full, the guest gets the primary's own error after `stall_max`, not
/// silence; what was acked is still there when the primary is back.
#[test]
fn a_primary_that_fails_for_good_gives_its_own_error_once_the_backlog_is_full() {
    let Some(rig) = rig(30, "stall_max = \"1s\"\nbacklog = \"1MiB\"") else { return };
    rig.write_some(30, 100);
    rig.check_live("before");
    rig.disks.inject(PRIMARY, Fault::sticky(Op::Write, Effect::Fail(ENOSPC)));
    let plan = Plan { errors_fail: false, reads_percent: 0, writes_max: 600, sizes: vec![4096, 16384], ..rig.plan(31) };
    let load = rig.load(Plan { connections: 2, depth: 32, ..plan });
    rig.wait_for_health("primary_failing");
    rig.eventually("an error for the guest", || rig.metric(&["cdp_volume_errors_total{", "\"demo\""]) > 0.0);
    rig.disks.heal();
    load.finish();
    rig.wait_for_health("ok");
    rig.oracle.lock().unwrap().cut();
    rig.check_live("after the primary is back");
    rig.assert_protected();
}

/// With a load on it, first the primary fails, then the CDP disk.
fn both_disks_fail(seed: u64) -> Option<(Rig, Load)> {
    let rig = rig(seed, STALL)?;
    rig.write_some(seed, 100);
    rig.check_live("before");
    let load = rig.load(Plan { errors_fail: false, reads_percent: 0, depth: 4, ..rig.plan(seed + 1) });
    load.wait_for(100);
    rig.disks.inject(PRIMARY, Fault::sticky(Op::Write, Effect::Fail(ENOSPC)));
    rig.wait_for_health("primary_failing");
    load.wait_for(100);
    rig.disks.inject(CDP, Fault::sticky(Op::Write, Effect::Fail(EIO)));
    rig.wait_for_health("offline");
    rig.eventually("an error for the guest", || rig.metric(&["cdp_volume_errors_total{", "\"demo\""]) > 0.0);
    Some((rig, load))
}

/// Goal: with the CDP disk failed and what is acked in memory alone, a guest whose primary fails, too, gets the primary's own error as from a plain disk, and
/// not silence; nothing that was acked is lost when the primary works again, and another CDP disk protects.
#[test]
fn with_both_disks_failing_the_guest_gets_the_primarys_own_error() {
    let Some((mut rig, load)) = both_disks_fail(32) else { return };
    rig.disks.heal_file(PRIMARY);
    load.wait_for(100);
    load.stop_within(STALL_MAX + MARGIN);
    rig.oracle.lock().unwrap().cut();
    rig.check_live("after the primary is back");
    rig.add_spare();
    rig.eventually("protection", || rig.health() == "ok");
    rig.assert_protected();
    rig.agent.kill();
    rig.agent.start();
    rig.check_live("after a kill");
}

/// Goal: a stop in that state ends, within a minute and with an error; when the disks work again, the next start serves everything that was acked.
#[test]
fn a_stop_with_both_disks_failing_ends_and_loses_nothing() {
    let Some((mut rig, load)) = both_disks_fail(34) else { return };
    let begun = std::time::Instant::now();
    rig.agent.signal(Signal::SIGTERM);
    let status = rig.agent.wait_for_end();
    assert!(!status.success(), "the stop says that all is on the primary");
    assert!(begun.elapsed() < Duration::from_secs(60), "the stop took {:?}", begun.elapsed());
    load.stop();
    rig.oracle.lock().unwrap().cut();
    rig.disks.heal();
    rig.agent.start();
    rig.check_live("after the start");
}

/// Goal: old content that the primary cannot read is an I/O error in views of the time before, and nothing else: the guest's
/// overwrite is acked, destaged and heals the place.
#[test]
fn old_content_that_cannot_be_read_is_an_error_in_views_and_the_overwrite_heals_it() {
    let Some(rig) = rig(40, "") else { return };
    rig.write_some(40, 50);
    rig.eventually("an empty backlog", || rig.info()["backlog_bytes"] == 0);
    // Another log, so that every block needs a new before-image.
    rig.agent.ctl(&["disable", "demo"]);
    rig.agent.ctl(&["enable", "demo"]);
    let before = now_ns();
    rig.disks.inject(PRIMARY, Fault::sticky(Op::Read, Effect::Fail(EIO)));
    let mut client = rig.agent.connect("demo");
    let error = client.read(1 << 20, 4096).expect_err("its own disk cannot read it");
    assert_eq!(error.code(), Some(u32::try_from(EIO).unwrap()), "{error}");
    let data = {
        let mut oracle = rig.oracle.lock().unwrap();
        let op = oracle.begin_write(1 << 20, 8192);
        let data = oracle.data(op);
        client.write(1 << 20, &data).expect("an overwrite needs nothing old");
        oracle.ack(op);
        data
    };
    client.flush().unwrap();
    rig.eventually("an empty backlog", || rig.info()["backlog_bytes"] == 0);
    let after = now_ns();
    rig.disks.heal();
    assert!(client.read(1 << 20, 8192).unwrap() == data);
    let view = rig.agent.open_view("demo", before);
    let mut old = rig.agent.connect(&view.id);
    old.read(1 << 20, 4096).expect_err("nobody ever read what was there");
    old.read(2 << 20, 4096).expect("the neighbours are there");
    rig.assert_protected();
    rig.check_view(after);
    rig.check_live("after the overwrite");
}

/// The primary of a second volume.
const OTHER: &str = "other.img";

/// Beside "demo" a volume "other", on the same CDP disk and at rest.
fn rig_with_other(seed: u64) -> Option<Rig> {
    let rig = rig(seed, STALL)?;
    rig.disks.create(OTHER, 8 << 20);
    rig.agent.ctl(&["volume", "add", "other", "--path", &rig.disks.path_str(OTHER)]);
    rig.agent.ctl(&["edit", "other", "--reserve-capacity", "40MiB"]);
    rig.agent.ctl(&["enable", "other"]);
    let mut client = rig.agent.connect("other");
    client.write(0, &[5; 4096]).unwrap();
    client.close();
    rig.write_some(seed, 300);
    rig.eventually("empty backlogs", || {
        ["demo", "other"].iter().all(|name| rig.agent.info(name)["backlog_bytes"] == 0)
    });
    Some(rig)
}

fn uuid(rig: &Rig, volume: &str) -> String {
    rig.agent.info(volume)["volume_uuid"].as_str().expect("a uuid").to_owned()
}

fn assert_other_is_well(rig: &Rig) {
    let info = rig.agent.info("other");
    assert_eq!(info["health"], "ok", "{info}");
    assert_eq!(info["cdp_state"], "on", "{info}");
    assert!(rig.agent.connect("other").read(0, 4096).unwrap() == [5; 4096]);
}

/// Goal: a primary that hangs at a start keeps no other volume from being served; its own is told as failing. When it answers again, the opening that comes too
/// late is undone, and the volume can be taken into service with all that it had.
#[test]
fn a_primary_that_hangs_at_a_start_costs_only_its_own_volume() {
    let Some(mut rig) = rig_with_other(48) else { return };
    let id = uuid(&rig, "other");
    rig.agent.stop();
    rig.disks.inject(OTHER, Fault::sticky(Op::Read, Effect::Hang));
    let begun = std::time::Instant::now();
    rig.agent.start();
    assert!(begun.elapsed() < Duration::from_secs(45), "the start took {:?}", begun.elapsed());
    assert!(rig.disks.hanging() > 0, "nothing hangs: the test shows nothing");
    rig.check_live("beside a primary that hangs");
    rig.assert_protected();
    let list = rig.agent.ctl(&["list"]);
    let listed = list["list"].as_array().and_then(|list| list.iter().find(|volume| volume["volume_name"] == "other"));
    let listed = listed.unwrap_or_else(|| panic!("it is not in the list: {list}"));
    assert_eq!(listed["health"], "primary_failing", "{listed}");
    assert!(listed["health_reason"].as_str().is_some_and(|why| why.contains("it hangs")), "{listed}");
    assert!(rig.events("primary_failing") > 0, "no event");
    assert!(rig.metric(&["cdp_volume_health{", "\"other\"", "\"primary_failing\""]) == 1.0, "the metric");
    assert!(Client::connect(&rig.agent.socket(), "other").is_err(), "it is served");

    rig.disks.heal();
    rig.agent.ctl(&["volume", "remove", "other"]);
    let path = rig.disks.path_str(OTHER);
    rig.eventually("the primary can be opened", || {
        rig.agent.try_ctl(&["volume", "add", "other", "--path", &path, "--uuid", &id]).is_ok()
    });
    assert_other_is_well(&rig);
    rig.check_live("beside a primary that works again");
}

/// Goal: a stop does not wait for a primary that hangs for longer than it must, with a read of a guest under way there: the other volumes are closed in order, and the one
/// that hung is recovered at the next start.
#[test]
fn a_stop_with_a_primary_that_hangs_closes_the_other_volumes_in_order() {
    let Some(mut rig) = rig_with_other(49) else { return };
    let ids = ["demo", "other"].map(|volume| uuid(&rig, volume));
    let (mut sender, _receiver) = rig.agent.connect("other").split();
    rig.disks.inject(OTHER, Fault::sticky(Op::Read, Effect::Hang));
    sender.send(Request { command: CMD_READ, flags: 0, offset: 1 << 20, len: 4096 }, &[]).unwrap();
    rig.eventually("a read that hangs", || rig.disks.hanging() > 0);
    rig.write_some(50, 300);
    let begun = std::time::Instant::now();
    rig.agent.signal(Signal::SIGTERM);
    // The process lives until the kernel has the answer: its end is not that of the stop.
    let stopped = |rig: &Rig| {
        let log = std::fs::read_to_string(rig.agent.file("agent.log")).unwrap();
        log.lines().any(|line| line.ends_with(": stopped"))
    };
    while !stopped(&rig) {
        assert!(begun.elapsed() < Duration::from_secs(90), "the stop does not end:\n{}", rig.agent.log_tail());
        std::thread::sleep(Duration::from_millis(100));
    }
    println!("the stop took {:?}", begun.elapsed());
    let fences = ids.map(|id| std::fs::read_to_string(rig.disks.path("state").join("fences").join(id)).unwrap());
    assert!(fences[0].contains("\"state\":\"clean\""), "{}", fences[0]);
    assert!(fences[1].contains("\"state\":\"dirty\""), "{}", fences[1]);
    rig.disks.heal();
    assert!(!rig.agent.wait_for_end().success(), "the stop says that all is on the primaries");
    rig.agent.start();
    rig.check_live("after the start");
    rig.assert_protected();
    assert_other_is_well(&rig);
}

/// Goal: whoever writes to the primary while the agent is down, after a clean stop or a kill: nothing is redone over it, no old
/// history is shown for it, the state says so until a named decision.
#[test]
fn another_writer_on_the_primary_while_the_agent_was_down_is_noticed() {
    // The last: a block device has no mtime, and a mount changes little more than the superblock.
    for (clean, mounted) in [(true, false), (false, false), (true, true)] {
        let Some(mut rig) = rig(50, "") else { return };
        rig.write_some(50, 300);
        rig.check_live("before");
        rig.eventually("an empty backlog", || rig.info()["backlog_bytes"] == 0);
        let old = now_ns();
        // After a kill it is known by what is recorded as destaged, which an idle volume does within a second.
        std::thread::sleep(Duration::from_secs(4));
        if clean {
            rig.agent.stop()
        } else {
            rig.agent.kill()
        }
        if mounted {
            rig.disks.change_unseen(PRIMARY, |content| content[1024 + 52] ^= 1);
        } else {
            rig.disks.change(PRIMARY, |content| content.iter_mut().for_each(|byte| *byte = byte.wrapping_add(1)));
        }
        let intruder = rig.disks.content(PRIMARY);
        rig.agent.start_unserved();
        assert_eq!(rig.health(), "primary_changed", "clean: {clean}, mounted: {mounted}");
        assert!(rig.events("primary_changed") > 0);
        assert_loudly_unserved(&rig, "primary_changed");
        assert_gap(&rig, old);
        assert!(rig.disks.content(PRIMARY) == intruder, "something was redone over it");
        rig.agent.ctl_refused(&["volume", "override", "demo", "--accept", "needs_journal"], &["primary_changed"]);
        rig.agent.ctl(&["volume", "override", "demo", "--accept", "primary_changed"]);
        assert!(&rig.agent.live_image("demo") == intruder.as_ref(), "the intruder's bytes are what there is");
        assert_gap(&rig, old);
        rig.agent.ctl(&["enable", "demo"]);
        rig.assert_protected();
    }
}

/// Goal: bits that flip on a CDP disk under the agent are never shown: what a view reads is right or an error, an event tells of it, and the guest notices nothing.
#[test]
fn bits_that_flip_under_the_agent_are_never_shown() {
    let Some(rig) = rig(55, "") else { return };
    rig.write_some(55, 300);
    let view = rig.agent.open_view("demo", now_ns());
    let mut client = Client::connect(&rig.agent.socket(), &view.id).expect("the view is served");
    let before = client.read_all().expect("it can be read");
    rig.write_some(56, 300);
    rig.eventually("an empty backlog", || rig.info()["backlog_bytes"] == 0);
    // A bit of each block, but for those that tell the disk.
    rig.disks.change(CDP, |content| content.chunks_mut(4096).skip(256).for_each(|block| block[100] ^= 1));
    let mut refused = 0;
    for (number, block) in before.chunks(4096).enumerate() {
        match client.read(number as u64 * 4096, block.len() as u32) {
            Ok(read) => assert!(read == block, "block {number} of the view is wrong"),
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 0, "nothing was read from the CDP disk: this shows nothing");
    assert!(rig.events("damage") > 0, "no event tells of the damage");
    rig.check_live("beside a damaged history");
    rig.write_some(57, 100);
    rig.check_live("after more writes");
}

/// Goal: after a clean stop everything is on the primary: without the CDP disk the volume is served, unprotected and saying so;
/// when the disk is back, with the state of long ago, nothing of it is redone.
#[test]
fn a_cdp_disk_that_is_gone_after_a_clean_stop_stops_nobody() {
    let Some(mut rig) = rig(60, "") else { return };
    rig.write_some(60, 300);
    rig.check_live("before");
    let old = now_ns();
    rig.agent.stop();
    let inode = rig.disks.take_away(CDP);
    rig.agent.start();
    assert_eq!(rig.health(), "offline");
    assert!(rig.events("offline") > 0);
    assert_loudly_off_at_start(&rig);
    rig.check_live("without its CDP disk");
    rig.write_some(61, 300);
    rig.check_live("unprotected");
    let unprotected = now_ns();
    assert_gap(&rig, old);
    rig.agent.kill();
    rig.disks.put_back(CDP, inode);
    rig.agent.start();
    rig.check_live("with the CDP disk back");
    for at in [old, unprotected] {
        assert_gap(&rig, at);
    }
    if rig.health() != "ok" {
        rig.agent.ctl(&["enable", "demo"]);
    }
    rig.assert_protected();
    rig.write_some(62, 100);
    rig.check_live("protected again");
    rig.check_view(now_ns());
    assert_gap(&rig, unprotected);
}

/// Goal: after a kill the newest acked writes may be on the CDP disk alone: without it the volume is not served; with it, nothing
/// is missing; only a named decision goes on without, and then the journal is never redone.
#[test]
fn a_cdp_disk_that_is_gone_after_a_kill_is_waited_for() {
    let Some(mut rig) = rig(70, "") else { return };
    rig.write_some(70, 300);
    rig.check_live("before");
    rig.agent.kill();
    let inode = rig.disks.take_away(CDP);
    rig.agent.start_unserved();
    assert!(rig.events("needs_journal") > 0);
    assert_loudly_unserved(&rig, "needs_journal");
    rig.agent.kill();
    rig.disks.put_back(CDP, inode);
    rig.agent.start();
    rig.check_live("with the CDP disk back");
    rig.assert_protected();

    rig.write_some(71, 300);
    rig.agent.kill();
    rig.disks.take_away(CDP);
    rig.agent.start_unserved();
    assert_loudly_unserved(&rig, "needs_journal");
    rig.agent.ctl_refused(&["volume", "override", "demo", "--accept", "primary_changed"], &["needs_journal"]);
    rig.agent.ctl(&["volume", "override", "demo", "--accept", "needs_journal"]);
    let mut client = rig.agent.connect("demo");
    client.write(0, &[9; 4096]).unwrap();
    client.close();
    let primary = rig.agent.live_image("demo");
    rig.agent.kill();
    rig.disks.put_back(CDP, inode);
    rig.agent.start();
    assert!(rig.agent.live_image("demo") == primary, "a journal that was given up was redone");
}

/// Goal: a CDP disk that comes back as it was some time ago (a restored snapshot, a mirror's stale half) is not taken for the
/// newest state: either the volume is not served, or what is served misses nothing. What it lacks is never shown as history, neither
/// then nor after the decision to go on without it.
#[test]
fn a_cdp_disk_that_comes_back_with_an_old_watermark_is_not_believed() {
    for drained in [false, true] {
        let Some(mut rig) = rig(80, "") else { return };
        rig.write_some(80, 300);
        rig.eventually("an empty backlog", || rig.info()["backlog_bytes"] == 0);
        let mut instants = vec![now_ns()];
        rig.agent.kill();
        let stale = rig.disks.content(CDP);
        // From here on the copy knows nothing.
        instants.push(now_ns());
        rig.agent.start();
        instants.push(now_ns());
        let load = rig.load(Plan { writes_max: 400, ..rig.plan(81) });
        for _ in 0..3 {
            load.wait_for(100);
            instants.push(now_ns());
        }
        load.finish();
        instants.push(now_ns());
        rig.check_live("before");
        if drained {
            rig.eventually("an empty backlog", || rig.info()["backlog_bytes"] == 0);
        }
        instants.push(now_ns());
        rig.agent.kill();
        rig.disks.change(CDP, |content| content.clone_from(&stale));
        let primary = rig.disks.content(PRIMARY);
        rig.agent.start_unserved();
        let health = rig.health();
        if health == "ok" {
            rig.check_live("with a stale CDP disk");
        } else {
            assert_loudly_unserved(&rig, &health);
            assert!(rig.disks.content(PRIMARY) == primary, "stale writes were redone over newer ones");
        }
        assert_no_gap_is_shown(&rig, &instants);
        if health != "ok" {
            rig.agent.ctl(&["volume", "override", "demo", "--accept", &health]);
            assert_no_gap_is_shown(&rig, &instants);
            rig.agent.ctl(&["enable", "demo"]);
            rig.assert_protected();
            assert_no_gap_is_shown(&rig, &instants);
        }
    }
}

/// Goal: the one case in which the guest sees an error of the journal's: the CDP disk is lost while a revert is copied. Blocks
/// that were not copied read as errors until they are overwritten, everything else is right, also after a restart; a named
/// decision gives the bytes from before the revert.
/// Goal: nobody lets go of a volume by mistake while its primary is half of one state and half of another.
#[test]
fn a_volume_whose_revert_is_being_copied_is_not_removed() {
    if !FaultFs::possible() {
        cdp_tests::skip("needs root and /dev/fuse");
        return;
    }
    let rig = Rig::new(93, Sizes { volume: 32, cdp: 768, reserve: 640 }, STALL);
    let plan = Plan { sizes: vec![65536, 262_144], reads_percent: 0, writes_max: 400, ..rig.plan(93) };
    rig.load(plan.clone()).finish();
    rig.check_live("first");
    let target = now_ns();
    let old = rig.agent.live_image("demo");
    rig.load(Plan { seed: rig.plan(94).seed, ..plan }).finish();
    rig.eventually("an empty backlog", || rig.info()["backlog_bytes"] == 0);
    // The copying waits for the primary.
    rig.disks.inject(PRIMARY, Fault::sticky(Op::Write, Effect::Hang));
    rig.agent.ctl(&["revert", "demo", "--at", &target.to_string()]);
    assert!(!rig.info()["revert"].is_null(), "nothing is pending: the test shows nothing");
    rig.agent.ctl_refused(&["volume", "remove", "demo"], &["revert", "force"]);
    assert!(rig.agent.live_image("demo") == old, "it is served as before");
    rig.disks.heal();
    rig.eventually("the end of the copying", || rig.info()["revert"].is_null());
    rig.agent.ctl(&["volume", "remove", "demo"]);
    assert!(*rig.disks.content(PRIMARY) == old, "the primary alone is the volume as it was reverted to");
}

#[test]
fn a_cdp_disk_lost_with_a_revert_pending_gives_errors_only_where_nothing_was_copied() {
    if !FaultFs::possible() {
        cdp_tests::skip("needs root and /dev/fuse");
        return;
    }
    // Larger than what is copied at a time: the rest is lost with the disk.
    let mut rig = Rig::new(90, Sizes { volume: 32, cdp: 768, reserve: 640 }, STALL);
    let size = 32 << 20;
    let plan = Plan { sizes: vec![65536, 262_144], reads_percent: 0, writes_max: 400, ..rig.plan(90) };
    rig.load(plan.clone()).finish();
    rig.check_live("first");
    rig.eventually("an empty backlog", || rig.info()["backlog_bytes"] == 0);
    let target = now_ns();
    let old = rig.agent.live_image("demo");
    rig.load(Plan { seed: rig.plan(91).seed, ..plan }).finish();
    rig.check_live("second");
    rig.eventually("an empty backlog", || rig.info()["backlog_bytes"] == 0);
    let new = rig.agent.live_image("demo");
    // The copying waits for the primary, so it is pending when the CDP disk goes.
    rig.disks.inject(PRIMARY, Fault::sticky(Op::Write, Effect::Hang));
    rig.agent.ctl(&["revert", "demo", "--at", &target.to_string()]);
    assert!(rig.agent.live_image("demo") == old, "a revert holds from its answer on");
    rig.disks.inject(CDP, Fault::sticky(Op::Write, Effect::Fail(EIO)));
    rig.disks.inject(CDP, Fault::sticky(Op::Read, Effect::Fail(EIO)));
    let mut client = rig.agent.connect("demo");
    // The write is acked, whatever happens to the disk below, as soon as the primary goes on.
    let disks = &rig.disks;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(1500));
            disks.heal_file(PRIMARY);
        });
        client.write(0, &[7; 4096]).expect("a write costs nothing");
    });
    rig.wait_for_health("revert_incomplete");
    assert!(rig.events("revert_incomplete") > 0);
    assert!(rig.metric(&["cdp_volume_health{", "\"demo\"", "\"revert_incomplete\""]) == 1.0);
    let look = |rig: &Rig, given_up: bool| {
        let mut client = rig.agent.connect("demo");
        assert!(client.read(0, 4096).unwrap() == [7; 4096], "what was written after the revert");
        let mut lost = 0;
        for offset in (4096..size).step_by(4096) {
            let range = usize::try_from(offset).unwrap()..usize::try_from(offset + 4096).unwrap();
            match client.read(offset, 4096) {
                Ok(data) if given_up => assert!(data == old[range.clone()] || data == new[range], "at {offset}"),
                Ok(data) => assert!(data == old[range], "at {offset}: neither an error nor the target's bytes"),
                Err(error) => {
                    assert_eq!(error.code(), Some(u32::try_from(EIO).unwrap()), "{error}");
                    lost += 1;
                }
            }
        }
        lost
    };
    let lost = look(&rig, false);
    assert!(lost > 0, "nothing was pending: the test shows nothing");
    rig.agent.kill();
    rig.disks.heal();
    rig.agent.start_unserved();
    assert_eq!(rig.health(), "revert_incomplete");
    assert!(rig.metric(&["cdp_volume_health{", "\"demo\"", "\"revert_incomplete\""]) == 1.0);
    assert_eq!(look(&rig, false), lost, "a restart gives nothing back");
    // An overwrite heals its block.
    let mut client = rig.agent.connect("demo");
    let broken = (4096..size).step_by(4096).find(|offset| client.read(*offset, 4096).is_err()).unwrap();
    client.write(broken, &[8; 4096]).unwrap();
    assert!(client.read(broken, 4096).unwrap() == [8; 4096]);
    client.write(broken, &old[usize::try_from(broken).unwrap()..][..4096]).unwrap();
    client.close();
    assert_eq!(look(&rig, false), lost - 1);
    rig.agent.ctl_refused(&["volume", "override", "demo", "--accept", "needs_journal"], &["revert_incomplete"]);
    rig.agent.ctl(&["volume", "override", "demo", "--accept", "revert_incomplete"]);
    assert_eq!(look(&rig, true), 0, "the decision serves everything");
    assert_gap(&rig, target);
}
