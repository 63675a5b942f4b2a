//! A verifying load: several connections, each with many requests in flight, that note every ack and check every read.
//!
//! When a connection breaks, its writes without an answer stay unacked, and it connects again until it is told to stop.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::nbd::{
    self, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, Client, FLAG_FUA, NbdError, Receiver, Request,
    Sender,
};
use crate::oracle::{OpId, Oracle};
use crate::{Rng, now_ns};

/// What the load does.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Connections.
    pub connections: usize,
    /// Requests in flight on each.
    pub depth: usize,
    /// Bytes of the volume that it touches.
    pub region: Range<u64>,
    /// Sizes of writes and reads in bytes, picked evenly.
    pub sizes: Vec<u64>,
    /// Of 100 requests, how many write zeroes.
    pub zeroes_percent: u64,
    /// Of 100 requests, how many discard; they count as writes.
    pub trims_percent: u64,
    /// Of 100 requests, how many read.
    pub reads_percent: u64,
    /// Of 100 writes, how many carry FUA.
    pub fua_percent: u64,
    /// Of 100 requests, how many flush.
    pub flush_percent: u64,
    /// Writes of all connections together before it ends by itself.
    pub writes_max: u64,
    /// An error answer fails the test.
    pub errors_fail: bool,
    /// Seed.
    pub seed: u64,
}

impl Plan {
    /// A mix of everything on the whole of a volume of `size` bytes, without end.
    pub fn mixed(size: u64, seed: u64) -> Self {
        Self {
            connections: 4,
            depth: 16,
            region: 0..size,
            sizes: vec![512, 1536, 4096, 4096, 4096, 8192, 16384, 65536, 262_144],
            zeroes_percent: 5,
            trims_percent: 0,
            reads_percent: 10,
            fua_percent: 2,
            flush_percent: 1,
            writes_max: u64::MAX,
            errors_fail: true,
            seed,
        }
    }
}

/// A running load.
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    oracle: Arc<Mutex<Oracle>>,
    socket: PathBuf,
    export: String,
    plan: Plan,
    stop: AtomicBool,
    acked: AtomicU64,
    acked_bytes: AtomicU64,
    begun: AtomicU64,
    connects: AtomicU64,
    longest_wait_ns: AtomicU64,
    failure: Mutex<Option<String>>,
}

#[derive(Debug)]
enum Pending {
    Write { op: OpId, len: u64, fua: bool },
    Read { offset: u64, submit: u64 },
    Flush { submit: u64 },
}

#[derive(Debug, Default)]
struct InFlight {
    /// By cookie, with when it was sent.
    pending: HashMap<u64, (Instant, Pending)>,
    broken: bool,
}

impl Load {
    /// Starts it on `export`.
    pub fn start(oracle: &Arc<Mutex<Oracle>>, socket: &Path, export: &str, plan: Plan) -> Self {
        let connections = plan.connections;
        let shared = Arc::new(Shared {
            oracle: Arc::clone(oracle),
            socket: socket.to_owned(),
            export: export.to_owned(),
            plan,
            stop: AtomicBool::new(false),
            acked: AtomicU64::new(0),
            acked_bytes: AtomicU64::new(0),
            begun: AtomicU64::new(0),
            connects: AtomicU64::new(0),
            longest_wait_ns: AtomicU64::new(0),
            failure: Mutex::new(None),
        });
        let threads = (0..connections)
            .map(|number| {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || shared.run(number))
            })
            .collect();
        Self { shared, threads }
    }

    /// Writes acked so far.
    pub fn acked(&self) -> u64 {
        self.shared.acked.load(Ordering::Relaxed)
    }

    /// Waits until `more` further writes are acked, or the load has failed or ended.
    pub fn wait_for(&self, more: u64) {
        let goal = self.acked() + more;
        let begun = Instant::now();
        while self.acked() < goal && !self.threads.iter().all(JoinHandle::is_finished) {
            assert!(
                begun.elapsed() < 2 * nbd::HANG,
                "{} of {goal} writes acked in {:?}",
                self.acked(),
                begun.elapsed()
            );
            if lock(&self.shared.failure).is_some() {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.assert_sound();
    }

    /// Panics with the first failure, if there is one.
    pub fn assert_sound(&self) {
        if let Some(failure) = lock(&self.shared.failure).as_ref() {
            panic!("the load failed: {failure}");
        }
    }

    /// Waits until the load has ended by itself; returns acked writes and their bytes.
    pub fn finish(mut self) -> (u64, u64) {
        for thread in self.threads.drain(..) {
            thread.join().expect("a connection's thread ends");
        }
        self.assert_sound();
        (self.acked(), self.shared.acked_bytes.load(Ordering::Relaxed))
    }

    /// Stops sending, takes what is in flight, and ends; returns acked writes and their bytes.
    pub fn stop(self) -> (u64, u64) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.finish()
    }

    /// The same, as a guest that must not notice anything but a pause: no request waited longer than `bound` for its answer, and no connection
    /// was lost. Prints the longest wait.
    pub fn stop_within(self, bound: Duration) {
        let shared = Arc::clone(&self.shared);
        self.stop();
        let longest = Duration::from_nanos(shared.longest_wait_ns.load(Ordering::Relaxed));
        let connects = shared.connects.load(Ordering::Relaxed);
        println!("the longest wait of a request: {longest:?}, at most {bound:?} is right");
        assert!(longest <= bound, "a request waited {longest:?}, longer than {bound:?}");
        assert!(connects <= shared.plan.connections as u64, "{connects} connections were made: some were lost");
    }

    /// How often a connection was made, the first ones too.
    pub fn connects(&self) -> u64 {
        self.shared.connects.load(Ordering::Relaxed)
    }
}

