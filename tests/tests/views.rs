//! Promise: a view shows one instant, whatever goes on beside it; it takes no writes, or takes them onto scratch that is
//! bounded and vanishes; and it is still there after a restart (design I2, part 8).

use cdp_tests::nbd::{Client, NbdError, TRANSMIT_READ_ONLY};
use cdp_tests::process::{Agent, View, exit};
use cdp_tests::{Rng, now_ns};

const EPERM: u32 = 1;
const ENOSPC: u32 = 28;
const SIZE: usize = 8 << 20;

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    Rng::new(seed).fill(&mut out);
    out
}

/// An agent whose volume was written twice all over, an instant in between, and the two images.
fn two_states() -> (Agent, u64, Vec<u8>, Vec<u8>) {
    let agent = Agent::dev("8MiB", "1GiB");
    let (old, new) = (noise(1, SIZE), noise(2, SIZE));
    let mut client = agent.connect("demo");
    let put = |client: &mut Client, image: &[u8]| {
        for (at, piece) in (0..).step_by(1 << 20).zip(image.chunks(1 << 20)) {
            client.write(at, piece).unwrap();
        }
    };
    put(&mut client, &old);
    let between = now_ns();
    put(&mut client, &new);
    client.close();
    (agent, between, old, new)
}

fn image(agent: &Agent, view: &View) -> Vec<u8> {
    agent.connect(&view.id).read_all().unwrap()
}

#[test]
fn a_view_shows_its_instant_while_the_volume_goes_on() {
    let (mut agent, between, old, new) = two_states();
    let view = agent.open_view("demo", between);
    let mut client = agent.connect(&view.id);
    let mut live = agent.connect("demo");
    for round in 0..8_u64 {
        live.write(round << 20, &noise(10 + round, 1 << 20)).unwrap();
        live.write_zeroes(round * 4096, 4096, 0).unwrap();
        live.trim(4 << 20, 1 << 20).unwrap();
        assert!(client.read_all().unwrap() == old, "the view has changed in round {round}");
    }
    let now = agent.info("demo")["now"].as_u64().unwrap();
    let young = agent.open_view("demo", now);
    live.write(0, &noise(99, 4096)).unwrap();
    assert!(image(&agent, &young)[..4096] != noise(99, 4096));
    assert!(image(&agent, &young) != new);
    assert!(image(&agent, &view) == old);
    agent.stop();
}

#[test]
fn a_read_only_view_refuses_every_change() {
    let (mut agent, between, old, _) = two_states();
    let view = agent.open_view("demo", between);
    let mut client = agent.connect(&view.id);
    assert_ne!(client.flags & TRANSMIT_READ_ONLY, 0);
    for answer in [
        client.write(0, &[1; 4096]),
        client.write_fua(0, &[1; 512]),
        client.write_zeroes(0, 4096, 0),
        client.trim(0, 4096),
    ] {
        assert_eq!(answer.unwrap_err().code(), Some(EPERM));
    }
    client.flush().unwrap();
    assert!(client.read_all().unwrap() == old);
    agent.stop();
}

#[test]
fn the_same_instant_is_the_same_view_and_closing_ends_it() {
    let (mut agent, between, old, new) = two_states();
    let first = agent.open_view("demo", between);
    let again = agent.open_view("demo", between);
    assert_eq!(first.id, again.id);
    let other = agent.open_view("demo", now_ns());
    assert_ne!(first.id, other.id);
    let listed = agent.ctl(&["view", "list"]);
    assert_eq!(listed["views"].as_array().unwrap().len(), 2, "{listed}");
    assert!(image(&agent, &first) == old && image(&agent, &other) == new);
    let mut client = agent.connect(&first.id);
    agent.close_view(&first);
    assert!(matches!(client.read(0, 4096), Err(NbdError::Io(_))), "a client of a closed view is disconnected");
    assert!(Client::connect(&agent.socket(), &first.id).is_err(), "a closed view is no export");
    let refusal = agent.ctl_refused(&["view", "close", &first.id], &[&first.id]);
    assert_eq!(refusal.code, Some(exit::NOT_FOUND));
    assert!(image(&agent, &other) == new, "other views stay");
    agent.stop();
}

