//! What well-behaved clients get.

use std::collections::HashMap;

use super::super::wire::{chunk, command, error, option, reply, transmission};
use super::client::{Answer, Client, Random, info, queries};
use super::fixture::{BROKEN, Fixture, SIZE};

const STATE_ZERO: u32 = chunk::STATE_HOLE | chunk::STATE_ZERO;

#[test]
fn every_command_works_with_simple_and_with_structured_replies() {
    let fixture = Fixture::new();
    for structured in [false, true] {
        let mut client = Client::open(&fixture.socket(), "disk", structured).unwrap();
        assert_eq!(client.size, SIZE);
        let flags = client.flags;
        let expected = transmission::HAS_FLAGS
            | transmission::SEND_FLUSH
            | transmission::SEND_FUA
            | transmission::SEND_TRIM
            | transmission::SEND_WRITE_ZEROES
            | transmission::SEND_CACHE
            | transmission::CAN_MULTI_CONN
            | if structured { transmission::SEND_DF } else { 0 };
        assert_eq!(flags, expected);
        let mut random = Random(7);
        // Beginning and ending inside blocks, longer than the receive buffer, as long as allowed.
        for (offset, len) in [(512, 512), (0, 4096), (3584, 9216), (1 << 20, 300 << 10), (4096 * 5 + 512, 32 << 20)] {
            let data = random.bytes(len);
            assert_eq!(client.write(offset, &data).unwrap(), Answer::Ok);
            assert_eq!(client.read(offset, len as u32).unwrap(), Answer::Data(data), "{offset}+{len}");
        }
        if structured {
            let answer = client.ask(command::READ, command::FLAG_DF, 512, 8192, &[]).unwrap();
            assert!(matches!(answer, Answer::Data(data) if data.len() == 8192));
        }
        fixture.on_shard(|state| state.disk.flushes.set(0));
        for (command, flags, flushes) in [
            (command::FLUSH, 0, 1),
            (command::WRITE, command::FLAG_FUA, 2),
            (command::TRIM, 0, 2),
            (command::TRIM, command::FLAG_FUA, 3),
            (command::CACHE, 0, 3),
            (command::WRITE_ZEROES, 0, 3),
            (command::WRITE_ZEROES, command::FLAG_FUA | command::FLAG_NO_HOLE, 1004),
            (command::READ, command::FLAG_FUA, 1004),
            (command::FLUSH, command::FLAG_FUA, 1005),
        ] {
            let len = if command == command::FLUSH { 0 } else { 512 };
            let payload = vec![1; if command == command::WRITE { 512 } else { 0 }];
            let answer = client.ask(command, flags, 0, len, &payload).unwrap();
            match answer {
                Answer::Ok => assert_ne!(command, command::READ),
                Answer::Data(data) => assert!(command == command::READ && data == [0; 512]),
                answer => panic!("{command} {flags:#x}: {answer:?}"),
            }
            assert_eq!(fixture.on_shard(|state| state.disk.flushes.get()), flushes, "{command} {flags:#x}");
        }
        assert_eq!(client.ask(command::WRITE_ZEROES, 0, 0, SIZE as u32, &[]).unwrap(), Answer::Ok);
        assert_eq!(client.ask(command::TRIM, 0, 0, SIZE as u32, &[]).unwrap(), Answer::Ok);
    }
}

#[test]
fn block_status_joins_neighbours_and_honours_req_one() {
    let fixture = Fixture::new();
    let mut client = Client::open(&fixture.socket(), "disk", true).unwrap();
    client.write(8192, &[1; 8192]).unwrap();
    let mut status = |flags, offset, len| client.ask(command::BLOCK_STATUS, flags, offset, len, &[]).unwrap();
    let all = [(8192, STATE_ZERO), (8192, 0), (SIZE as u32 - 16384, STATE_ZERO)];
    assert_eq!(status(0, 0, SIZE as u32), Answer::Extents(all.to_vec()));
    assert_eq!(status(command::FLAG_REQ_ONE, 0, SIZE as u32), Answer::Extents(vec![(8192, STATE_ZERO)]));
    assert_eq!(status(command::FLAG_REQ_ONE, 12288, 512), Answer::Extents(vec![(512, 0)]));
    assert_eq!(status(0, 4096, 8192), Answer::Extents(vec![(4096, STATE_ZERO), (4096, 0)]));
}

