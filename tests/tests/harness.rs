//! The harness itself, against a server that is not ours: a test tool that accepts everything proves nothing.

use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use cdp_tests::load::{Load, Plan};
use cdp_tests::nbd::Client;
use cdp_tests::oracle::Oracle;
use cdp_tests::{now_ns, process, seed};

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It ends either way.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn nbdkit(socket: &std::path::Path, args: &[&str]) -> Server {
    let child = Command::new("nbdkit")
        .args(["--foreground", "--unix"])
        .arg(socket)
        .args(args)
        .stdin(Stdio::null())
        .spawn()
        .expect("nbdkit runs (scripts/setup.sh installs it)");
    while Client::connect(socket, "").is_err() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Server(child)
}

#[test]
fn a_sound_server_passes_under_concurrent_load() {
    let dir = process::scratch();
    let socket = dir.path().join("s");
    let _server = nbdkit(&socket, &["memory", "8M"]);
    let seed = seed();
    let oracle = Arc::new(Mutex::new(Oracle::new(seed, 8 << 20)));
    let load = Load::start(&oracle, &socket, "", Plan { writes_max: 3000, ..Plan::mixed(8 << 20, seed) });
    let (acked, _) = load.finish();
    assert!(acked >= 3000);
    let from = now_ns();
    let image = Client::connect_structured(&socket, "").unwrap().read_all().unwrap();
    let mut oracle = oracle.lock().unwrap();
    oracle.settle(&image, from).unwrap();
    let now = now_ns();
    oracle.check_image(&image, now, now).unwrap();
}

#[test]
fn a_server_that_forgets_a_write_is_found_out() {
    let dir = process::scratch();
    let socket = dir.path().join("s");
    let _server = nbdkit(&socket, &["memory", "8M"]);
    let oracle = Arc::new(Mutex::new(Oracle::new(1, 8 << 20)));
    let load = Load::start(&oracle, &socket, "", Plan { writes_max: 500, ..Plan::mixed(8 << 20, 1) });
    load.finish();
    let mut client = Client::connect(&socket, "").unwrap();
    let op = oracle.lock().unwrap().begin_write(1 << 20, 4096);
    let old = client.read(1 << 20, 4096).unwrap();
    oracle.lock().unwrap().ack(op);
    let now = now_ns();
    let wrong = oracle.lock().unwrap().check(1 << 20, &old, now, now).unwrap_err();
    assert!(wrong.contains("8 of 8 sectors are wrong"), "{wrong}");
}
