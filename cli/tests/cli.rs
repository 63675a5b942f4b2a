//! `cdpctl` as scripts and people meet it: the program itself against a service with canned answers.

mod fake;

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};

use fake::{Fake, HOST, NOW, Ran, VIEW, VOLUME};
use serde_json::json;

#[test]
fn info_has_the_names_and_exact_numbers_that_scripts_rely_on() {
    let fake = Fake::start();
    let ran = fake.json(&["info", "demo"]);
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    let info = ran.value();
    let log = &info["cdp_info"][1];
    assert_eq!(log["seq"], 1);
    assert_eq!(log["startTime"], NOW - 5_000_000_000);
    assert_eq!(log["use"], 38 << 20);
    assert_eq!(log["capacity"], 10_737_418_240u64);
    assert_eq!(log["ioStartTime"], NOW - 4_999_999_999);
    assert_eq!(log["ioLastTime"], NOW - 4_999_999_998);
    assert_eq!(log["online"], true);
    assert_eq!(log["usd_maddr"], "10.30.12.237");
    assert_eq!(log["usd_path"], "/dev/sdd");
    assert_eq!(log["snaps"][0]["name"], "CDP-auto-1630057893");
    assert_eq!(info["snaps"][1], json!({ "name": "halfway", "time": NOW - 3, "kind": "crash", "auto": false }));
    assert_eq!(info["host_uuid"], HOST);
    assert_eq!(info["volume_uuid"], VOLUME);
    assert_eq!(info["cdp_state"], "on");
    assert_eq!(info["reserve_capacity"], 32_212_254_720u64);
    assert_eq!(info["health"], "offline");
    assert_eq!(info["coverage"][0]["end_reason"], "CDP was disabled");
    assert_eq!(info["coverage"][1], json!({ "start": NOW - 4_000_000_000, "end": null, "end_reason": "" }));
    assert_eq!(info["revert"]["blocks_done"], 25);
    assert_eq!(info["views"][0]["id"], VIEW);
    // No digit may get lost on the way, in the text itself.
    assert!(ran.out.contains("\"now\": 1630057893506590075"), "{}", ran.out);
}

#[test]
fn info_tells_people_what_can_be_viewed_and_why_not_more() {
    let ran = Fake::start().run(&["info", "demo", "--all"]);
    assert_eq!(ran.code, 0);
    for expected in [
        "2021-08-27T09:51:23.506590075Z  2021-08-27T09:51:28.506590075Z  5.000s  CDP was disabled",
        "2021-08-27T09:51:29.506590075Z  now                             4.000s",
        "offline, held: CDP disk /dev/sdd: I/O error",
        "1d in up to 30 GiB (38 MiB used), priority mid",
        "(the device has 2 GiB: cdpctl volume resize demo)",
        "25 of 100 blocks copied (25%)",
        "cdpctl release demo",
        "halfway",
    ] {
        assert!(ran.out.contains(expected), "{expected:?} is missing in\n{}", ran.out);
    }
}

