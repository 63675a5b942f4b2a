//! Promise: bad input on any interface is refused in words that name the field, the value and the bound; nothing is lost
//! and the agent lives (design part 6, last row).

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use cdp_tests::nbd::{
    CMD_BLOCK_STATUS, CMD_CACHE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, Client, Handshake,
    NbdError, OPT_ABORT, OPT_EXPORT_NAME, OPT_GO, OPT_INFO, OPT_LIST, OPT_SET_META_CONTEXT, OPT_STRUCTURED_REPLY,
    Request, encode,
};
use cdp_tests::process::{Agent, exit};
use cdp_tests::{Rng, now_ns};

const SIZE: u64 = 8 << 20;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;

/// A volume with something on it, and proof that it is still there.
struct Witness {
    agent: Agent,
    image: Vec<u8>,
}

impl Witness {
    fn new() -> Self {
        let agent = Agent::dev("8MiB", "1GiB");
        let mut image = vec![0; 8 << 20];
        Rng::new(8).fill(&mut image[..1 << 20]);
        let mut client = agent.connect("demo");
        client.write(0, &image[..1 << 20]).unwrap();
        client.close();
        Self { agent, image }
    }

    fn assert_unharmed(&mut self, after: &str) {
        self.agent.assert_alive();
        assert!(self.agent.live_image("demo") == self.image, "after {after}: the volume has changed");
        assert_eq!(self.agent.info("demo")["health"], "ok", "after {after}");
    }
}

/// The errno that a request is answered with on a connection that goes on afterwards.
fn refused(client: &mut Client, name: &str, request: Request, data: &[u8]) -> u32 {
    match client.call(request, data) {
        Ok(_) => panic!("{name}: it was accepted"),
        Err(NbdError::Io(e)) => panic!("{name}: the connection broke: {e}"),
        Err(NbdError::Refused { code, .. }) => {
            client.flush().unwrap_or_else(|e| panic!("{name}: the connection is out of step: {e}"));
            code
        }
    }
}

#[test]
fn bad_nbd_requests_are_refused_and_the_connection_goes_on() {
    let mut witness = Witness::new();
    let request = |command, flags, offset, len| Request { command, flags, offset, len };
    let sector = [7; 512];
    let past = &[EINVAL, ENOSPC][..];
    // name, request, payload, errnos that fit
    let table: &[(&str, Request, &[u8], &[u32])] = &[
        ("read of nothing", request(CMD_READ, 0, 0, 0), &[], &[EINVAL]),
        ("write of nothing", request(CMD_WRITE, 0, 0, 0), &[], &[EINVAL]),
        ("zeroes of nothing", request(CMD_WRITE_ZEROES, 0, 0, 0), &[], &[EINVAL]),
        ("trim of nothing", request(CMD_TRIM, 0, 0, 0), &[], &[EINVAL]),
        ("read past the end", request(CMD_READ, 0, SIZE - 512, 1024), &[], past),
        ("read at the end", request(CMD_READ, 0, SIZE, 512), &[], past),
        ("write past the end", request(CMD_WRITE, 0, SIZE, 512), &sector, past),
        ("zeroes past the end", request(CMD_WRITE_ZEROES, 0, SIZE - 512, 1024), &[], past),
        ("trim past the end", request(CMD_TRIM, 0, SIZE, 4096), &[], past),
        ("cache past the end", request(CMD_CACHE, 0, SIZE, 4096), &[], past),
        ("an offset that wraps around", request(CMD_READ, 0, u64::MAX - 511, 1024), &[], past),
        ("a write whose offset wraps around", request(CMD_WRITE, 0, u64::MAX - 511, 512), &sector, past),
        ("an unaligned read", request(CMD_READ, 0, 1, 512), &[], &[EINVAL]),
        ("an unaligned write", request(CMD_WRITE, 0, 100, 512), &sector, &[EINVAL]),
        ("a read of an odd length", request(CMD_READ, 0, 0, 511), &[], &[EINVAL]),
        ("a write of an odd length", request(CMD_WRITE, 0, 0, 100), &sector[..100], &[EINVAL]),
        ("an overlong read", request(CMD_READ, 0, 0, 0x8000_0000), &[], &[EINVAL, ENOSPC, EOVERFLOW]),
        ("an unknown command", request(77, 0, 0, 512), &[], &[EINVAL]),
        ("block status that was not negotiated", request(CMD_BLOCK_STATUS, 0, 0, 512), &[], &[EINVAL]),
        ("an unknown flag on a read", request(CMD_READ, 1 << 14, 0, 512), &[], &[EINVAL]),
        ("an unknown flag on a write", request(CMD_WRITE, 1 << 14, 0, 512), &sector, &[EINVAL]),
        ("an unknown flag on a flush", request(CMD_FLUSH, 1 << 13, 0, 0), &[], &[EINVAL]),
    ];
    let mut client = witness.agent.connect("demo");
    for (name, request, data, fitting) in table {
        let code = refused(&mut client, name, *request, data);
        assert!(fitting.contains(&code), "{name}: errno {code}, expected one of {fitting:?}");
    }
    drop(client);
    witness.assert_unharmed("bad requests");
}

