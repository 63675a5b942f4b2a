//! Guests made quiet for a moment, through the QEMU guest agent: freeze the file systems, take an instant, thaw.
//!
//! Between freeze and thaw there is nothing but one look at the clock; the marker is written afterwards, under the instant that was taken. Invariants:
//! * Once a freeze was sent, a thaw is sent, whatever comes: an error, a guest that does not answer, a caller who has gone.
//! * It is sent at the latest when the bound on the frozen time has passed, or the agent is told to stop; and the agent waits for it ([`Quiesces::stop`])
//!   while it still serves the guest's disk: a guest that is not thawed then stays frozen until an agent starts again.
//! * That a guest may be frozen is on record before it is, and until it is thawed: an agent that starts after a crash thaws it.
//! * The instant counts only if each guest said that it froze something before, and that it thawed something after it: file systems that somebody else
//!   thawed in between were not frozen at the instant.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cdp_journal::{Error, Result};
use cdp_proto::v1::EventKind;
use futures::future::join_all;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::events::EventHub;
use crate::state::StateDir;

/// What is sent before, and comes back before the answer of, a synchronisation: no JSON has this byte.
const DELIMITER: u8 = 0xFF;
/// Longest answer that is read; more comes from something that is no guest agent.
const ANSWER_BYTES_MAX: usize = 64 << 10;
/// Longest wait for a connection and its synchronisation, when nothing is frozen yet.
const GREET_PATIENCE: Duration = Duration::from_secs(3);
/// Longest wait for the answer to a thaw, before it is sent anew.
const THAW_PATIENCE: Duration = Duration::from_secs(2);
/// How often a thaw is tried before the caller is told that it failed; it is tried on behind that.
const THAW_TRIES: u32 = 4;
const THAW_TRIES_BEHIND: u32 = 600;
const THAW_PAUSE: Duration = Duration::from_secs(1);

/// The quiescing that is under way, for the agent's stop to end and to wait for.
#[derive(Debug, Default)]
pub struct Quiesces {
    stopping: watch::Sender<bool>,
    /// Guests that may be frozen by this agent, those included that are still tried to be thawed.
    open: watch::Sender<usize>,
}

impl Quiesces {
    /// Ends the wait of all calls that hold guests frozen, lets none begin, and waits until all guests are thawed. `false`: some are not in `patience`;
    /// they are on record for the next start.
    ///
    /// Called while the guests' disks are served still: a guest in the middle of its freeze writes what it has first, and takes the thaw afterwards.
    pub async fn stop(&self, patience: Duration) -> bool {
        self.stopping.send_replace(true);
        let mut open = self.open.subscribe();
        if *open.borrow() > 0 {
            tracing::info!("stopping: guests are being thawed");
        }
        timeout(patience, open.wait_for(|open| *open == 0)).await.is_ok()
    }

    fn stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    fn open(self: &Arc<Self>) -> Open {
        self.open.send_modify(|open| *open += 1);
        Open(Arc::clone(self))
    }
}

/// A guest that may be frozen; dropped when it is thawed, or given up.
struct Open(Arc<Quiesces>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.send_modify(|open| *open -= 1);
    }
}

/// How long guests may be frozen.
struct Limit {
    deadline: Instant,
    stopping: watch::Receiver<bool>,
}

/// Why a wait ended early.
enum Over {
    Time,
    Stopping,
}

impl Limit {
    async fn hold<T>(&self, work: impl Future<Output = T>) -> std::result::Result<T, Over> {
        let mut stopping = self.stopping.clone();
        tokio::select! {
            biased;
            _ = stopping.wait_for(|stopping| *stopping) => Err(Over::Stopping),
            ended = timeout_at(self.deadline, work) => ended.map_err(|_| Over::Time),
        }
    }
}

/// A connection to a guest agent.
struct Guest {
    path: PathBuf,
    stream: UnixStream,
    /// Received and not looked at.
    received: Vec<u8>,
}

fn told_to_stop(words: &str) -> Error {
    Error::Gone(format!("the agent is stopping: {words}"))
}