#[test]
fn an_instant_reaches_the_agent_in_every_form() {
    let fake = Fake::start();
    let table = [
        ("1630057893506590075", "snapshot_name: \"\", timestamp: 1630057893506590075, writable: false, ago_ns: None"),
        (
            "2021-08-27T09:51:33.506590075Z",
            "snapshot_name: \"\", timestamp: 1630057893506590075, writable: false, ago_ns: None",
        ),
        ("halfway", "snapshot_name: \"halfway\", timestamp: 0, writable: false, ago_ns: None"),
        ("5m ago", "snapshot_name: \"\", timestamp: 0, writable: false, ago_ns: Some(300000000000)"),
        ("now", "snapshot_name: \"\", timestamp: 0, writable: false, ago_ns: Some(0)"),
        ("flush-before:now", "snapshot_name: \"\", timestamp: 0, writable: false, ago_ns: Some(0)"),
    ];
    for (when, expected) in table {
        let opened = fake.json(&["view", "open", "demo", "--at", when]);
        assert_eq!(opened.code, 0, "{opened:?}");
        let question = fake.question();
        assert!(question.contains(expected) && question.contains("op: \"on\""), "{when}: {question}");
        let flush_before = format!("flush_before: {}", when.starts_with("flush-before:"));
        assert!(question.contains(&flush_before), "{when}: {question}");
        assert_eq!(opened.value()["id"], VIEW);
        assert!(opened.value()["nbd_uri"].as_str().expect("is text").starts_with("nbd+unix:///7c1f"));
        assert!(opened.value()["time"].is_u64());

        assert_eq!(fake.run(&["revert", "demo", "--at", when]).code, 0);
        let question = fake.question();
        let same = expected.replace("writable: false, ", "");
        assert!(question.contains(&same) && question.contains(&flush_before), "{when}: {question}");
    }
}

#[test]
fn views_close_by_their_id() {
    let fake = Fake::start();
    let closed = fake.json(&["view", "close", VIEW]);
    assert_eq!((closed.code, closed.value()["id"].as_str()), (0, Some(VIEW)));
    let ran = fake.run(&["view", "close", "nope"]);
    assert_eq!((ran.code, ran.err.as_str()), (4, "cdpctl: view close nope: view \"nope\" not found\n"));
    assert_eq!(fake.json(&["view", "list", "demo"]).value()["views"][0]["writable"], true);
}

#[test]
fn mark_answers_name_and_time_and_each_volume() {
    let fake = Fake::start();
    let marked = fake.json(&["mark", "demo", "--name", "halfway"]).value();
    assert_eq!((&marked["name"], &marked["time"]), (&json!("halfway"), &json!(NOW)));
    let ran = fake.json(&["mark", "demo", "gone", "--name", "halfway", "--kind", "application"]);
    assert!(fake.question().contains("kind: Application"), "{}", fake.question());
    assert_eq!(ran.code, 3);
    let marked = ran.value();
    assert_eq!((&marked["success"], &marked["fail"], &marked["time"]), (&json!(1), &json!(1), &json!(NOW)));
    assert_eq!(marked["results"][0]["time"], NOW);
    assert_eq!(marked["results"][1]["status"], "NOT_FOUND");
    assert_eq!(marked["results"][1]["message"], "volume \"gone\" not found");
}

