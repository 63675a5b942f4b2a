//! Requests that the shard has no room for as a whole.

use std::io::Write as _;
use std::time::Duration;

use super::super::NbdConfig;
use super::super::transmission::SHARE_MIN;
use super::super::wire::{command, error, option, reply};
use super::client::{Answer, Client, Random, info, request};
use super::fixture::{Fixture, SIZE};

/// No request that is larger than a piece is let in as a whole.
fn crowded() -> Fixture {
    Fixture::with(NbdConfig { shard_bytes_max: 0, ..NbdConfig::default() })
}

/// Goal: a request in pieces does what it does as a whole, in each way that it can be asked and answered.
/// Method: writes of odd places and lengths, read back with simple replies, with chunks, and in one chunk.
#[test]
fn requests_in_pieces_are_answered_as_a_whole() {
    let fixture = crowded();
    let mut simple = Client::open(&fixture.socket(), "disk", false).unwrap();
    let mut structured = Client::open(&fixture.socket(), "disk", true).unwrap();
    let mut random = Random(5);
    for (offset, len) in [(0, 1 << 20), (512, 3 << 20), (SHARE_MIN - 512, SHARE_MIN + 1024), (4096, 32 << 20)] {
        let data = random.bytes(len as usize);
        assert_eq!(structured.ask(command::WRITE, command::FLAG_FUA, offset, len as u32, &data).unwrap(), Answer::Ok);
        let flushes = fixture.on_shard(|state| state.disk.flushes.replace(0));
        assert_eq!(flushes, 1, "all of it is durable, and no part of it is told to be");
        assert!(simple.read(offset, len as u32).unwrap() == Answer::Data(data.clone()), "{offset}+{len}");
        for (flags, at_least, at_most) in [(0, 2, u32::MAX), (command::FLAG_DF, 1, 1)] {
            let mut found = vec![0; len as usize];
            structured.send(command::READ, flags, offset, len as u32, &[]).unwrap();
            let (chunks, answer) = structured.receive_chunks(offset, &mut found).unwrap();
            assert!((at_least..=at_most).contains(&chunks) && answer == Answer::Ok && found == data, "{offset}+{len}");
        }
    }
    assert_eq!(fixture.stat(|stats| &stats.requests), 4 * 4, "a request is one however many its pieces");
}

/// Goal: an error in the middle is told where it can be told; where the answer has begun and cannot turn into an error, the connection ends rather than
/// that other bytes are taken for data.
#[test]
fn an_error_in_a_later_piece_is_told_or_ends_the_connection() {
    let fixture = crowded();
    let len = 8 * SHARE_MIN as u32;
    fixture.on_shard(|state| state.disk.fails_at.set(5 * SHARE_MIN));
    let mut client = Client::open(&fixture.socket(), "disk", true).unwrap();
    client.send(command::READ, 0, 0, len, &[]).unwrap();
    let (chunks, answer) = client.receive_chunks(0, &mut vec![0; len as usize]).unwrap();
    assert!(chunks == 6 && matches!(answer, Answer::Error(error::EIO, _)), "{chunks} {answer:?}");
    // The rest of a write's payload is not taken for requests.
    let refused = client.ask(command::WRITE, 0, 0, len, &vec![7; len as usize]).unwrap();
    assert!(matches!(refused, Answer::Error(error::EIO, _)), "{refused:?}");
    let first = client.ask(command::READ, 0, 5 * SHARE_MIN, len / 2, &[]).unwrap();
    assert!(matches!(first, Answer::Error(error::EIO, _)), "in the first piece: {first:?}");
    assert_eq!(client.read(0, 512).unwrap(), Answer::Data(vec![7; 512]), "the connection goes on");
    client.send(command::READ, command::FLAG_DF, 0, len, &[]).unwrap();
    assert!(client.receive_chunks(0, &mut vec![0; len as usize]).is_err());
    let mut simple = Client::open(&fixture.socket(), "disk", false).unwrap();
    let first = simple.read(5 * SHARE_MIN, len / 2).unwrap();
    assert_eq!(first, Answer::Error(error::EIO, String::new()), "in the first piece");
    assert!(simple.read(0, len).is_err());
    fixture.until(|fixture| fixture.stat(|stats| &stats.connections) == 0);
}

