//! What clients must not say. After each of them the server serves the next client.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use super::super::PAYLOAD_MAX;
use super::super::wire::{command, error, option, reply};
use super::client::{Answer, Client, Random, info, queries, request};
use super::fixture::{Fixture, SIZE};

fn works(fixture: &Fixture) {
    let mut client = Client::open(&fixture.socket(), "disk", true).unwrap();
    assert_eq!(client.write(0, &[5; 512]).unwrap(), Answer::Ok);
    assert_eq!(client.read(0, 512).unwrap(), Answer::Data(vec![5; 512]));
    client.send(command::DISC, 0, 0, 0, &[]).unwrap();
    assert!(client.hears_the_end());
}

#[test]
fn bad_requests_are_answered_and_the_connection_goes_on() {
    let fixture = Fixture::new();
    let end = SIZE - 512;
    let past = u64::MAX - 511;
    #[rustfmt::skip]
    let table: &[(&str, u16, u16, u64, u32, u32)] = &[
        // what                          command                flags                    offset   length         answer
        ("read of nothing",              command::READ,         0,                       0,       0,             error::EINVAL),
        ("write of nothing",             command::WRITE,        0,                       0,       0,             error::EINVAL),
        ("trim of nothing",              command::TRIM,         0,                       0,       0,             error::EINVAL),
        ("zeroes of nothing",            command::WRITE_ZEROES, 0,                       0,       0,             error::EINVAL),
        ("status of nothing",            command::BLOCK_STATUS, 0,                       0,       0,             error::EINVAL),
        ("cache of nothing",             command::CACHE,        0,                       0,       0,             error::EINVAL),
        ("read too long",                command::READ,         0,                       0,       PAYLOAD_MAX + 512, error::EINVAL),
        ("read as long as it gets",      command::READ,         0,                       0,       u32::MAX - 511, error::EINVAL),
        ("write too long",               command::WRITE,        0,                       0,       PAYLOAD_MAX + 512, error::EINVAL),
        ("write twice too long",         command::WRITE,        0,                       0,       2 * PAYLOAD_MAX, error::EINVAL),
        ("read past the end",            command::READ,         0,                       end,     1024,          error::EINVAL),
        ("read behind the end",          command::READ,         0,                       SIZE,    512,           error::EINVAL),
        ("read where numbers end",       command::READ,         0,                       past,    512,           error::EINVAL),
        ("write past the end",           command::WRITE,        0,                       end,     1024,          error::ENOSPC),
        ("write where numbers end",      command::WRITE,        0,                       past,    512,           error::ENOSPC),
        ("zeroes past the end",          command::WRITE_ZEROES, 0,                       end,     1024,          error::ENOSPC),
        ("trim past the end",            command::TRIM,         0,                       end,     1024,          error::EINVAL),
        ("cache past the end",           command::CACHE,        0,                       end,     1024,          error::EINVAL),
        ("status past the end",          command::BLOCK_STATUS, 0,                       end,     1024,          error::EINVAL),
        ("read off the grid",            command::READ,         0,                       1,       512,           error::EINVAL),
        ("read of half a sector",        command::READ,         0,                       0,       256,           error::EINVAL),
        ("write off the grid",           command::WRITE,        0,                       256,     512,           error::EINVAL),
        ("write of a sector and a byte", command::WRITE,        0,                       0,       513,           error::EINVAL),
        ("trim off the grid",            command::TRIM,         0,                       1,       512,           error::EINVAL),
        ("unknown command",              8,                     0,                       0,       512,           error::EINVAL),
        ("command of all bits",          u16::MAX,              0,                       0,       512,           error::EINVAL),
        ("unknown flag",                 command::READ,         1 << 15,                 0,       512,           error::EINVAL),
        ("flag of another command",      command::WRITE,        command::FLAG_NO_HOLE,   0,       512,           error::EINVAL),
        ("all flags",                    command::WRITE_ZEROES, u16::MAX,                0,       512,           error::EINVAL),
        ("fast zeroes",                  command::WRITE_ZEROES, command::FLAG_FAST_ZERO, 0,       512,           error::ENOTSUP),
    ];
    for structured in [true, false] {
        let mut client = Client::open(&fixture.socket(), "disk", structured).unwrap();
        for &(what, command, flags, offset, len, errno) in table {
            let payload = vec![9; if command == command::WRITE { len as usize } else { 0 }];
            let cookie = client.send(command, flags, offset, len, &payload).unwrap();
            let (answered, answer) = client.receive(|_| None).unwrap();
            assert_eq!(answered, cookie, "{what}");
            match answer {
                Answer::Error(found, words) => {
                    assert!(found == errno && words.is_empty() != structured, "{what}: {found} {words}");
                }
                answer => panic!("{what}: {answer:?}"),
            }
        }
        if !structured {
            let answer = client.ask(command::READ, command::FLAG_DF, 0, 512, &[]).unwrap();
            assert_eq!(answer, Answer::Error(error::EINVAL, String::new()));
        }
        assert_eq!(client.read(0, 512).unwrap(), Answer::Data(vec![0; 512]), "nothing was written");
    }
    works(&fixture);
}