impl Shared {
    fn run(self: Arc<Self>, number: usize) {
        let mut rng = Rng::new(self.plan.seed.wrapping_mul(31).wrapping_add(number as u64));
        while !self.done() {
            match Client::connect(&self.socket, &self.export) {
                Ok(client) => {
                    self.connects.fetch_add(1, Ordering::Relaxed);
                    self.drive(client, &mut rng);
                }
                // The agent is being killed and started again.
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    fn done(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
            || self.begun.load(Ordering::Relaxed) >= self.plan.writes_max
            || lock(&self.failure).is_some()
    }

    fn fail(&self, failure: String) {
        lock(&self.failure).get_or_insert(failure);
    }

    /// Runs one connection until it breaks or the load is done.
    fn drive(self: &Arc<Self>, client: Client, rng: &mut Rng) {
        let (mut sender, receiver) = client.split();
        let in_flight = Arc::new((Mutex::new(InFlight::default()), Condvar::new()));
        let taker = {
            let (shared, in_flight) = (Arc::clone(self), Arc::clone(&in_flight));
            std::thread::spawn(move || shared.take(receiver, &in_flight))
        };
        while !self.done() {
            let (state, changed) = &*in_flight;
            let mut state = lock(state);
            while !state.broken && state.pending.len() >= self.plan.depth {
                state = changed.wait(state).expect("no panic under this lock");
            }
            if state.broken {
                break;
            }
            let (request, data, pending) = self.next(rng);
            state.pending.insert(sender.next_cookie(), (Instant::now(), pending));
            drop(state);
            if sender.send(request, &data).is_err() {
                break;
            }
        }
        let (state, changed) = &*in_flight;
        let mut state = lock(state);
        while !state.broken && !state.pending.is_empty() {
            state = changed.wait(state).expect("no panic under this lock");
        }
        drop(state);
        good_bye(&mut sender);
        taker.join().expect("the receiving thread ends");
    }

    /// The next request: noted before it is sent.
    fn next(&self, rng: &mut Rng) -> (Request, Vec<u8>, Pending) {
        let plan = &self.plan;
        let kind = rng.below(100);
        if kind < plan.flush_percent {
            return (
                Request { command: CMD_FLUSH, flags: 0, offset: 0, len: 0 },
                Vec::new(),
                Pending::Flush { submit: now_ns() },
            );
        }
        let (offset, len) = self.place(rng);
        let wire_len = u32::try_from(len).expect("a request of less than 4 GiB");
        if kind < plan.flush_percent + plan.reads_percent {
            let request = Request { command: CMD_READ, flags: 0, offset, len: wire_len };
            return (request, Vec::new(), Pending::Read { offset, submit: now_ns() });
        }
        self.begun.fetch_add(1, Ordering::Relaxed);
        let trims_from = plan.flush_percent + plan.reads_percent + plan.zeroes_percent;
        if (trims_from..trims_from + plan.trims_percent).contains(&kind) {
            let op = lock(&self.oracle).begin_discard(offset, len);
            let request = Request { command: CMD_TRIM, flags: 0, offset, len: wire_len };
            return (request, Vec::new(), Pending::Write { op, len, fua: false });
        }
        let fua = rng.percent(plan.fua_percent);
        let flags = if fua { FLAG_FUA } else { 0 };
        if kind < plan.flush_percent + plan.reads_percent + plan.zeroes_percent {
            let op = lock(&self.oracle).begin_zeroes(offset, len);
            let request = Request { command: CMD_WRITE_ZEROES, flags, offset, len: wire_len };
            return (request, Vec::new(), Pending::Write { op, len, fua });
        }
        let mut oracle = lock(&self.oracle);
        let op = oracle.begin_write(offset, len);
        let data = oracle.data(op);
        drop(oracle);
        (Request { command: CMD_WRITE, flags, offset, len: wire_len }, data, Pending::Write { op, len, fua })
    }

    /// Half of all requests go to a sixteenth of the region, so that blocks are overwritten; small ones fall between blocks.
    fn place(&self, rng: &mut Rng) -> (u64, u64) {
        let plan = &self.plan;
        let whole = plan.region.end - plan.region.start;
        let len = rng.pick(&plan.sizes).min(whole);
        let span = if rng.percent(50) { (whole / 16).max(len) } else { whole };
        let align = if len.is_multiple_of(4096) && rng.percent(75) { 4096 } else { 512 };
        let offset = plan.region.start + rng.below((span - len) / align + 1) * align;
        (offset, len)
    }

    /// Takes replies until the connection ends.
    fn take(&self, mut receiver: Receiver, in_flight: &(Mutex<InFlight>, Condvar)) {
        let (state, changed) = in_flight;
        loop {
            let reply = match receiver.receive() {
                Ok(reply) => reply,
                Err(NbdError::Io(e)) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    self.fail(format!("no reply within {:?}: {:?}", nbd::HANG, lock(state).pending));
                    break;
                }
                // Killed, or told to go: the connection's other half decides what is next.
                Err(_) => break,
            };
            let Some((sent, pending)) = lock(state).pending.remove(&reply.cookie) else {
                self.fail(format!("a reply to the unknown request {}", reply.cookie));
                break;
            };
            self.waited(sent);
            match (pending, reply.error) {
                (Pending::Write { op, len, fua }, 0) => {
                    let mut oracle = lock(&self.oracle);
                    if fua {
                        oracle.ack_durable(op)
                    } else {
                        oracle.ack(op)
                    }
                    drop(oracle);
                    self.acked.fetch_add(1, Ordering::Relaxed);
                    self.acked_bytes.fetch_add(len, Ordering::Relaxed);
                }
                (Pending::Read { offset, submit }, 0) => {
                    let checked = lock(&self.oracle).check(offset, &reply.data, submit, now_ns());
                    if let Err(wrong) = checked {
                        self.fail(wrong);
                    }
                }
                (Pending::Flush { submit }, 0) => lock(&self.oracle).flushed(submit),
                (pending, error) => {
                    if self.plan.errors_fail {
                        self.fail(format!("{pending:?} was answered with errno {error}: {}", reply.message));
                    }
                    if let Pending::Write { op, .. } = pending {
                        lock(&self.oracle).fail(op);
                    }
                }
            }
            changed.notify_one();
        }
        let mut state = lock(state);
        state.broken = true;
        // What never got an answer has waited, too.
        state.pending.values().for_each(|(sent, _)| self.waited(*sent));
        drop(state);
        changed.notify_one();
    }

    fn waited(&self, sent: Instant) {
        let ns = u64::try_from(sent.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.longest_wait_ns.fetch_max(ns, Ordering::Relaxed);
    }
}

fn good_bye(sender: &mut Sender) {
    // The other end may be gone already; there is nobody left to tell.
    let _ = sender.send(Request { command: nbd::CMD_DISC, flags: 0, offset: 0, len: 0 }, &[]);
    sender.hang_up();
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere has failed the test already; the state is still worth reading.
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