#[test]
fn a_batch_says_which_volumes_failed() {
    let fake = Fake::start();
    for command in [
        &["enable"][..],
        &["disable"],
        &["release"],
        &["edit", "--reserve-duration", "24h"],
        &["mark"],
        &["revert", "--at", "now"],
    ] {
        let with = |volumes: &[&'static str]| fake.run(&[command, volumes].concat());
        let both = with(&["demo", "gone"]);
        assert_eq!(both.code, 3, "{command:?}: {both:?}");
        assert!(both.out.starts_with("demo: ") && both.err == "cdpctl: gone: volume \"gone\" not found\n", "{both:?}");
        assert_eq!(with(&["gone"]).code, 4);
        let done = with(&["demo", "other"]);
        assert_eq!((done.code, done.err.as_str(), done.out.lines().count()), (0, "", 2), "{done:?}");
    }
}

#[test]
fn edit_sends_only_what_was_given() {
    let fake = Fake::start();
    let edited = fake.json(&["edit", "demo", "--reserve-capacity", "30GiB", "--priority", "high"]);
    let question = fake.question();
    let expected = "reserve_capacity: Some(32212254720), reserve_duration: None, cdp_priority: Some(\"high\")";
    assert!(question.contains(expected), "{question}");
    assert_eq!((edited.code, &edited.value()["reserve_duration"]), (0, &json!(86400)));
}

#[test]
fn every_status_code_has_its_exit_code() {
    let fake = Fake::start();
    let table = [
        (3, 2),
        (4, 9),
        (5, 4),
        (6, 6),
        (7, 11),
        (8, 8),
        (9, 6),
        (10, 6),
        (11, 7),
        (12, 1),
        (13, 1),
        (14, 5),
        (15, 10),
        (16, 11),
    ];
    for (status, exit) in table {
        let ran = fake.run(&["info", &status.to_string()]);
        assert_eq!(ran.code, exit, "status {status}: {ran:?}");
        assert_eq!(ran.err, format!("cdpctl: info {status}: volume \"{status}\" answers {status}\n"));
        assert_eq!(fake.run(&["enable", &status.to_string()]).code, exit);
    }
    let ran = fake.json(&["info", "11"]);
    let error: serde_json::Value = serde_json::from_str(&ran.err).expect("is JSON");
    assert_eq!(error["error"]["status"], "OUT_OF_RANGE");
    assert_eq!((&error["error"]["exit"], ran.out.as_str()), (&json!(7), ""));
}

#[test]
fn an_agent_that_is_not_there_is_said_so() {
    let directory = tempfile::tempdir().expect("makes a directory");
    let socket = format!("unix:{}", directory.path().join("agent.sock").display());
    let run = |agent: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cdpctl"));
        Ran::of(command.env_clear().env("CDP_AGENT", agent).arg("list").output().expect("runs cdpctl"))
    };
    let ran = run(&socket);
    assert_eq!(ran.code, 5);
    assert!(ran.err.contains(&socket) && ran.err.contains("is cdp-agent running?"), "{}", ran.err);
    // A socket that nobody listens on any more.
    drop(std::os::unix::net::UnixListener::bind(directory.path().join("agent.sock")).expect("listens"));
    let ran = run(&socket);
    assert!(ran.code == 5 && ran.err.contains("refused"), "{ran:?}");
    let ran = run("http://127.0.0.1:1");
    assert_eq!(ran.code, 5, "{ran:?}");
}

#[test]
fn https_wants_certificates_that_both_ends_trust() {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
    use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};

    let fake = Fake::start();
    let authority = || {
        let mut params = CertificateParams::new(Vec::<String>::new()).expect("is valid");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        CertifiedIssuer::self_signed(params, KeyPair::generate().expect("makes a key")).expect("signs")
    };
    let (ours, other) = (authority(), authority());
    let leaf = |issuer: &CertifiedIssuer<'_, KeyPair>, names: &[&str]| {
        let key = KeyPair::generate().expect("makes a key");
        let names = names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let certificate = CertificateParams::new(names).expect("is valid").signed_by(&key, issuer).expect("signs");
        (certificate.pem(), key.serialize_pem())
    };
    let (certificate, key) = leaf(&ours, &["localhost"]);
    let tls = ServerTlsConfig::new()
        .identity(Identity::from_pem(certificate, key))
        .client_ca_root(Certificate::from_pem(ours.pem()));
    let port = {
        let _inside = fake.runtime().enter();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("listens");
        listener.set_nonblocking(true).expect("is a socket");
        let port = listener.local_addr().expect("has an address").port();
        let connections = tokio_stream::wrappers::TcpListenerStream::new(
            tokio::net::TcpListener::from_std(listener).expect("listens"),
        );
        let server = Server::builder().tls_config(tls).expect("is valid").add_service(fake.service());
        fake.runtime().spawn(server.serve_with_incoming(connections));
        port
    };
    let write = |name: &str, text: &str| std::fs::write(fake.directory.path().join(name), text).expect("writes");
    write("ca.pem", &ours.pem());
    write("other-ca.pem", &other.pem());
    for (name, issuer) in [("me", &ours), ("stranger", &other)] {
        let (certificate, key) = leaf(issuer, &["client"]);
        write(&format!("{name}.pem"), &certificate);
        write(&format!("{name}.key"), &key);
    }
    let agent = format!("https://localhost:{port}");
    let run = |args: &[&str]| fake.run_alone(&[&["--agent", &agent, "status"], args].concat());

    let trusted = run(&["--tls-ca", "ca.pem", "--tls-cert", "me.pem", "--tls-key", "me.key"]);
    assert_eq!(trusted.code, 0, "{trusted:?}");
    assert!(trusted.out.contains("host7"));
    let refused: &[&[&str]] = &[
        &["--tls-ca", "ca.pem"],
        &["--tls-ca", "ca.pem", "--tls-cert", "stranger.pem", "--tls-key", "stranger.key"],
        &["--tls-ca", "other-ca.pem", "--tls-cert", "me.pem", "--tls-key", "me.key"],
    ];
    for args in refused {
        let ran = run(args);
        assert!(ran.code == 5 && ran.err.contains(&agent), "{args:?}: {ran:?}");
    }
    let missing = run(&["--tls-ca", "nowhere.pem"]);
    assert!(missing.code == 1 && missing.err.contains("--tls-ca nowhere.pem: No such file"), "{missing:?}");
    assert_eq!(run(&["--tls-ca", "ca.pem", "--tls-cert", "me.pem"]).code, 2);
}