#[test]
fn what_cannot_be_followed_ends_the_connection() {
    let fixture = Fixture::new();
    let mut bad_magic = request(command::READ, 0, 1, 0, 512);
    bad_magic[0] ^= 1;
    let endless_write = request(command::WRITE, 0, 1, 0, 2 * PAYLOAD_MAX + 512);
    let half = request(command::READ, 0, 1, 0, 512)[..27].to_vec();
    let half_payload = [request(command::WRITE, 0, 1, 0, 8192), vec![1; 8191]].concat();
    for bytes in [bad_magic, endless_write, half, half_payload] {
        let mut client = Client::open(&fixture.socket(), "disk", true).unwrap();
        client.stream.write_all(&bytes).unwrap();
        client.stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(client.hears_the_end());
    }
    works(&fixture);
    let mut client = Client::open(&fixture.socket(), "disk", true).unwrap();
    assert_eq!(client.read(4096, 4096).unwrap(), Answer::Data(vec![0; 4096]), "half a write is none");
    drop(client);
    fixture.until(|fixture| fixture.stat(|stats| &stats.connections) == 0);
    assert_eq!(fixture.server.connections(), 0);
}

#[test]
fn bad_options_are_answered_and_the_handshake_goes_on() {
    let fixture = Fixture::new();
    let mut client = Client::greet(&fixture.socket()).unwrap();
    let mut trailing = info("disk", &[]);
    trailing.push(0);
    let mut too_many_kinds = info("disk", &[1]);
    too_many_kinds[8..10].copy_from_slice(&[0, 2]);
    let long_name = "x".repeat(4097);
    let mut endless_queries = queries("disk", &[]);
    endless_queries[8..12].copy_from_slice(&[0xff; 4]);
    client.option(option::STRUCTURED_REPLY, &[]).unwrap();
    for (what, code, data, kind) in [
        ("unknown option", 99, vec![1, 2, 3], reply::ERR_UNSUP),
        ("option 4", 4, vec![], reply::ERR_UNSUP),
        ("extended headers", 11, vec![], reply::ERR_UNSUP),
        ("TLS where there is none", option::STARTTLS, vec![], reply::ERR_POLICY),
        ("TLS with data", option::STARTTLS, vec![0], reply::ERR_INVALID),
        ("list with data", option::LIST, vec![0], reply::ERR_INVALID),
        ("structured with data", option::STRUCTURED_REPLY, vec![0; 5], reply::ERR_INVALID),
        ("go without data", option::GO, vec![], reply::ERR_INVALID),
        ("go with a name cut off", option::GO, vec![0, 0, 0, 9, b'd'], reply::ERR_INVALID),
        ("go with an endless name", option::GO, vec![0xff; 8], reply::ERR_INVALID),
        ("go with bytes behind", option::GO, trailing.clone(), reply::ERR_INVALID),
        ("info with bytes behind", option::INFO, trailing, reply::ERR_INVALID),
        ("go with kinds cut off", option::GO, too_many_kinds, reply::ERR_INVALID),
        ("go with a name that is no text", option::GO, vec![0, 0, 0, 1, 0xff, 0, 0], reply::ERR_INVALID),
        ("go with a long name", option::GO, info(&long_name, &[]), reply::ERR_TOO_BIG),
        ("go with an unknown name", option::GO, info("\u{0}\n", &[]), reply::ERR_UNKNOWN),
        ("contexts without data", option::SET_META_CONTEXT, vec![], reply::ERR_INVALID),
        ("contexts without end", option::LIST_META_CONTEXT, endless_queries, reply::ERR_INVALID),
        ("contexts with a long name", option::LIST_META_CONTEXT, queries("disk", &[&long_name]), reply::ERR_TOO_BIG),
        ("an option that is too long", option::GO, vec![0; 70_000], reply::ERR_TOO_BIG),
        ("an unknown one that is too long", 1234, vec![0; 1 << 20], reply::ERR_TOO_BIG),
    ] {
        let answers = client.option(code, &data).unwrap();
        assert_eq!(answers.len(), 1, "{what}");
        assert!(answers[0].0 == kind && !answers[0].1.is_empty(), "{what}: {:#x}", answers[0].0);
    }
    client.structured = true;
    client.go("disk").unwrap();
    assert_eq!(client.read(0, 512).unwrap(), Answer::Data(vec![0; 512]));
    let mut client = Client::greet(&fixture.socket()).unwrap();
    assert_eq!(client.option(option::ABORT, &[]).unwrap(), [(reply::ACK, vec![])]);
    assert!(client.hears_the_end());
}