#[test]
fn a_writable_view_takes_writes_that_touch_nothing_else_and_vanish() {
    let (mut agent, between, old, new) = two_states();
    let plain = agent.open_view("demo", between);
    let scratch = agent.open_scratch("demo", between);
    assert_ne!(plain.id, scratch.id);
    let mut client = agent.connect(&scratch.id);
    assert_eq!(client.flags & TRANSMIT_READ_ONLY, 0);
    let mut expected = old.clone();
    for (offset, len) in [(0, 4096), (512, 512), (4096 + 1024, 1536), (1 << 20, 1 << 20), (SIZE - 512, 512)] {
        let data = noise(offset as u64 + 50, len);
        client.write(offset as u64, &data).unwrap();
        expected[offset..offset + len].copy_from_slice(&data);
    }
    client.write_zeroes(3 << 20, 70_144, 0).unwrap();
    expected[3 << 20..(3 << 20) + 70_144].fill(0);
    client.flush().unwrap();
    assert!(client.read_all().unwrap() == expected);
    assert!(image(&agent, &plain) == old && agent.live_image("demo") == new);
    client.close();
    assert!(image(&agent, &scratch) == expected, "scratch stays while the view is open");
    agent.close_view(&scratch);
    let fresh = agent.open_scratch("demo", between);
    assert!(image(&agent, &fresh) == old, "scratch vanishes with its view");
    agent.stop();
}

/// Goal: views come back under their ids after a stop and after a kill, and show the same bytes.
#[test]
fn read_only_views_are_there_again_after_a_restart() {
    let (mut agent, between, old, _) = two_states();
    let view = agent.open_view("demo", between);
    let closed = agent.open_view("demo", between + 1);
    agent.close_view(&closed);
    for kill in [false, true] {
        if kill {
            agent.kill();
        } else {
            agent.stop();
        }
        agent.start();
        assert!(image(&agent, &view) == old, "kill {kill}");
        assert_eq!(agent.open_view("demo", between).id, view.id);
        let listed = agent.ctl(&["view", "list", "demo"]);
        assert_eq!(listed["views"].as_array().unwrap().len(), 1, "{listed}");
    }
    agent.stop();
}

/// Goal: a writable view's scratch has a bound of its own; at it the view's client gets "no space", nobody else notices.
#[test]
fn scratch_is_bounded() {
    let agent = Agent::dev("2GiB", "1GiB");
    let mut live = agent.connect("demo");
    live.write(0, &noise(3, 4096)).unwrap();
    let view = agent.ctl(&["view", "open", "demo", "--at", "now", "--writable"]);
    let bound = view["scratch_bytes_max"].as_u64().unwrap();
    assert!(bound > 0 && bound < 2 << 30, "this test wants a bound below the volume's size, it is {bound}");
    let mut client = agent.connect(view["id"].as_str().unwrap());
    let data = noise(4, 4 << 20);
    let mut refused = None;
    let mut offset = 0;
    while offset + data.len() as u64 <= client.size {
        match client.write(offset, &data) {
            Ok(()) => offset += data.len() as u64,
            Err(error) => {
                refused = error.code();
                break;
            }
        }
    }
    assert_eq!(refused, Some(ENOSPC), "after {offset} of {bound} bytes");
    assert!(offset <= bound, "{offset} bytes went into a scratch of {bound}");
    assert!(client.read(0, 4 << 20).unwrap() == data, "what was taken is there");
    live.write(4096, &noise(5, 4096)).unwrap();
    assert!(live.read(0, 4096).unwrap() == noise(3, 4096));
}