#[test]
fn an_agent_that_does_not_answer_does_not_hang_us() {
    let fake = Fake::start();
    let ran = fake.run(&["--timeout", "500ms", "info", "slow"]);
    assert_eq!(ran.code, 9);
    assert!(ran.err.contains("no answer within 500ms"), "{}", ran.err);
    assert!(fake.question().contains("timeout=Some"), "{}", fake.question());
    assert!(!fake.question().contains("60000000"), "the deadline is the one given: {}", fake.question());
    assert_eq!(fake.run(&["info", "demo"]).code, 0);
    assert!(fake.question().contains("60000000u"), "a minute is the default: {}", fake.question());
    assert_eq!(fake.run(&["--timeout", "0", "info", "demo"]).code, 0);
    assert!(fake.question().contains("timeout=None"), "{}", fake.question());
}

#[test]
fn every_command_has_a_manual_page_with_an_example() {
    let dir = tempfile::tempdir().expect("a folder");
    let made = Command::new(env!("CARGO_BIN_EXE_cdpctl")).arg("man").arg(dir.path()).output().expect("runs cdpctl");
    assert!(made.status.success(), "{made:?}");
    let pages: Vec<_> = std::fs::read_dir(dir.path()).expect("the folder").flatten().map(|page| page.path()).collect();
    for name in ["cdpctl", "cdpctl-revert", "cdpctl-view-open", "cdpctl-disk-check", "cdpctl-group-add"] {
        assert!(pages.contains(&dir.path().join(format!("{name}.1"))), "{name} is not among {pages:?}");
    }
    for page in &pages {
        let text = std::fs::read_to_string(page).expect("a page");
        assert!(text.contains(".SH NAME") && text.contains(".SH SYNOPSIS"), "{page:?}");
        let leads_on = text.contains(".SH SUBCOMMANDS");
        assert!(leads_on || text.contains("Examples:"), "{page:?} has no example");
    }
}