/// Requests after which nobody can stay in step: the server hangs up, and only on this client.
#[test]
fn what_cannot_be_parsed_ends_that_connection_only() {
    let mut witness = Witness::new();
    let mut bystander = witness.agent.connect("demo");
    let mut bad_magic = encode(Request { command: CMD_READ, flags: 0, offset: 0, len: 512 }, 1);
    bad_magic[0] ^= 0xFF;
    let overlong = encode(Request { command: CMD_WRITE, flags: 0, offset: 0, len: 0x7FFF_FE00 }, 2);
    for (name, bytes) in [("a bad magic number", &bad_magic[..]), ("an overlong write", &overlong[..])] {
        let mut stream = witness.agent.connect("demo").into_stream();
        stream.write_all(bytes).unwrap();
        // Whatever it answers, it ends; for the overlong write it may also ask for nothing and wait for a payload that
        // never comes, which is the client's business: hanging up is ours then.
        stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        drop(stream);
        bystander.flush().unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    drop(bystander);
    witness.assert_unharmed("requests that cannot be parsed");
}

/// Goal: a client that stops in the middle of anything holds nobody up.
#[test]
fn truncated_handshakes_and_half_open_connections_hold_nobody_up() {
    let mut witness = Witness::new();
    let socket = witness.agent.socket();
    let mut greeting = vec![0, 0, 0, 3];
    greeting.extend_from_slice(b"IHAVEOPT");
    greeting.extend_from_slice(&OPT_GO.to_be_bytes());
    greeting.extend_from_slice(&10_u32.to_be_bytes());
    greeting.extend_from_slice(&4_u32.to_be_bytes());
    greeting.extend_from_slice(b"demo\0\0");
    let mut held = Vec::new();
    for cut in 0..greeting.len() {
        for hang_up in [true, false] {
            let mut stream = UnixStream::connect(&socket).unwrap();
            stream.write_all(&greeting[..cut]).unwrap();
            if !hang_up {
                held.push(stream); // half open: says nothing more
            }
        }
    }
    // Cut in the middle of a write's payload.
    for cut in [0, 1, 27, 28, 29, 28 + 4095] {
        let mut stream = witness.agent.connect("demo").into_stream();
        let mut bytes = encode(Request { command: CMD_WRITE, flags: 0, offset: 0, len: 4096 }, 1).to_vec();
        bytes.extend_from_slice(&[0xEE; 4096]);
        stream.write_all(&bytes[..cut]).unwrap();
    }
    witness.assert_unharmed("truncated handshakes");
    drop(held);
    witness.assert_unharmed("half-open connections that went away");
}

#[test]
fn bad_options_are_refused_in_the_handshake() {
    let mut witness = Witness::new();
    let socket = witness.agent.socket();
    let name_only = |name: &str| {
        let mut data = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
        data.extend_from_slice(name.as_bytes());
        data.extend_from_slice(&[0, 0]);
        data
    };
    const UNSUP: u32 = 1;
    const INVALID: u32 = 3;
    const UNKNOWN: u32 = 6;
    const TOO_BIG: u32 = 9;
    let long = "x".repeat(5000);
    let table: &[(&str, u32, Vec<u8>, &[u32])] = &[
        ("an unknown option", 4711, vec![], &[UNSUP]),
        ("an unknown volume", OPT_GO, name_only("nobody"), &[UNKNOWN]),
        ("info about an unknown volume", OPT_INFO, name_only("nobody"), &[UNKNOWN]),
        ("a name of 5000 bytes", OPT_GO, name_only(&long), &[UNKNOWN, INVALID, TOO_BIG]),
        ("a name with a line break", OPT_GO, name_only("de\nmo"), &[UNKNOWN, INVALID]),
        ("a name that is no UTF-8", OPT_GO, vec![0, 0, 0, 2, 0xFF, 0xFE, 0, 0], &[UNKNOWN, INVALID]),
        ("a short choice", OPT_GO, vec![0, 0], &[INVALID]),
        ("a name longer than its option", OPT_GO, vec![0, 0, 0, 99, b'd', 0, 0], &[INVALID]),
        ("more requests than bytes", OPT_GO, vec![0, 0, 0, 4, b'd', b'e', b'm', b'o', 0, 9], &[INVALID]),
        ("a list with payload", OPT_LIST, vec![1, 2, 3], &[INVALID]),
        ("structured replies with payload", OPT_STRUCTURED_REPLY, vec![1], &[INVALID]),
        ("a context before structured replies", OPT_SET_META_CONTEXT, name_only("demo"), &[INVALID]),
    ];
    for (name, option, data, fitting) in table {
        let mut handshake = Handshake::connect(&socket).unwrap();
        let error = handshake.option(*option, data).map(drop).expect_err(name);
        let code = error.code().unwrap_or_else(|| panic!("{name}: {error}"));
        assert!(fitting.contains(&code), "{name}: {error}, expected one of {fitting:?}");
        // The negotiation goes on.
        assert!(handshake.list().unwrap_or_else(|e| panic!("{name}: {e}")).contains(&"demo".to_owned()));
    }
    let mut handshake = Handshake::connect(&socket).unwrap();
    handshake.option(OPT_ABORT, &[]).unwrap();
    let mut handshake = Handshake::connect(&socket).unwrap();
    handshake.send(OPT_EXPORT_NAME, b"nobody").unwrap();
    let mut rest = Vec::new();
    handshake.stream.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty(), "the old way of choosing has no error answer but the end");
    let mut handshake = Handshake::connect(&socket).unwrap();
    handshake.stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let _ = handshake.stream.read_to_end(&mut rest);
    witness.assert_unharmed("bad options");
}