#[test]
fn handshakes_that_cannot_be_followed_are_ended() {
    let fixture = Fixture::new();
    let option_head = |magic: &[u8], code: u32, len: u32| [magic, &code.to_be_bytes(), &len.to_be_bytes()].concat();
    for (what, flags, bytes) in [
        ("unknown client flags", 7_u32, vec![]),
        ("all client flags", u32::MAX, vec![]),
        ("bad option magic", 3, option_head(b"IHAVEOPS", option::LIST, 0)),
        ("an endless option", 3, option_head(b"IHAVEOPT", option::GO, u32::MAX)),
        ("an export that is not there", 3, [&option_head(b"IHAVEOPT", option::EXPORT_NAME, 4)[..], b"what"].concat()),
        ("an export that is held", 3, [&option_head(b"IHAVEOPT", option::EXPORT_NAME, 4)[..], b"held"].concat()),
        (
            "an endless export name",
            3,
            [option_head(b"IHAVEOPT", option::EXPORT_NAME, 70_000), vec![0; 70_000]].concat(),
        ),
    ] {
        let mut stream = UnixStream::connect(fixture.socket()).unwrap();
        stream.read_exact(&mut [0; 18]).unwrap();
        stream.write_all(&flags.to_be_bytes()).unwrap();
        let _ = stream.write_all(&bytes); // it may be closed already
        let mut rest = vec![];
        match stream.read_to_end(&mut rest) {
            Ok(_) => assert!(rest.is_empty(), "{what}"),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{what}"),
        }
    }
    works(&fixture);
}

/// A whole session, as bytes.
fn session() -> Vec<u8> {
    let option = |code: u32, data: Vec<u8>| {
        [&b"IHAVEOPT"[..], &code.to_be_bytes(), &(data.len() as u32).to_be_bytes(), &data].concat()
    };
    [
        3_u32.to_be_bytes().to_vec(),
        option(option::STRUCTURED_REPLY, vec![]),
        option(option::LIST, vec![]),
        option(option::SET_META_CONTEXT, queries("disk", &["base:allocation"])),
        option(option::GO, info("disk", &[1, 3])),
        request(command::WRITE, 0, 1, 512, 1024),
        vec![0x5a; 1024],
        request(command::READ, 0, 2, 512, 1024),
        request(command::BLOCK_STATUS, 0, 3, 0, 65536),
        request(command::DISC, 0, 4, 0, 0),
    ]
    .concat()
}

/// Says `bytes`, says that this was all, and listens to the end.
fn say(fixture: &Fixture, bytes: &[u8]) -> Vec<u8> {
    let mut stream = UnixStream::connect(fixture.socket()).unwrap();
    let mut answers = vec![];
    let mut listener = stream.try_clone().unwrap();
    let listening = std::thread::spawn(move || {
        let _ = listener.read_to_end(&mut answers);
        answers
    });
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    listening.join().unwrap()
}

#[test]
fn a_session_cut_at_any_byte_leaves_the_server_alive() {
    let fixture = Fixture::new();
    let session = session();
    say(&fixture, &session); // from now on the disk holds the same bytes in each run
    let whole = say(&fixture, &session);
    assert!(whole.windows(1024).any(|bytes| bytes == [0x5a; 1024]));
    for cut in 0..session.len() {
        let answers = say(&fixture, &session[..cut]);
        assert!(answers.len() <= whole.len() && answers.starts_with(b"NBDMAGICIHAVEOPT"), "cut at {cut}");
    }
    works(&fixture);
    fixture.until(|fixture| fixture.stat(|stats| &stats.connections) == 0 && fixture.server.connections() == 0);
}

#[test]
fn garbage_leaves_the_server_alive() {
    let fixture = Fixture::new();
    let start: u64 = std::env::var("NBD_GARBAGE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let session = session();
    for seed in start..start + 400 {
        println!("NBD_GARBAGE_SEED={seed}"); // shown when it fails
        let mut random = Random(seed);
        let bytes = match seed % 3 {
            // From the first byte, from the first option on, or a whole session with a few bytes changed.
            0 => {
                let len = random.below(2000) as usize;
                random.bytes(len)
            }
            1 => {
                let len = random.below(2000) as usize;
                [&3_u32.to_be_bytes()[..], &random.bytes(len)].concat()
            }
            _ => {
                let mut bytes = session.clone();
                for _ in 0..=random.below(4) {
                    let at = random.below(bytes.len() as u64) as usize;
                    bytes[at] = random.next() as u8;
                }
                bytes
            }
        };
        say(&fixture, &bytes);
    }
    works(&fixture);
    fixture.until(|fixture| fixture.stat(|stats| &stats.connections) == 0 && fixture.server.connections() == 0);
}