#[test]
fn a_wrong_command_line_names_value_and_bound() {
    let fake = Fake::start();
    let table: &[(&[&str], &str)] = &[
        (&[], "Usage"),
        (&["frobnicate"], "frobnicate"),
        (&["info"], "<VOLUME>"),
        (&["enable"], "<VOLUME>"),
        (&["view", "open", "demo"], "--at"),
        (&["view", "open", "demo", "--at", "2021-08-27"], "zone"),
        (&["view", "open", "demo", "--at", "0"], "at least 1 nanosecond"),
        (&["view", "open", "demo", "--at", "99999999999999999999"], "at most 18446744073709551615"),
        (&["edit", "demo"], "--reserve-capacity"),
        (&["edit", "demo", "--reserve-capacity", "lots"], "30GiB"),
        (&["edit", "demo", "--reserve-duration", "0"], "must be from 1s to 3153600000s"),
        (&["edit", "demo", "--reserve-duration", "1500ms"], "whole number of seconds"),
        (&["edit", "demo", "--priority", "urgent"], "low, mid, high"),
        (&["mark", "demo", "--name", "5m ago"], "must not read as an instant"),
        (&["disk", "init", "x", "--segment-size", "3MiB"], "power of two"),
        (&["disk", "init", "x", "--segment-size", "512MiB"], "from 1 MiB (1048576 bytes) to 256 MiB"),
        (&["volume", "add", "a/b", "--path", "x"], "letters, digits"),
        (&["volume", "add", "a", "--path", "x", "--create"], "--size"),
        (&["volume", "xml", "demo", "--target", "../x"], "like vda"),
        (&["volume", "override", "demo", "--accept", "ok"], "needs_journal"),
        (&["revert", "demo", "--at", "now", "--dry-run", "--wait"], "--wait"),
        (&["events", "--last", "1025"], "0..=1024"),
        (&["timeline", "demo", "--buckets", "0"], "1..=10000"),
        (&["--timeout", "soon", "status"], "such as 1h30m"),
        (&["--agent", "/run/agent.sock", "status"], "unix:/path"),
        (&["--agent", "https://host:7070", "status"], "--tls-ca"),
    ];
    for (args, expected) in table {
        let ran = fake.run_alone(args);
        assert_eq!(ran.code, 2, "{args:?}: {ran:?}");
        assert!(ran.err.contains(expected), "{args:?}: {expected:?} is missing in {}", ran.err);
        assert_eq!(ran.out, "");
    }
    assert_eq!(fake.question(), "", "nothing of this reached an agent");
}

#[test]
fn revert_says_what_would_change_and_how_to_undo_it() {
    let fake = Fake::start();
    let dry = fake.json(&["revert", "demo", "--at", "halfway", "--dry-run"]);
    let report = dry.value();
    assert_eq!((&report["dry_run"], &report["blocks"], &report["bytes"]), (&json!(true), &json!(25), &json!(102_400)));
    assert_eq!(report["undo_time"], json!(null));
    assert_eq!(report["results"][0]["needed_bytes"], 1 << 20);
    let text = fake.run(&["revert", "demo", "--at", "halfway", "--dry-run"]).out;
    assert!(
        text.contains("at most 25 blocks (100 KiB) change; needs 1 MiB of CDP disk, 1 GiB available: enough"),
        "{text}"
    );
    let done = fake.run(&["revert", "demo", "--at", "halfway", "--force"]);
    assert!(done.out.contains("undo with: cdpctl revert demo --undo"), "{done:?}");
    assert!(done.out.contains("cdpctl release demo"), "{done:?}");
}

#[test]
fn revert_waits_for_the_copying_and_shows_no_bar_to_a_pipe() {
    let fake = Fake::start();
    let ran = fake.json(&["revert", "demo", "--at", "halfway", "--wait"]);
    assert_eq!((ran.code, ran.err.as_str(), &ran.value()["copied"]), (0, "", &json!(true)));
    let question = fake.question();
    assert!(question.starts_with("WaitRevertRequest") && question.contains(VOLUME), "{question}");
    assert!(question.contains("timeout=None"), "copying takes as long as it takes: {question}");
    assert_eq!(fake.run(&["revert", "gone", "--at", "halfway", "--wait"]).code, 4);
    assert!(fake.question().starts_with("RevertRequest"), "there is nothing to wait for: {}", fake.question());
}