/// Each call is refused with the exit code and in the words that a person needs.
#[test]
fn bad_calls_are_refused_in_words_that_help() {
    let mut witness = Witness::new();
    let agent = &witness.agent;
    let dir = agent.dir().to_str().unwrap().to_owned();
    let before = (now_ns() - 3600 * 1_000_000_000).to_string();
    let after = (now_ns() + 3600 * 1_000_000_000).to_string();
    let file = |name: &str| format!("{dir}/{name}");
    fs::write(file("tiny.img"), [0; 100]).unwrap();
    File::create(file("spare.img")).unwrap().set_len(1 << 20).unwrap();
    agent.ctl(&["mark", "demo", "--name", "taken"]);
    let (cdp, primary, spare, tiny) = (file("cdp.img"), file("primary.img"), file("spare.img"), file("tiny.img"));
    let (missing, fifo, unknown) = (file("missing.img"), file("fifo"), file("unknown.img"));
    cdp_tests::local::run("mkfifo", &[&fifo]);
    // At its end, where pools and members of arrays are told.
    File::create(&unknown).unwrap().set_len(64 << 20).unwrap();
    OpenOptions::new().write(true).open(&unknown).unwrap().write_all_at(b"?", (64 << 20) - 4096).unwrap();
    use exit::{NO_SPACE, NOT_FOUND, OUT_OF_COVERAGE, REFUSED, USAGE};
    // call, words of the refusal, exit codes that fit
    let table: &[(&[&str], &[&str], &[i32])] = &[
        (&["info", "nobody"], &["nobody"], &[NOT_FOUND]),
        (&["enable", "nobody"], &["nobody"], &[NOT_FOUND]),
        (&["view", "open", "nobody", "--at", "now"], &["nobody"], &[NOT_FOUND]),
        (&["view", "open", "demo", "--at", &before], &[&before], &[OUT_OF_COVERAGE]),
        (&["view", "open", "demo", "--at", &after], &[&after], &[OUT_OF_COVERAGE]),
        (&["view", "open", "demo", "--at", "no-such-marker"], &["no-such-marker"], &[NOT_FOUND]),
        (
            &["view", "open", "demo", "--at", "99999999999999999999999"],
            &["99999999999999999999999"],
            &[USAGE, NOT_FOUND],
        ),
        (&["view", "close", "00000000-0000-0000-0000-000000000000"], &["00000000"], &[NOT_FOUND]),
        (&["revert", "demo", "--at", &before], &[&before], &[OUT_OF_COVERAGE]),
        (&["revert", "demo", "--at", &after], &[&after], &[OUT_OF_COVERAGE]),
        (&["revert", "demo", "nobody", "--at", "now"], &["nobody"], &[NOT_FOUND, 3]),
        (&["mark", "demo", "--name", "taken"], &["taken"], &[REFUSED]),
        (&["mark", "demo", "--name", ""], &["name"], &[USAGE]),
        (&["mark", "demo", "--name", "5m ago"], &["5m ago"], &[USAGE]),
        (&["edit", "demo", "--reserve-capacity", "0"], &["reserve"], &[USAGE]),
        (&["edit", "demo", "--reserve-capacity", "1MiB"], &["reserve_capacity", "1048576"], &[USAGE]),
        (&["edit", "demo", "--reserve-capacity", "2TiB"], &["reserve_capacity"], &[USAGE, NO_SPACE, REFUSED]),
        (&["edit", "demo", "--reserve-duration", "0s"], &["reserve"], &[USAGE]),
        (&["edit", "demo", "--reserve-duration", "-5"], &[], &[USAGE]),
        (&["edit", "demo", "--priority", "urgent"], &["urgent"], &[USAGE]),
        (&["edit", "demo"], &[], &[USAGE]),
        (&["clean", "demo", "--seq", "424242"], &["424242"], &[NOT_FOUND]),
        (&["volume", "add", "demo", "--path", &spare], &["demo"], &[REFUSED]),
        (&["volume", "add", "a/b", "--path", &spare], &["a/b"], &[USAGE]),
        (&["volume", "add", "v", "--path", &missing], &["missing.img"], &[NOT_FOUND, REFUSED, 1]),
        (&["volume", "add", "v", "--path", &tiny], &["size"], &[USAGE, REFUSED]),
        (&["volume", "add", "v", "--path", &cdp], &["cdp.img"], &[REFUSED, USAGE]),
        (&["volume", "add", "v", "--path", &primary], &["primary.img"], &[REFUSED, USAGE]),
        (&["volume", "add", "v", "--path", &dir], &["path"], &[USAGE, REFUSED, 1]),
        (&["volume", "add", "v", "--path", &spare, "--size", "100"], &["size", "100"], &[USAGE]),
        (&["volume", "add", "v", "--path", &spare, "--size", "1TiB"], &["size"], &[USAGE, NO_SPACE, REFUSED]),
        (&["volume", "add", "v", "--path", &spare, "--uuid", "xyz"], &["uuid", "xyz"], &[USAGE]),
        (&["volume", "remove", "nobody"], &["nobody"], &[NOT_FOUND]),
        (&["volume", "resize", "demo", "--size", "1MiB"], &["size", "1048576"], &[USAGE, REFUSED]),
        (&["volume", "override", "demo", "--accept", "needs_journal"], &["demo"], &[REFUSED]),
        (&["disk", "init", &primary], &["primary.img"], &[REFUSED, USAGE]),
        (&["disk", "init", &cdp], &["cdp.img"], &[REFUSED, USAGE]),
        (&["disk", "init", &tiny], &[], &[USAGE, NO_SPACE, REFUSED]),
        (&["disk", "init", &dir], &["regular file"], &[USAGE]),
        (&["disk", "init", &fifo, "--force"], &["fifo", "regular file"], &[USAGE]),
        (&["disk", "init", &unknown], &["unknown.img", "force"], &[REFUSED]),
        (&["disk", "init", &spare, "--segment-size", "3MiB"], &["3"], &[USAGE]),
    ];
    for (call, words, codes) in table {
        let refusal = agent.ctl_refused(call, words);
        let code = refusal.code.unwrap_or(-1);
        assert!(
            codes.contains(&code),
            "cdpctl {}: exit code {code}, expected one of {codes:?}: {refusal}",
            call.join(" ")
        );
        let text = refusal.said.to_lowercase();
        assert!(!text.contains("internal"), "cdpctl {}: {refusal}", call.join(" "));
    }
    let listed = witness.agent.ctl(&["volume", "list"]);
    assert_eq!(listed["list"].as_array().map(Vec::len), Some(1), "nothing was added: {listed}");
    assert_eq!(witness.agent.ctl(&["disk", "list"])["disks"].as_array().map(Vec::len), Some(1));
    witness.assert_unharmed("bad calls");
}

