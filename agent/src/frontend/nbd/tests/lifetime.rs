//! How connections end, and what bounds them.

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::super::NbdConfig;
use super::super::wire::{command, error, option, reply};
use super::client::{Answer, Client, info, request};
use super::fixture::{Fixture, SIZE};

#[test]
fn half_open_connections_are_dropped() {
    let fixture = Fixture::with(NbdConfig { handshake_timeout: Duration::from_millis(200), ..NbdConfig::default() });
    // Silent; greeted and silent; inside an option; waiting for a directory that does not answer.
    fixture.stuck.store(true, Ordering::Relaxed);
    let flags = 3_u32.to_be_bytes();
    let go = [&b"IHAVEOPT\0\0\0\x07\0\0\0\x0a"[..], &info("disk", &[])].concat();
    for said in [vec![], flags.to_vec(), [&flags[..], &go[..20]].concat(), [&flags[..], &go].concat()] {
        let mut stream = UnixStream::connect(fixture.socket()).unwrap();
        let mut heard = vec![];
        // Ends because the server closes, also when that comes before we have said all.
        let ended = stream.write_all(&said).and_then(|()| stream.read_to_end(&mut heard));
        if let Err(error) = ended {
            assert!(matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{error}");
        }
        assert!(heard.len() <= 18, "the greeting at most");
    }
    fixture.until(|fixture| fixture.server.connections() == 0);
}

#[test]
fn served_connections_have_all_the_time_that_they_want() {
    let timeout = Duration::from_secs(2);
    let fixture = Fixture::with(NbdConfig { handshake_timeout: timeout, ..NbdConfig::default() });
    let mut client = Client::open(&fixture.socket(), "disk", true).unwrap();
    std::thread::sleep(timeout + Duration::from_millis(500));
    assert_eq!(client.read(0, 512).unwrap(), Answer::Data(vec![0; 512]));
}

#[test]
fn connections_are_bounded_and_seats_come_back() {
    let fixture = Fixture::with(NbdConfig { connections_max: 3, ..NbdConfig::default() });
    let mut clients: Vec<_> = (0..3).map(|_| Client::open(&fixture.socket(), "disk", false).unwrap()).collect();
    assert_eq!(fixture.server.connections(), 3);
    fixture.until(|fixture| fixture.stat(|stats| &stats.connections) == 3);
    for _ in 0..5 {
        let mut refused = UnixStream::connect(fixture.socket()).unwrap();
        let mut rest = vec![];
        assert!(!matches!(refused.read_to_end(&mut rest), Ok(1..)), "closed without a word");
    }
    drop(clients.pop());
    fixture.until(|fixture| fixture.server.connections() == 2);
    clients.push(Client::open(&fixture.socket(), "disk", false).unwrap());
    for client in &mut clients {
        assert_eq!(client.read(0, 512).unwrap(), Answer::Data(vec![0; 512]));
    }
    assert_eq!(fixture.stat(|stats| &stats.connections_total), 4);
}

/// Goal: a client can neither fill the memory nor the engine by not waiting for answers.
#[test]
fn what_is_in_flight_is_bounded() {
    for (requests_max, bytes_max, len) in [(16, 1 << 30, 4096), (1000, 64 << 10, 16 << 10), (1000, 1, 4096)] {
        let config =
            NbdConfig { inflight_requests_max: requests_max, inflight_bytes_max: bytes_max, ..NbdConfig::default() };
        let fixture = Fixture::with(config);
        let client = Client::open(&fixture.socket(), "disk", false).unwrap();
        fixture.on_shard(|state| state.disk.paused.set(true));
        let mut sender = client.stream.try_clone().unwrap();
        let sending = std::thread::spawn(move || {
            for cookie in 0..200 {
                sender.write_all(&request(command::READ, 0, cookie, 0, len)).unwrap();
            }
        });
        let bound = u64::from(requests_max).min((bytes_max / u64::from(len)).max(1)) as u32;
        fixture.until(|fixture| fixture.stat(|stats| &stats.throttled) > 0);
        assert_eq!(fixture.on_shard(|state| state.disk.running.get()), bound);
        fixture.on_shard(|state| state.disk.resume());
        sending.join().unwrap();
        let mut receiver = client;
        for _ in 0..200 {
            let (_, answer) = receiver.receive(|_| Some(len)).unwrap();
            assert!(matches!(answer, Answer::Data(data) if data.len() == len as usize));
        }
        assert_eq!(fixture.on_shard(|state| state.disk.running_max.get()), bound);
    }
}

/// Goal: all clients of a shard together cannot fill its memory either, and small requests go on beside those that try.
#[test]
fn what_is_in_flight_on_a_shard_is_bounded() {
    let fixture = Fixture::with(NbdConfig { shard_bytes_max: 4 << 20, ..NbdConfig::default() });
    fixture.on_shard(|state| state.disk.paused.set(true));
    let ask = |count: u64, len: u32| {
        let mut client = Client::open(&fixture.socket(), "disk", false).unwrap();
        (0..count).for_each(|cookie| client.stream.write_all(&request(command::READ, 0, cookie, 0, len)).unwrap());
        client
    };
    let running =
        |wanted: u32| fixture.until(|fixture| fixture.on_shard(move |state| state.disk.running.get()) == wanted);
    let throttled = |wanted: u64| fixture.until(|fixture| fixture.stat(|stats| &stats.throttled) == wanted);
    // Two of 1 MiB leave 2 MiB free, and a third would hold more than what it leaves.
    let greedy = ask(4, 1 << 20);
    throttled(1);
    running(2);
    // Of the 2 MiB one is taken; two would be more than the 1 MiB that is left then.
    let second = ask(4, 1 << 20);
    throttled(2);
    running(3);
    // 128 KiB are let in whatever the others hold.
    let small = ask(32, 4096);
    running(3 + 32);
    fixture.on_shard(|state| state.disk.resume());
    for (mut client, count, len) in [(greedy, 4, 1 << 20), (second, 4, 1 << 20), (small, 32, 4096)] {
        for _ in 0..count {
            let (_, answer) = client.receive(|_| Some(len)).unwrap();
            assert!(matches!(answer, Answer::Data(data) if data.len() == len as usize));
        }
    }
}

/// Goal: a client that asks and never listens holds what it may hold, and nobody else up.
#[test]
fn a_client_that_does_not_take_its_answers_stops_only_itself() {
    let fixture = Fixture::new();
    let deaf = Client::open(&fixture.socket(), "disk", false).unwrap();
    let mut sender = deaf.stream.try_clone().unwrap();
    sender.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    // Until the server takes no more.
    while sender.write_all(&request(command::READ, 0, 1, 0, 1 << 20)).is_ok() {}
    fixture.until(|fixture| fixture.on_shard(|state| state.disk.running.get()) == 0);
    let mut other = Client::open(&fixture.socket(), "disk", false).unwrap();
    assert_eq!(other.write(0, &[1; 512]).unwrap(), Answer::Ok);
    // And a drain does not wait for it for ever.
    let cut = fixture.runtime.block_on(fixture.shard.drain(Duration::from_millis(100))).unwrap();
    assert_eq!(cut, 1);
    assert_eq!(fixture.stat(|stats| &stats.connections), 0);
}

#[test]
fn a_drain_answers_what_was_taken_in_and_then_closes() {
    let fixture = Fixture::new();
    let mut client = Client::open(&fixture.socket(), "disk", true).unwrap();
    fixture.on_shard(|state| state.disk.paused.set(true));
    for at in 0..10 {
        client.send(command::WRITE, 0, at * 4096, 4096, &[7; 4096]).unwrap();
    }
    fixture.until(|fixture| fixture.on_shard(|state| state.disk.running.get()) == 10);
    let shard = std::sync::Arc::clone(&fixture.shard);
    let drain = fixture.runtime.spawn(async move { shard.drain(Duration::from_secs(600)).await });
    // While it drains nobody gets in.
    fixture.until(|fixture| {
        let mut late = Client::greet(&fixture.socket()).unwrap();
        late.option(option::GO, &info("disk", &[])).unwrap()[0].0 == reply::ERR_SHUTDOWN
    });
    fixture.on_shard(|state| state.disk.resume());
    for _ in 0..10 {
        assert_eq!(client.receive(|_| None).unwrap().1, Answer::Ok);
    }
    assert!(client.hears_the_end());
    assert_eq!(fixture.runtime.block_on(drain).unwrap(), Ok(0));
    let written = fixture.on_shard(|state| state.disk.bytes.borrow()[..40960].iter().all(|&byte| byte == 7));
    assert!(written);
    assert_eq!(fixture.runtime.block_on(fixture.shard.stop()), Ok(()));
    let mut late = Client::greet(&fixture.socket()).unwrap();
    assert_eq!(late.option(option::GO, &info("disk", &[])).unwrap()[0].0, reply::ERR_SHUTDOWN);
}

#[test]
fn disc_is_followed_by_the_answers_that_are_owed() {
    let fixture = Fixture::new();
    let mut client = Client::open(&fixture.socket(), "disk", false).unwrap();
    fixture.on_shard(|state| state.disk.paused.set(true));
    client.send(command::WRITE, 0, 0, 512, &[3; 512]).unwrap();
    client.send(command::DISC, 0, 0, 0, &[]).unwrap();
    client.send(command::WRITE, 0, 0, 512, &[4; 512]).unwrap(); // behind the end: never looked at
    fixture.until(|fixture| fixture.on_shard(|state| state.disk.running.get()) == 1);
    fixture.on_shard(|state| state.disk.resume());
    assert_eq!(client.receive(|_| None).unwrap(), (1, Answer::Ok));
    assert!(client.hears_the_end());
    assert_eq!(fixture.on_shard(|state| state.disk.bytes.borrow()[0]), 3);
}

/// Goal: after a forced revert not one more write of the old client comes in.
#[test]
fn the_engine_can_have_a_client_gone() {
    let fixture = Fixture::new();
    let mut client = Client::open(&fixture.socket(), "disk", true).unwrap();
    fixture.on_shard(|state| state.disk.paused.set(true));
    client.send(command::WRITE, 0, 0, 512, &[1; 512]).unwrap();
    fixture.until(|fixture| fixture.on_shard(|state| state.disk.running.get()) == 1);
    fixture.on_shard(|state| {
        state.disk.disconnect.take().into_iter().for_each(|disconnect| disconnect());
        state.disk.running.get()
    });
    // It hears at once that it is gone; its seat is free only when its last request has left the engine.
    let mut rest = vec![];
    assert!(!matches!(client.stream.read_to_end(&mut rest), Ok(1..)));
    assert!(client.send(command::WRITE, 0, 512, 512, &[2; 512]).is_err());
    assert_eq!(fixture.stat(|stats| &stats.connections), 1);
    fixture.on_shard(|state| state.disk.resume());
    fixture.until(|fixture| fixture.stat(|stats| &stats.connections) == 0);
    // A client that was let in and not yet served is gone as well.
    let mut client = Client::open(&fixture.socket(), "disk", true).unwrap();
    fixture.on_shard(|state| state.disk.disconnect.take().into_iter().for_each(|disconnect| disconnect()));
    let mut rest = vec![];
    assert!(!matches!(client.stream.read_to_end(&mut rest), Ok(1..)));
}

#[test]
fn a_client_that_dies_in_the_middle_leaves_nothing_behind() {
    let fixture = Fixture::new();
    for round in 0..20_u64 {
        let mut client = Client::open(&fixture.socket(), "disk", round % 2 == 0).unwrap();
        for at in 0..round {
            client.send(command::WRITE, 0, at * 65536, 65536, &vec![1; 65536]).unwrap();
            client.send(command::READ, 0, at * 65536, 65536, &[]).unwrap();
        }
        drop(client);
    }
    fixture.until(|fixture| fixture.stat(|stats| &stats.connections) == 0 && fixture.server.connections() == 0);
    assert_eq!(fixture.on_shard(|state| state.disk.running.get()), 0);
    let mut client = Client::open(&fixture.socket(), "disk", false).unwrap();
    assert_eq!(client.read(SIZE, 512).unwrap(), Answer::Error(error::EINVAL, String::new()));
}