/// Goal: a revert that was made is told also where the wait for its copying fails, in both forms, and how to undo it.
#[test]
fn a_revert_that_cannot_be_waited_for_is_told_all_the_same() {
    let fake = Fake::start();
    let call = ["revert", "short", "--at", "halfway", "--wait"];
    let ran = fake.json(&call);
    assert_eq!(ran.code, 6, "{ran:?}");
    let (made, failure) = (ran.value(), serde_json::from_str::<serde_json::Value>(&ran.err).expect("one line of JSON"));
    assert_eq!((&made["copied"], &made["success"], &made["undo_time"]), (&json!(false), &json!(1), &json!(NOW - 1)));
    assert_eq!(failure["error"]["status"], "ABORTED", "{failure}");
    let ran = fake.run(&call);
    assert!(ran.code == 6 && ran.out.contains("cdpctl revert short --undo"), "{ran:?}");
    assert!(ran.err.starts_with("cdpctl: wait for the revert: "), "{ran:?}");
}

#[test]
fn clean_tells_nothing_given_from_log_zero() {
    let fake = Fake::start();
    assert_eq!(fake.json(&["clean", "demo"]).value()["usd_seq"], json!(null));
    assert!(fake.question().contains("usd_seq: None"), "{}", fake.question());
    assert_eq!(fake.json(&["clean", "demo", "--seq", "0"]).value()["freed_bytes"], 16 << 20);
    assert!(fake.question().contains("usd_seq: Some(0)"), "{}", fake.question());
    assert!(fake.run(&["clean", "demo", "--seq", "1"]).out.contains("log 1 is thin now"));
}

#[test]
fn list_goes_on_until_it_has_every_page() {
    let fake = Fake::start();
    let list = fake.json(&["list"]).value();
    assert_eq!((&list["total_count"], &list["list"][1]["volume_name"]), (&json!(2), &json!("other")));
    assert_eq!(list["list"][0]["cdp_create_time"], 1_630_053_321);
    assert_eq!(fake.json(&["volume", "list"]).value(), list);
    assert!(fake.run(&["volume", "list"]).out.contains("/dev/vg0/demo"));
}