#[test]
fn exports_are_listed_described_and_refused_by_reason() {
    let fixture = Fixture::new();
    let mut client = Client::greet(&fixture.socket()).unwrap();
    let listed = client.option(option::LIST, &[]).unwrap();
    let entry = |name: &str, words: &str| {
        (reply::SERVER, [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), words.as_bytes()].concat())
    };
    assert_eq!(listed, [entry("disk", "the disk"), entry("read-only", ""), (reply::ACK, vec![])]);
    // Told without being asked: size, flags, block sizes; asked for: name and description.
    let described = client.option(option::INFO, &info("", &[1, 2, 77])).unwrap();
    let words: Vec<_> = described.iter().map(|(kind, data)| (*kind, data.len())).collect();
    assert_eq!(words, [(reply::INFO, 12), (reply::INFO, 14), (reply::INFO, 6), (reply::INFO, 7), (reply::ACK, 0)]);
    assert_eq!(described[1].1, [0, 3, 0, 0, 2, 0, 0, 0, 16, 0, 2, 0, 0, 0]);
    assert_eq!((&described[2].1[2..], &described[3].1[2..]), (&b"disk"[..], &b"words"[..]));
    for (export, kind, words) in [
        ("unheard", reply::ERR_UNKNOWN, "\"unheard\""),
        ("vanished", reply::ERR_UNKNOWN, "not found"),
        ("held", reply::ERR_POLICY, "release it first"),
    ] {
        let answers = client.option(option::GO, &info(export, &[])).unwrap();
        let [(found, said)] = &answers[..] else { panic!("{answers:?}") };
        let said = String::from_utf8_lossy(said);
        assert!(*found == kind && said.contains(words), "{export}: {found:#x} {said}");
    }
    // And still it can be had.
    client.go("read-only").unwrap();
    assert_eq!(client.flags & (transmission::READ_ONLY | transmission::SEND_TRIM), transmission::READ_ONLY);
    for command in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
        let payload: &[u8] = if command == command::WRITE { &[1; 512] } else { &[] };
        assert_eq!(client.ask(command, 0, 0, 512, payload).unwrap(), Answer::Error(error::EPERM, String::new()));
    }
    assert_eq!(client.read(0, 512).unwrap(), Answer::Data(vec![0; 512]));
}

#[test]
fn the_old_way_in_works_with_and_without_zeroes() {
    use std::io::{Read as _, Write as _};
    let fixture = Fixture::new();
    for client_flags in [1_u32, 3, 0] {
        let mut stream = std::os::unix::net::UnixStream::connect(fixture.socket()).unwrap();
        stream.read_exact(&mut [0; 18]).unwrap();
        stream.write_all(&client_flags.to_be_bytes()).unwrap();
        let mut option = b"IHAVEOPT".to_vec();
        option.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 4]);
        option.extend_from_slice(b"disk");
        stream.write_all(&option).unwrap();
        let mut answer = vec![0; if client_flags & 2 == 0 { 10 + 124 } else { 10 }];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer[..8], SIZE.to_be_bytes());
        stream.write_all(&super::client::request(command::READ, 0, 9, 0, 512)).unwrap();
        let mut answer = [1; 16 + 512];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!((&answer[4..8], &answer[8..16], answer[527]), (&[0; 4][..], &9_u64.to_be_bytes()[..], 0));
    }
}

#[test]
fn metadata_contexts_are_chosen_by_name() {
    let fixture = Fixture::new();
    let mut client = Client::greet(&fixture.socket()).unwrap();
    let wanted = queries("disk", &["base:allocation"]);
    let early = client.option(option::SET_META_CONTEXT, &wanted).unwrap();
    assert_eq!(early[0].0, reply::ERR_INVALID);
    client.option(option::STRUCTURED_REPLY, &[]).unwrap();
    let listed = |id: u32| {
        vec![(reply::META_CONTEXT, [&id.to_be_bytes()[..], b"base:allocation"].concat()), (reply::ACK, vec![])]
    };
    let none = || vec![(reply::ACK, vec![])];
    for (code, names, expected) in [
        (option::LIST_META_CONTEXT, &[][..], listed(0)),
        (option::LIST_META_CONTEXT, &["base:"][..], listed(0)),
        (option::LIST_META_CONTEXT, &["base:allocation", "x:y"][..], listed(0)),
        (option::LIST_META_CONTEXT, &["qemu:", "junk", "base:other"][..], none()),
        (option::SET_META_CONTEXT, &["base:"][..], none()),
        (option::SET_META_CONTEXT, &[][..], none()),
        (option::SET_META_CONTEXT, &["qemu:dirty-bitmap:x", "base:allocation"][..], listed(1)),
    ] {
        assert_eq!(client.option(code, &queries("disk", names)).unwrap(), expected, "{code} {names:?}");
    }
    // They were chosen for "disk" alone.
    client.structured = true;
    client.go("read-only").unwrap();
    let answer = client.ask(command::BLOCK_STATUS, 0, 0, 512, &[]).unwrap();
    assert!(matches!(answer, Answer::Error(error::EINVAL, words) if words.contains("context")));
}

