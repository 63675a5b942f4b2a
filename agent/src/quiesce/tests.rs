//! A guest agent of our own that misbehaves on request, and what the quiescing makes of it.

use std::sync::Mutex;

use tokio::io::AsyncBufReadExt as _;
use tokio::net::UnixListener;

use super::*;

/// How the guest agent answers.
#[derive(Clone, Copy, Debug, Default)]
struct Habits {
    /// Old answers come before the first synchronisation's.
    stale: bool,
    /// No answer to synchronisations.
    mute: bool,
    /// An answer that is no JSON.
    garbage: bool,
    /// The answer to a freeze never comes, although it froze.
    freeze_silent: bool,
    /// The answer to a freeze takes so long.
    freeze_takes: Duration,
    /// The freeze is refused.
    freeze_refused: bool,
    /// Nothing to freeze.
    freeze_none: bool,
    /// It hangs up after the freeze.
    freeze_hangup: bool,
    /// Somebody else thaws right after the freeze.
    thawed_by_another: bool,
    /// That many thaws are answered with an error first.
    thaw_errors: u32,
    /// A line without an end.
    endless: bool,
}

#[derive(Debug, Default)]
struct Seen {
    frozen: bool,
    freezes: u32,
    thaws: u32,
}

struct Fake {
    path: PathBuf,
    seen: Arc<Mutex<Seen>>,
    state: Arc<StateDir>,
    dir: tempfile::TempDir,
}

impl Fake {
    fn start(habits: Habits) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("qga.sock");
        let listener = UnixListener::bind(&path).expect("listens");
        let seen = Arc::new(Mutex::new(Seen::default()));
        let guest = Arc::clone(&seen);
        tokio::spawn(async move {
            // As a character device of QEMU: one client at a time.
            while let Ok((stream, _)) = listener.accept().await {
                let _ = serve(stream, habits, &guest).await;
            }
        });
        let (state, _) = StateDir::open(&dir.path().join("state")).expect("a state directory");
        Self { path, seen, state, dir }
    }

    async fn ask(&self, bound: Duration) -> Result<(bool, Duration)> {
        let seen = Arc::clone(&self.seen);
        let inside = async move { Ok(seen.lock().expect("whole").frozen) };
        let paths = std::slice::from_ref(&self.path);
        while_frozen(paths, bound, &Arc::default(), &Arc::default(), &self.state, inside).await
    }

    fn assert_thawed(&self) {
        let seen = self.seen.lock().expect("whole");
        assert!(!seen.frozen && seen.thaws >= 1, "{seen:?}");
        drop(seen);
        assert_eq!(self.noted(), "[]", "nothing is left to thaw");
    }

    /// What is on record as frozen.
    fn noted(&self) -> String {
        noted(&self.dir)
    }
}

/// The list, behind the line that says what it is.
fn noted(dir: &tempfile::TempDir) -> String {
    let record = std::fs::read_to_string(dir.path().join("state/frozen")).expect("a record");
    record.lines().last().unwrap_or_default().to_owned()
}

/// Waits for what must come.
async fn until(holds: impl Fn() -> bool) {
    let waited = timeout(Duration::from_secs(60), async {
        while !holds() {
            sleep(Duration::from_millis(5)).await;
        }
    });
    waited.await.expect("it comes");
}

async fn serve(stream: UnixStream, habits: Habits, seen: &Mutex<Seen>) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut lines = tokio::io::BufReader::new(read);
    let mut first = true;
    loop {
        let mut line = Vec::new();
        if lines.read_until(b'\n', &mut line).await? == 0 {
            return Ok(());
        }
        let line: Vec<u8> = line.into_iter().filter(|byte| *byte != DELIMITER).collect();
        let Ok(question) = serde_json::from_slice::<Value>(&line) else { continue };
        let answer = match question["execute"].as_str().unwrap_or_default() {
            "guest-sync-delimited" => {
                if habits.mute {
                    continue;
                }
                if habits.endless {
                    write.write_all(&vec![b'x'; 300 << 10]).await?;
                    continue;
                }
                if std::mem::take(&mut first) && habits.stale {
                    write.write_all(b"{\"return\": 7}\n{\"error\": {\"desc\": \"old\"}}\nhalf").await?;
                }
                write.write_all(&[DELIMITER]).await?;
                format!("{{\"return\": {}}}", question["arguments"]["id"])
            }
            "guest-fsfreeze-freeze" => {
                {
                    let mut seen = seen.lock().expect("whole");
                    seen.freezes += 1;
                    seen.frozen = !habits.freeze_refused && !habits.freeze_none;
                }
                sleep(habits.freeze_takes).await;
                match habits {
                    Habits { freeze_silent: true, .. } => continue,
                    Habits { freeze_hangup: true, .. } => return Ok(()),
                    Habits { freeze_refused: true, .. } => {
                        r#"{"error": {"class": "GenericError", "desc": "no hooks for you"}}"#.to_owned()
                    }
                    Habits { freeze_none: true, .. } => r#"{"return": 0}"#.to_owned(),
                    Habits { garbage: true, .. } => "frozen, I think".to_owned(),
                    _ => {
                        if habits.thawed_by_another {
                            let mut seen = seen.lock().expect("whole");
                            seen.frozen = false;
                        }
                        r#"{"return": 2}"#.to_owned()
                    }
                }
            }
            "guest-fsfreeze-thaw" => {
                let mut seen = seen.lock().expect("whole");
                seen.thaws += 1;
                if seen.thaws <= habits.thaw_errors {
                    r#"{"error": {"desc": "not now"}}"#.to_owned()
                } else {
                    let was = std::mem::replace(&mut seen.frozen, false);
                    format!("{{\"return\": {}}}", if was { 2 } else { 0 })
                }
            }
            _ => r#"{"error": {"desc": "unknown"}}"#.to_owned(),
        };
        write.write_all(answer.as_bytes()).await?;
        write.write_all(b"\n").await?;
    }
}