#[test]
fn events_follow_until_nobody_reads() {
    let fake = Fake::start();
    let some = fake.json(&["events", "--last", "2"]).value();
    assert_eq!(
        some["events"][1],
        json!({
            "time": NOW + 1, "kind": "view_lost", "volume_uuid": VOLUME, "volume_name": "demo", "disk": "", "message": "event 1",
        })
    );
    assert!(fake.run(&["events"]).out.contains("view_lost          demo              event 0"));

    let mut child = fake
        .command(&["--output", "json", "events", "--follow"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("runs cdpctl");
    let mut lines = BufReader::new(child.stdout.take().expect("is piped")).lines();
    for at in 0..3 {
        let line = lines.next().expect("goes on").expect("is read");
        let event: serde_json::Value = serde_json::from_str(&line).expect("is one document per line");
        assert_eq!(event["time"], NOW + at);
    }
    drop(lines);
    let ran = Ran::of(child.wait_with_output().expect("ends"));
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
}

#[test]
fn timeline_resolves_its_ends_by_the_agents_clock() {
    let fake = Fake::start();
    let timeline = fake.json(&["timeline", "demo", "--from", "5s ago", "--to", "halfway"]).value();
    let expected = format!("from: {}, to: {}, buckets: 100", NOW - 5_000_000_000, NOW - 3);
    assert!(fake.question().contains(&expected), "{}", fake.question());
    assert_eq!(
        timeline["buckets"][9],
        json!({ "start": NOW - 1, "blocks": 9, "bytes": 4608, "flushes": 1, "flushes_clean": 1 })
    );
    assert_eq!(timeline["reverts"][0]["target"], NOW - 8);
    let ran = fake.run(&["timeline", "demo", "--to", "nowhere"]);
    assert_eq!((ran.code, ran.err.as_str()), (4, "cdpctl: demo at nowhere: marker \"nowhere\" not found\n"));
    let picture = fake.run(&["timeline", "demo"]).out;
    assert!(picture.contains("coverage  ━━━━━━━━━━") && picture.contains("revert to ○"), "{picture}");
    assert!(fake.question().contains("from: 0, to: 0, buckets: 69"), "{}", fake.question());
}

#[test]
fn xml_is_what_libvirt_and_qemu_want() {
    let fake = Fake::start();
    let xml = fake.run(&["volume", "xml", "demo", "--only", "libvirt"]).out;
    assert_eq!(
        xml,
        "<disk type='network' device='disk'>\n  \
           <driver name='qemu' type='raw' cache='none' discard='unmap'/>\n  \
           <source protocol='nbd' name='demo'>\n    \
             <host transport='unix' socket='/run/cdp-agent/nbd.sock'/>\n    \
             <reconnect delay='900'/>\n  \
           </source>\n  \
           <target dev='vda' bus='virtio'/>\n  \
           <serial>aae751ba8b9742599579</serial>\n\
         </disk>\n"
    );
    let json = fake.json(&["volume", "xml", "demo"]).value();
    assert_eq!(json["xml"], xml);
    assert_eq!(
        json["qemu_blockdev"],
        json!([
            "-blockdev",
            "driver=nbd,node-name=cdp-aae751ba8b97,server.type=unix,server.path=/run/cdp-agent/nbd.sock,export=demo,reconnect-delay=900,cache.direct=on,discard=unmap",
            "-device",
            "virtio-blk-pci,drive=cdp-aae751ba8b97,serial=aae751ba8b9742599579",
        ])
    );
}

#[test]
fn paths_are_the_agents_paths() {
    let fake = Fake::start();
    let here = fake.directory.path().display().to_string();
    assert_eq!(fake.run(&["disk", "init", "cdp.img", "--size", "200GiB"]).code, 0);
    let question = fake.question();
    assert!(
        question.contains(&format!("path: \"{here}/cdp.img\", size: 214748364800, segment_size: 0, force: false")),
        "{question}"
    );
    assert_eq!(fake.run(&["volume", "add", "demo", "--path", "disk.img", "--size", "1GiB", "--create"]).code, 0);
    assert!(fake.question().contains(&format!("path: \"{here}/disk.img\"")), "{}", fake.question());
    assert!(fake.run(&["disk", "list"]).out.contains("/dev/sdd"));
}

#[test]
fn the_remaining_commands_answer() {
    let fake = Fake::start();
    let table: &[(&[&str], &str, &str)] = &[
        (&["status"], "host_name", "3, 1 UNHEALTHY"),
        (&["volume", "remove", "demo", "--clean"], "volume_name", "its history is gone"),
        (&["volume", "resize", "demo"], "old_size", "from 1 GiB to 2 GiB (2147483648 bytes)"),
        (&["volume", "override", "demo", "--accept", "needs_journal"], "health", "goes on with /dev/vg0/demo"),
        (&["disk", "list"], "disks", "online"),
        (&["view", "list"], "views", "scratch 0 B of 1 GiB"),
    ];
    for (args, key, text) in table {
        let ran = fake.json(args);
        assert!(ran.code == 0 && ran.value().get(key).is_some(), "{args:?}: {ran:?}");
        let ran = fake.run(args);
        assert!(ran.code == 0 && ran.out.contains(text), "{args:?}: {ran:?}");
    }
}

#[test]
fn help_and_completion_need_no_agent() {
    let run = |args: &[&str]| {
        Ran::of(Command::new(env!("CARGO_BIN_EXE_cdpctl")).env_clear().args(args).output().expect("runs cdpctl"))
    };
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let ran = run(&["completion", shell]);
        assert!(ran.code == 0 && ran.out.contains("reserve-capacity"), "{shell}");
    }
    let help = run(&["--help"]);
    assert_eq!(help.code, 0);
    assert!(help.out.contains("Exit codes:") && help.out.contains("10  damage was found on a disk"), "{}", help.out);
    assert_eq!(run(&["--version"]).out, format!("cdpctl {}\n", env!("CARGO_PKG_VERSION")));
}