impl Guest {
    /// Connects, and throws away whatever a client before left behind.
    async fn greet(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path).await?;
        let mut guest = Self { path: path.to_owned(), stream, received: Vec::new() };
        guest.synchronise().await?;
        Ok(guest)
    }

    async fn synchronise(&mut self) -> io::Result<()> {
        let id = u64::from(rand::random::<u32>());
        self.stream.write_all(&[DELIMITER]).await?;
        self.send(&format!(r#"{{"execute":"guest-sync-delimited","arguments":{{"id":{id}}}}}"#)).await?;
        let mut skipped = 0;
        loop {
            let line = self.line().await?;
            skipped += line.len();
            // Only what follows the delimiter is the answer; all else is old.
            let answer = line.iter().rposition(|byte| *byte == DELIMITER).map(|at| &line[at + 1..]);
            let found = answer.and_then(|answer| serde_json::from_slice::<Value>(answer).ok());
            if found.is_some_and(|answer| answer["return"] == id) {
                return Ok(());
            }
            if skipped > 16 * ANSWER_BYTES_MAX {
                return Err(broken("it sends answers to questions that nobody asked"));
            }
        }
    }

    async fn send(&mut self, command: &str) -> io::Result<()> {
        self.stream.write_all(command.as_bytes()).await?;
        self.stream.write_all(b"\n").await
    }

    /// The next line, without its end.
    async fn line(&mut self) -> io::Result<Vec<u8>> {
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = self.received.drain(..=end).collect();
                line.pop();
                return Ok(line);
            }
            if self.received.len() > ANSWER_BYTES_MAX {
                return Err(broken("its answer has no end"));
            }
            let mut buf = [0; 4096];
            match self.stream.read(&mut buf).await? {
                0 => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it hung up")),
                n => self.received.extend_from_slice(&buf[..n]),
            }
        }
    }

    /// Sends a command that answers how many file systems it concerned.
    async fn count(&mut self, command: &str) -> io::Result<u64> {
        self.send(&format!(r#"{{"execute":"{command}"}}"#)).await?;
        let line = self.line().await?;
        let answer: Value = serde_json::from_slice(&line).map_err(|_| broken("its answer is no JSON"))?;
        if let Some(error) = answer.get("error") {
            let words = error["desc"].as_str().unwrap_or("an error without words");
            return Err(io::Error::other(words.chars().take(200).collect::<String>()));
        }
        answer["return"].as_u64().ok_or_else(|| broken("its answer is no number"))
    }
}

fn broken(words: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, words)
}

fn failed(path: &Path, what: &str, why: impl std::fmt::Display) -> Error {
    Error::State(format!("guest agent {}: {what}: {why}", path.display()))
}

/// Runs `inside` while all guests are frozen; answers what it gave and how long the guests were frozen.
///
/// # Errors
/// When a guest cannot be reached, frozen or thawed, when `inside` took longer than `bound`, or when the agent is told to stop. Then nothing may be said
/// of the guests' state at any instant in between.
pub async fn while_frozen<T>(
    paths: &[PathBuf],
    bound: Duration,
    quiesces: &Arc<Quiesces>,
    events: &Arc<EventHub>,
    state: &Arc<StateDir>,
    inside: impl Future<Output = Result<T>>,
) -> Result<(T, Duration)> {
    let greeted = join_all(paths.iter().map(|path| async move {
        match timeout(GREET_PATIENCE, Guest::greet(path)).await {
            Ok(Ok(guest)) => Ok(guest),
            Ok(Err(error)) => Err(failed(path, "synchronise", error)),
            Err(_) => Err(failed(path, "synchronise", format!("no answer within {GREET_PATIENCE:?}"))),
        }
    }));
    let guests: Vec<Guest> = greeted.await.into_iter().collect::<Result<_>>()?;
    // Counted before the look: a stop that is not seen here waits for us.
    let open: Vec<Open> = guests.iter().map(|_| quiesces.open()).collect();
    if quiesces.stopping() {
        return Err(told_to_stop("no guest was frozen"));
    }
    state.note_frozen(paths).await.map_err(|error| Error::device("write", "the list of frozen guests", &error))?;
    // From here on a thaw follows.
    let began = Instant::now();
    let limit = Limit { deadline: began + bound, stopping: quiesces.stopping.subscribe() };
    let frozen = join_all(guests.into_iter().map(|guest| freeze(guest, &limit))).await;
    let refused = frozen.iter().find_map(|(_, result)| result.as_ref().err().cloned());
    let inside = match refused {
        Some(error) => Err(error),
        None => match limit.hold(inside).await {
            Ok(result) => result,
            Err(Over::Time) => {
                Err(Error::State(format!("the guests were frozen for {bound:?}, and no instant was taken yet")))
            }
            Err(Over::Stopping) => Err(told_to_stop("no instant was taken")),
        },
    };
    let thawed = frozen.into_iter().zip(open);
    let thawed = thawed.map(|((guest, result), open)| thaw(guest, result.is_ok(), open, events, state));
    let thawed = join_all(thawed).await;
    let spent = began.elapsed();
    // That a guest may be frozen still is what has to be heard, whatever else went wrong.
    thawed.into_iter().collect::<Result<Vec<()>>>()?;
    let inside = inside?;
    Ok((inside, spent))
}