/// For what takes longer than any bound.
const BOUND: Duration = Duration::from_millis(300);
/// For what does not wait for it.
const AMPLE: Duration = Duration::from_secs(30);

#[tokio::test]
async fn a_guest_is_frozen_inside_and_thawed_after() {
    for habits in [Habits::default(), Habits { stale: true, ..Habits::default() }] {
        let fake = Fake::start(habits);
        let (frozen, spent) = fake.ask(Duration::from_secs(5)).await.expect("quiesces");
        assert!(frozen && spent < Duration::from_secs(5));
        fake.assert_thawed();
    }
}

/// Goal: whatever the guest agent does after a freeze was sent, a thaw reaches it.
/// Method: each misbehaviour, and what the guest has seen when the call has ended.
#[tokio::test]
async fn a_guest_is_thawed_whatever_it_does() {
    let table = [
        (Habits { freeze_silent: true, ..Habits::default() }, "no answer within the bound"),
        (Habits { freeze_refused: true, ..Habits::default() }, "no hooks for you"),
        (Habits { freeze_none: true, ..Habits::default() }, "froze no file system"),
        (Habits { freeze_hangup: true, ..Habits::default() }, "hung up"),
        (Habits { garbage: true, ..Habits::default() }, "no JSON"),
        (Habits { thawed_by_another: true, ..Habits::default() }, "were not frozen any more"),
        (Habits { thaw_errors: 1, ..Habits::default() }, "not now; it was thawed at another try"),
    ];
    for (habits, words) in table {
        let fake = Fake::start(habits);
        let bound = if habits.freeze_silent { BOUND } else { AMPLE };
        let error = fake.ask(bound).await.expect_err("not quiet").to_string();
        assert!(error.contains(words), "{habits:?}: {error}");
        fake.assert_thawed();
    }
}

#[tokio::test]
async fn a_guest_that_never_answers_was_never_frozen() {
    for habits in [Habits { mute: true, ..Habits::default() }, Habits { endless: true, ..Habits::default() }] {
        let fake = Fake::start(habits);
        let error = fake.ask(BOUND).await.expect_err("no agent").to_string();
        assert!(error.contains("synchronise"), "{error}");
        assert_eq!(fake.seen.lock().expect("whole").freezes, 0);
    }
    let state = Fake::start(Habits::default()).state;
    let nowhere = [PathBuf::from("/nonexistent/qga.sock")];
    let error = while_frozen(&nowhere, BOUND, &Arc::default(), &Arc::default(), &state, async { Ok(()) }).await;
    let error = error.expect_err("no socket");
    assert!(error.to_string().contains("/nonexistent/qga.sock"), "{error}");
}

#[tokio::test]
async fn what_takes_too_long_inside_is_cut_and_the_guest_thawed() {
    let fake = Fake::start(Habits::default());
    let inside = async {
        sleep(Duration::from_secs(60)).await;
        Ok(())
    };
    let paths = std::slice::from_ref(&fake.path);
    let error = while_frozen(paths, BOUND, &Arc::default(), &Arc::default(), &fake.state, inside).await;
    let error = error.expect_err("too long").to_string();
    assert!(error.contains("no instant was taken"), "{error}");
    fake.assert_thawed();
}