/// Goal: the memory of a shard is bounded whatever its clients ask and however little they take.
/// Method: each of some clients asks for much more than the shard may hold, and does not listen: little is read for it beyond what its socket takes. Then they
/// listen, and have all of it.
#[test]
fn deaf_clients_with_large_reads_hold_little() {
    const CLIENTS: u64 = 8;
    let fixture = Fixture::with(NbdConfig { shard_bytes_max: 1 << 20, ..NbdConfig::default() });
    let len = 16 << 20;
    let ask = |number: u64| {
        let mut client = Client::open(&fixture.socket(), "disk", false).unwrap();
        client.stream.write_all(&request(command::READ, 0, number, 0, len)).unwrap();
        client
    };
    let deaf: Vec<_> = (0..CLIENTS).map(ask).collect();
    fixture.until(|fixture| fixture.stat(|stats| &stats.requests) == CLIENTS);
    let read = || fixture.on_shard(|state| state.disk.read_bytes.get());
    let mut before = 0;
    fixture.until(|_| {
        std::thread::sleep(Duration::from_millis(200));
        std::mem::replace(&mut before, read()) == before
    });
    // A socket has at most the megabyte that is asked for, which the system may double.
    let most = (1 << 20) + CLIENTS * (SHARE_MIN + (2 << 20));
    assert!(before <= most, "{before} bytes are held or sent, at most {most} were expected");
    let mut other = Client::open(&fixture.socket(), "disk", false).unwrap();
    assert_eq!(other.write(0, &[0; 512]).unwrap(), Answer::Ok, "small requests go on");
    for mut client in deaf {
        let (_, answer) = client.receive(|_| Some(len)).unwrap();
        assert!(matches!(answer, Answer::Data(data) if data.len() == len as usize));
    }
}

/// Goal: a drain answers what was taken in to its end, also when most of the answer was not read yet.
#[test]
fn a_drain_ends_an_answer_that_has_begun() {
    let fixture = crowded();
    let mut client = Client::open(&fixture.socket(), "disk", false).unwrap();
    let len = 32 << 20;
    client.stream.write_all(&request(command::READ, 0, 1, 0, len)).unwrap();
    fixture.until(|fixture| fixture.on_shard(|state| state.disk.read_bytes.get()) > 0);
    let shard = std::sync::Arc::clone(&fixture.shard);
    let drain = fixture.runtime.spawn(async move { shard.drain(Duration::from_secs(600)).await });
    fixture.until(|fixture| {
        let mut late = Client::greet(&fixture.socket()).unwrap();
        late.option(option::GO, &info("disk", &[])).unwrap()[0].0 == reply::ERR_SHUTDOWN
    });
    let (_, answer) = client.receive(|_| Some(len)).unwrap();
    assert!(matches!(answer, Answer::Data(data) if data.len() == len as usize));
    assert!(client.hears_the_end());
    assert_eq!(fixture.runtime.block_on(drain).unwrap(), Ok(0));
}

/// Goal: a client that goes, or is cut off, in the middle of a request in pieces leaves nothing behind.
#[test]
fn a_client_that_goes_in_the_middle_of_its_pieces_gives_its_room_back() {
    let fixture = Fixture::with(NbdConfig { shard_bytes_max: 2 * SHARE_MIN, ..NbdConfig::default() });
    let len = 16 << 20;
    fixture.on_shard(|state| state.disk.fails_at.set(20 * SHARE_MIN));
    assert!(Client::open(&fixture.socket(), "disk", false).unwrap().read(0, len).is_err());
    fixture.on_shard(|state| state.disk.fails_at.set(u64::MAX));
    for round in 0..6 {
        let mut client = Client::open(&fixture.socket(), "disk", round % 2 == 0).unwrap();
        if round % 3 == 0 {
            let half = vec![1; len as usize / 2];
            client.stream.write_all(&request(command::WRITE, 0, 1, 0, len)).unwrap();
            client.stream.write_all(&half).unwrap();
        } else {
            client.stream.write_all(&request(command::READ, 0, 1, 0, len)).unwrap();
        }
        drop(client);
    }
    fixture.until(|fixture| fixture.stat(|stats| &stats.connections) == 0);
    assert_eq!(fixture.on_shard(|state| state.disk.running.get()), 0);
    // All of the room is there: so much is let in as a whole, in one chunk.
    let mut client = Client::open(&fixture.socket(), "disk", true).unwrap();
    client.send(command::READ, 0, SIZE / 2, 2 * SHARE_MIN as u32, &[]).unwrap();
    let mut found = vec![1; 2 * SHARE_MIN as usize];
    let (chunks, answer) = client.receive_chunks(SIZE / 2, &mut found).unwrap();
    assert_eq!((chunks, answer), (1, Answer::Ok));
    assert!(found.iter().all(|byte| *byte == 0));
}