/// Answers the guest in any case, since it has to be thawed.
async fn freeze(mut guest: Guest, limit: &Limit) -> (Guest, Result<()>) {
    let result = match limit.hold(guest.count("guest-fsfreeze-freeze")).await {
        Ok(Ok(0)) => Err(failed(&guest.path, "freeze", "it froze no file system")),
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(failed(&guest.path, "freeze", error)),
        Err(Over::Time) => Err(failed(&guest.path, "freeze", "no answer within the bound on the frozen time")),
        Err(Over::Stopping) => Err(told_to_stop("nothing is marked")),
    };
    (guest, result)
}

/// Thaws a guest. `clean`: its connection has no answer outstanding, so the very next one is that of the thaw.
async fn thaw(mut guest: Guest, clean: bool, open: Open, events: &Arc<EventHub>, state: &Arc<StateDir>) -> Result<()> {
    let path = guest.path.clone();
    let mut why = String::new();
    if clean {
        match timeout(THAW_PATIENCE, guest.count("guest-fsfreeze-thaw")).await {
            Ok(Ok(count)) => {
                state.note_thawed(&path).await;
                return match count {
                    0 => Err(failed(&path, "thaw", "its file systems were not frozen any more")),
                    _ => Ok(()),
                };
            }
            Ok(Err(error)) => why = error.to_string(),
            Err(_) => why = format!("no answer within {THAW_PATIENCE:?}"),
        }
    } else {
        // An answer may still come; the thaw goes out now and is asked for again behind a synchronisation.
        let _ = timeout(THAW_PATIENCE, guest.send(r#"{"execute":"guest-fsfreeze-thaw"}"#)).await;
    }
    // The same connection first, and it ends before another one begins: a guest agent has one client at a time.
    let mut guest = Some(guest);
    for _ in 0..THAW_TRIES {
        match thaw_again(guest.take(), &path).await {
            Ok(()) => {
                state.note_thawed(&path).await;
                // It is thawed now; what it was at the instant nobody knows.
                let late = || failed(&path, "thaw", format!("{why}; it was thawed at another try"));
                return if clean { Err(late()) } else { Ok(()) };
            }
            Err(error) => why = error.to_string(),
        }
        sleep(THAW_PAUSE).await;
    }
    let message = format!("guest agent {}: thaw: {why}; it is tried again every second", path.display());
    events.publish_now(EventKind::ThawFailed, None, None, message);
    let behind = thaw_behind(path.clone(), Arc::clone(events), Arc::clone(state));
    tokio::spawn(async move {
        behind.await;
        drop(open);
    });
    Err(failed(&path, "thaw", format!("{why}; THE GUEST MAY BE FROZEN, thawing is tried on for ten minutes")))
}

/// Thaws the guests that an agent which is gone had frozen, or had been about to.
pub fn thaw_left_behind(guests: Vec<PathBuf>, events: &Arc<EventHub>, state: &Arc<StateDir>) {
    for guest in guests {
        let message = format!("guest agent {}: may be frozen by an agent that is gone: thawing it", guest.display());
        events.publish_now(EventKind::ThawFailed, None, None, message);
        tokio::spawn(thaw_behind(guest, Arc::clone(events), Arc::clone(state)));
    }
}

/// Goes on until a guest is thawed; for ten minutes, then it is left to the next start.
async fn thaw_behind(guest: PathBuf, events: Arc<EventHub>, state: Arc<StateDir>) {
    for _ in 0..THAW_TRIES_BEHIND {
        if thaw_again(None, &guest).await.is_ok() {
            state.note_thawed(&guest).await;
            let message = format!("guest agent {}: thawed at last", guest.display());
            events.publish_now(EventKind::ThawFailed, None, None, message);
            return;
        }
        sleep(THAW_PAUSE).await;
    }
    let message = format!("guest agent {}: given up: its file systems may be frozen", guest.display());
    events.publish_now(EventKind::ThawFailed, None, None, message);
}

/// A thaw on a connection that may hold old answers, or on a new one. That nothing was frozen any more is as good.
async fn thaw_again(guest: Option<Guest>, path: &Path) -> io::Result<()> {
    let work = async {
        let mut guest = match guest {
            Some(mut guest) => {
                guest.synchronise().await?;
                guest
            }
            None => Guest::greet(path).await?,
        };
        guest.count("guest-fsfreeze-thaw").await.map(drop)
    };
    match timeout(THAW_PATIENCE, work).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {THAW_PATIENCE:?}"))),
    }
}

#[cfg(test)]
mod tests;