#[tokio::test]
async fn one_guest_that_fails_thaws_all_of_them() {
    let (good, bad) =
        (Fake::start(Habits::default()), Fake::start(Habits { freeze_refused: true, ..Habits::default() }));
    let paths = [good.path.clone(), bad.path.clone()];
    let error = while_frozen(&paths, AMPLE, &Arc::default(), &Arc::default(), &good.state, async { Ok(()) }).await;
    let error = error.expect_err("one is refused");
    assert!(error.to_string().contains("no hooks"), "{error}");
    good.assert_thawed();
    assert!(good.noted() == "[]" && bad.seen.lock().expect("whole").thaws >= 1);
}

/// Goal: an agent that ends between freeze and thaw leaves no guest frozen: the next one thaws it.
/// Method: the task is dropped while the guest is frozen, as a kill would; then a second start on the same state directory.
#[tokio::test]
async fn a_guest_that_an_agent_left_frozen_is_thawed_by_the_next() {
    let fake = Fake::start(Habits::default());
    let paths = [fake.path.clone()];
    let (state, seen) = (Arc::clone(&fake.state), Arc::clone(&fake.seen));
    let cut = tokio::spawn(async move {
        let inside = std::future::pending::<Result<()>>();
        while_frozen(&paths, AMPLE, &Arc::default(), &Arc::default(), &state, inside).await
    });
    until(|| seen.lock().expect("whole").frozen).await;
    cut.abort();
    let _ = cut.await; // it was cut
    assert!(seen.lock().expect("whole").frozen && fake.noted().contains("qga.sock"));
    let Fake { state, dir, .. } = fake;
    drop(state);
    let (state, saved) = StateDir::open(&dir.path().join("state")).expect("opens again");
    assert_eq!(saved.frozen.len(), 1);
    thaw_left_behind(saved.frozen, &Arc::default(), &state);
    until(|| !seen.lock().expect("whole").frozen && noted(&dir) == "[]").await;
}

/// Goal: an orderly stop leaves no guest frozen, however long its freeze or what is done meanwhile would have taken, and does not wait for that.
/// Method: the stop comes in the middle of a freeze that is answered late, of one that never is, and of endless work inside; what the guest has seen when
/// the stop goes on.
#[tokio::test]
async fn a_stop_thaws_the_guests_before_it_goes_on() {
    let late = Habits { freeze_takes: Duration::from_secs(1), ..Habits::default() };
    for habits in [late, Habits { freeze_silent: true, ..Habits::default() }, Habits::default()] {
        let fake = Fake::start(habits);
        let quiesces = Arc::<Quiesces>::default();
        let (paths, state, open) = ([fake.path.clone()], Arc::clone(&fake.state), Arc::clone(&quiesces));
        // As a call whose caller has gone: nobody waits for it.
        let call = tokio::spawn(async move {
            let inside = std::future::pending::<Result<()>>();
            while_frozen(&paths, AMPLE, &open, &Arc::default(), &state, inside).await
        });
        until(|| fake.seen.lock().expect("whole").frozen).await;
        let began = Instant::now();
        assert!(quiesces.stop(AMPLE).await, "{habits:?}");
        fake.assert_thawed();
        assert!(began.elapsed() < AMPLE / 2, "{habits:?}: it waited for the call's own bound");
        let error = call.await.expect("no panic").expect_err("no instant was taken");
        assert!(matches!(error, Error::Gone(_)), "{habits:?}: {error}");
    }
}

/// Goal: a guest that cannot be thawed does not hold the stop up for ever, and stays on record for the next start; and once the agent is stopping no
/// guest is frozen any more.
#[tokio::test]
async fn a_stop_waits_for_a_thaw_so_long_and_no_longer() {
    let fake = Fake::start(Habits { thaw_errors: u32::MAX, ..Habits::default() });
    let quiesces = Arc::<Quiesces>::default();
    let (paths, state, open) = ([fake.path.clone()], Arc::clone(&fake.state), Arc::clone(&quiesces));
    let call =
        tokio::spawn(
            async move { while_frozen(&paths, AMPLE, &open, &Arc::default(), &state, async { Ok(()) }).await },
        );
    until(|| fake.seen.lock().expect("whole").thaws > 0).await;
    assert!(!quiesces.stop(BOUND).await && fake.noted().contains("qga.sock"));
    call.abort();
    let fake = Fake::start(Habits::default());
    let paths = std::slice::from_ref(&fake.path);
    let error = while_frozen(paths, AMPLE, &quiesces, &Arc::default(), &fake.state, async { Ok(()) }).await;
    assert!(matches!(error, Err(Error::Gone(_))) && fake.seen.lock().expect("whole").freezes == 0, "{error:?}");
}