#[test]
fn a_cdp_disk_or_a_primary_of_another_agent_is_refused() {
    let mut witness = Witness::new();
    let other = Agent::dev("1MiB", "512MiB");
    for name in ["cdp.img", "primary.img"] {
        let path = other.file(name);
        let path = path.to_str().unwrap();
        for force in [false, true] {
            let mut call = vec!["disk", "init", path];
            if force {
                call.push("--force");
            }
            let refusal = witness.agent.ctl_refused(&call, &[name]);
            assert!(matches!(refusal.code, Some(exit::REFUSED | exit::USAGE | 1)), "{refusal}");
        }
        witness.agent.ctl_refused(&["volume", "add", "stolen", "--path", path], &[name]);
    }
    let mut client = other.connect("demo");
    client.write(0, &[3; 4096]).unwrap();
    assert!(client.read(0, 4096).unwrap() == [3; 4096]);
    assert_eq!(other.info("demo")["health"], "ok");
    witness.assert_unharmed("attempts on another agent's disks");
}

/// Goal: a file that shrinks under its volume gives errors where it ends, and nowhere else.
#[test]
fn a_primary_that_shrinks_below_its_size_gives_errors_there_and_the_agent_lives() {
    let mut witness = Witness::new();
    let path = witness.agent.file("shrinks.img");
    File::create(&path).unwrap().set_len(4 << 20).unwrap();
    let agent = &witness.agent;
    agent.ctl(&["edit", "demo", "--reserve-capacity", "400MiB"]);
    agent.ctl(&["volume", "add", "shrinks", "--path", path.to_str().unwrap()]);
    agent.ctl(&["edit", "shrinks", "--reserve-capacity", "400MiB", "--reserve-duration", "1h"]);
    agent.ctl(&["enable", "shrinks"]);
    let mut client = agent.connect("shrinks");
    client.write(0, &[1; 8192]).unwrap();
    OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 20).unwrap();
    let error = client.read(3 << 20, 4096).expect_err("there is nothing to read");
    assert_eq!(error.code(), Some(EIO), "{error}");
    assert!(client.read(0, 8192).unwrap() == [1; 8192]);
    client.close();
    witness.assert_unharmed("a shrinking file");
    let listed = witness.agent.ctl(&["volume", "list"]);
    assert!(listed.to_string().contains("shrinks"));
}