/// Goal: a refused choice leaves none, as the protocol says, and of two instants to compare with none is silently left out.
#[test]
fn a_choice_of_contexts_that_is_refused_leaves_none() {
    let fixture = Fixture::new();
    let instants = ["qemu:dirty-bitmap:since-1", "qemu:dirty-bitmap:since-2"];
    for (export, names, code) in [("unheard", &[][..], reply::ERR_UNKNOWN), ("disk", &instants[..], reply::ERR_INVALID)]
    {
        let mut client = Client::greet(&fixture.socket()).unwrap();
        client.option(option::STRUCTURED_REPLY, &[]).unwrap();
        let chosen = client.option(option::SET_META_CONTEXT, &queries("disk", &["base:allocation"])).unwrap();
        assert_eq!(chosen.len(), 2, "{chosen:?}");
        let refused = client.option(option::SET_META_CONTEXT, &queries(export, names)).unwrap();
        assert_eq!((refused.len(), refused[0].0), (1, code), "{refused:?}");
        client.structured = true;
        client.go("disk").unwrap();
        let answer = client.ask(command::BLOCK_STATUS, 0, 0, 512, &[]).unwrap();
        assert!(matches!(answer, Answer::Error(error::EINVAL, words) if words.contains("context")), "{names:?}");
    }
}

/// Goal: whatever is in flight at the same time, every reply goes to its request and no byte to a wrong place.
/// Method: a seeded mix on disjoint ranges, sent without waiting, answered in any order, compared with a plain array.
#[test]
fn many_requests_in_flight_are_answered_each_by_its_own() {
    let fixture = Fixture::new();
    for (seed, structured) in [(1, false), (2, true), (3, true)] {
        let mut random = Random(seed);
        let mut client = Client::open(&fixture.socket(), "disk", structured).unwrap();
        let mut model = fixture.on_shard(|state| state.disk.bytes.borrow().clone());
        for round in 0..8 {
            let mut bytes = vec![];
            let mut expected: HashMap<u64, Option<Vec<u8>>> = HashMap::new();
            let mut at = random.below(64) * 512;
            let mut writes = vec![];
            for cookie in 0..300_u64 {
                let len =
                    if random.below(20) == 0 { 512 * (1 + random.below(400)) } else { 512 * (1 + random.below(16)) };
                if at + len > BROKEN {
                    break;
                }
                let range = at as usize..(at + len) as usize;
                match random.below(4) {
                    0 => {
                        bytes.extend(super::client::request(command::READ, 0, cookie, at, len as u32));
                        expected.insert(cookie, Some(model[range].to_vec()));
                    }
                    1 => {
                        bytes.extend(super::client::request(command::WRITE_ZEROES, 0, cookie, at, len as u32));
                        writes.push((range, vec![0; len as usize]));
                        expected.insert(cookie, None);
                    }
                    _ => {
                        let data = random.bytes(len as usize);
                        bytes.extend(super::client::request(command::WRITE, 0, cookie, at, len as u32));
                        bytes.extend_from_slice(&data);
                        writes.push((range, data));
                        expected.insert(cookie, None);
                    }
                }
                at += len + random.below(3) * 512;
            }
            let mut sender = client.stream.try_clone().unwrap();
            let thread = std::thread::spawn(move || std::io::Write::write_all(&mut sender, &bytes).unwrap());
            while !expected.is_empty() {
                let lens: HashMap<u64, Option<u32>> = expected
                    .iter()
                    .map(|(cookie, data)| (*cookie, data.as_ref().map(|data| data.len() as u32)))
                    .collect();
                let (cookie, answer) = client.receive(|cookie| lens[&cookie]).unwrap();
                match expected.remove(&cookie).expect("answered once") {
                    Some(data) => assert!(answer == Answer::Data(data), "seed {seed} round {round} cookie {cookie}"),
                    None => assert_eq!(answer, Answer::Ok, "seed {seed} round {round} cookie {cookie}"),
                }
            }
            thread.join().unwrap();
            for (range, data) in writes {
                model[range].copy_from_slice(&data);
            }
            let found = fixture.on_shard(|state| state.disk.bytes.borrow().clone());
            assert!(found == model, "seed {seed} round {round}");
        }
    }
    assert!(fixture.stat(|stats| &stats.sends) < fixture.stat(|stats| &stats.requests), "replies share calls");
}

#[test]
fn the_engines_errors_reach_the_client_as_the_protocols() {
    let fixture = Fixture::new();
    let mut client = Client::open(&fixture.socket(), "disk", true).unwrap();
    for (offset, errno, words) in [
        (BROKEN, error::EIO, "read memory"),
        (BROKEN + 512, error::ENOSPC, "2 bytes needed"),
        (BROKEN + 1024, error::ESHUTDOWN, "the view is closed"),
        (BROKEN + 1536, error::EIO, "0 bytes instead of 512"),
    ] {
        let answer = client.read(offset, 512).unwrap();
        assert!(matches!(&answer, Answer::Error(found, said) if *found == errno && said.contains(words)), "{answer:?}");
    }
    assert_eq!(fixture.stat(|stats| &stats.errors), 4);
    let mut client = Client::open(&fixture.socket(), "disk", false).unwrap();
    assert_eq!(client.read(BROKEN, 512).unwrap(), Answer::Error(error::EIO, String::new()));
    assert_eq!(client.read(0, 512).unwrap(), Answer::Data(vec![0; 512]));
}
