//! `bisect`: which write broke it? A binary search over the changes between two instants, with the user's command as the judge.
//!
//! The search is over numbers: state `n` is the volume at the good instant with the first `n` changes behind it, so state 0 is good and state `total`
//! is bad. What is known is kept in a file, which is replaced after each run, so a search that was interrupted goes on.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use cdp_proto::{parse::When, v1};
use serde_json::{Value, json};

use super::{files::with_files, missing, own_view::OwnView, when};
use crate::{
    args::{Bisect, ViewFiles},
    connect::Agent,
    failure::Failure,
    output::{self, Answer, count, instant},
};

const VERSION: u64 = 1;
/// Exit codes of the command from here on say that it could not judge.
const CANNOT_TELL: i32 = 125;

/// What is known, as it stands in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Search {
    volume_uuid: String,
    /// As they were asked for: a search goes on only for the same question.
    asked: Value,
    /// The good instant, and the bad one.
    from: u64,
    to: u64,
    /// Changes between them.
    total: u64,
    /// The newest state known to be good; `None`: state 0 was not run yet.
    good: Option<u64>,
    /// The oldest state known to be bad; `None`: state `total` was not run yet.
    bad: Option<u64>,
    runs: u64,
}

impl Search {
    /// The state to judge next; `None`: the search is over.
    fn next(&self) -> Option<u64> {
        match (self.good, self.bad) {
            (None, _) => Some(0),
            (_, None) => Some(self.total),
            (Some(good), Some(bad)) if bad - good > 1 => Some(good + (bad - good) / 2),
            _ => None,
        }
    }

    fn json(&self) -> Value {
        json!({
            "version": VERSION,
            "volume_uuid": self.volume_uuid,
            "asked": self.asked,
            "from": self.from,
            "to": self.to,
            "total": self.total,
            "good": self.good,
            "bad": self.bad,
            "runs": self.runs,
        })
    }

    fn parse(text: &str) -> Option<Self> {
        let value: Value = serde_json::from_str(text).ok()?;
        let number = |key: &str| value[key].as_u64();
        let search = Self {
            volume_uuid: value["volume_uuid"].as_str()?.to_owned(),
            asked: value["asked"].clone(),
            from: number("from")?,
            to: number("to")?,
            total: number("total")?,
            good: number("good"),
            bad: number("bad"),
            runs: number("runs")?,
        };
        let sound = search.good.is_none_or(|good| good <= search.total)
            && search.bad.is_none_or(|bad| bad <= search.total && search.good.is_some_and(|good| good < bad));
        (number("version") == Some(VERSION) && sound).then_some(search)
    }
}

pub async fn bisect(agent: &Agent, args: Bisect) -> Result<Answer, Failure> {
    let info = super::info::fetch(agent, &args.volume, false).await?;
    let volume = info.volume.ok_or_else(|| missing("bisect"))?;
    let state = args.state.clone().map_or_else(|| state_path(&volume.volume_uuid), Ok)?;
    let log = Log(args.log.clone().unwrap_or_else(|| state.with_extension("log")));
    let asked = json!({
        "from": args.from.to_string(),
        "to": args.to.to_string(),
        "command": args.command,
        "mount": args.mount,
        "partition": args.partition,
    });
    let mut search = match load(&state, &volume.volume_uuid, &asked, args.restart)? {
        Some(search) => {
            log.line(&format!("goes on after {}", count(search.runs, "run")))?;
            search
        }
        None => {
            let search = begin(agent, &args, &volume, asked).await?;
            save(&state, &search)?;
            let line = format!(
                "{} between {} (good) and {} (bad) of {}; the command is {:?}",
                count(search.total, "change"),
                search.from,
                search.to,
                volume.volume_name,
                args.command
            );
            log.line(&line)?;
            search
        }
    };
    // It keeps the history from ageing out under the search, as long as this program runs.
    let anchor = OwnView::unmounted(agent, "bisect", &volume.volume_uuid, search.from).await?;
    let answer = go_on(agent, &args, &mut search, &volume.volume_name, &state, &log).await;
    if !matches!(answer, Err(Failure::Unreachable { .. }))
        && let Err(failure) = anchor.close().await
        && answer.is_ok()
    {
        eprintln!("cdpctl: {failure}");
    }
    answer
}

/// Runs the command until the write is found.
async fn go_on(
    agent: &Agent,
    args: &Bisect,
    search: &mut Search,
    name: &str,
    state: &Path,
    log: &Log,
) -> Result<Answer, Failure> {
    while let Some(number) = search.next() {
        let good = judge(agent, args, search, number, log).await?;
        search.runs += 1;
        match (good, number) {
            (true, number) if number == search.total && search.bad.is_none() && number > 0 => {
                finish(state);
                return Err(Failure::Usage(format!(
                    "--to {}: the command finds the volume good there too, so there is nothing to look for",
                    args.to
                )));
            }
            (false, 0) => {
                finish(state);
                return Err(Failure::Usage(format!(
                    "--from {}: the command finds the volume bad there already",
                    args.from
                )));
            }
            (true, number) => search.good = Some(number),
            (false, number) => search.bad = Some(number),
        }
        save(state, search)?;
    }
    let answer = conclude(agent, search, name, log).await?;
    finish(state);
    Ok(answer)
}

async fn begin(agent: &Agent, args: &Bisect, volume: &v1::VolumeEntry, asked: Value) -> Result<Search, Failure> {
    let from = when::resolve(agent, &args.volume, &args.from).await?;
    let to = when::resolve(agent, &args.volume, &args.to).await?;
    if from >= to {
        return Err(Failure::Usage(format!("--from {}: must lie before --to {}", args.from, args.to)));
    }
    let total = changes(agent, &volume.volume_uuid, from, to, 0, 0).await?.total;
    if total == 0 {
        return Err(Failure::Usage(format!("nothing was written between {from} and {to}")));
    }
    Ok(Search { volume_uuid: volume.volume_uuid.clone(), asked, from, to, total, good: None, bad: None, runs: 0 })
}

/// Runs the command on a state; answers whether it found it good.
async fn judge(agent: &Agent, args: &Bisect, search: &Search, number: u64, log: &Log) -> Result<bool, Failure> {
    let time = time_of(agent, search, number).await?;
    let run = search.runs + 1;
    log.line(&format!("run {run}: state {number} of {}, at {time} ({})", search.total, instant(time)))?;
    // A view of its own in either case, which the agent takes away with this call, however it ends.
    let mut ended = None;
    let served = if args.mount {
        let files = ViewFiles { volume: search.volume_uuid.clone(), at: When::At(time), partition: args.partition };
        with_files(agent, "bisect", files, async |_, view| {
            ended = Some(run_command(&args.command, search, number, view, log).await);
            Ok(())
        })
        .await
    } else {
        let own = OwnView::unmounted(agent, "bisect", &search.volume_uuid, time).await?;
        ended = Some(run_command(&args.command, search, number, &own.view, log).await);
        own.close().await
    };
    let status = match (ended, served) {
        (Some(Err(source)), _) => return Err(Failure::io(format!("run {:?}", args.command), source)),
        // A command that found nothing to read has judged nothing.
        (Some(Ok(status)), Err(failure)) => {
            log.line(&format!("run {run}: {status}, which does not count: {failure}"))?;
            return Err(uncounted(run, failure));
        }
        (None, Err(failure)) => return Err(failure),
        (None, Ok(())) => return Err(missing("bisect")),
        (Some(Ok(status)), Ok(())) => status,
    };
    let verdict = verdict(status);
    let words = match verdict {
        Some(true) => "is good",
        Some(false) => "is bad",
        None => "cannot be judged",
    };
    log.line(&format!("run {run}: {status}: it {words}"))?;
    eprintln!("{}", told(run, time, words, left(search, number, verdict)));
    verdict.ok_or_else(|| {
        Failure::Usage(format!(
            "{:?} could not judge the state at {time} ({status}; {CANNOT_TELL} and above, and signals, say so); \
             the same command line goes on from here; its output is in {}",
            args.command,
            log.0.display()
        ))
    })
}

/// What a run came to.
fn told(run: u64, time: u64, words: &str, left: u64) -> String {
    format!("cdpctl: run {run}: the state at {} {words} ({left} left to search)", instant(time))
}

/// Why the verdict of a command that ran is not taken.
fn uncounted(run: u64, failure: Failure) -> Failure {
    let words = format!("run {run} does not count (the same command line goes on from here)");
    match failure {
        Failure::Unreachable { endpoint, why } => Failure::Unreachable { endpoint, why: format!("{words}: {why}") },
        Failure::Call { what, status } => Failure::Call { what: format!("{words}: {what}"), status },
        other => other,
    }
}

/// Changes left between good and bad after a verdict.
fn left(search: &Search, number: u64, verdict: Option<bool>) -> u64 {
    let good = if verdict == Some(true) { number } else { search.good.unwrap_or(0) };
    let bad = if verdict == Some(false) { number } else { search.bad.unwrap_or(search.total) };
    bad.saturating_sub(good)
}

fn verdict(status: ExitStatus) -> Option<bool> {
    match status.code() {
        Some(0) => Some(true),
        Some(code) if code < CANNOT_TELL => Some(false),
        _ => None,
    }
}

/// Runs the command on a thread of its own: the connection to the agent is kept up meanwhile, and with it a view that goes with it.
async fn run_command(
    command: &[String],
    search: &Search,
    number: u64,
    view: &v1::ViewInfo,
    log: &Log,
) -> std::io::Result<ExitStatus> {
    let (program, arguments) = command.split_first().ok_or_else(|| std::io::Error::other("no command"))?;
    let output = log.open()?;
    let mut child = Command::new(program);
    child
        .args(arguments)
        .env("CDP_VIEW_NBD_URI", &view.nbd_uri)
        .env("CDP_VIEW_ID", &view.id)
        .env("CDP_VIEW_TIME", view.time.to_string())
        .env("CDP_VIEW_VOLUME", &view.volume_name)
        .env("CDP_BISECT_STATE", number.to_string())
        .env("CDP_BISECT_TOTAL", search.total.to_string())
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output);
    for (name, value) in [("CDP_VIEW_FILE", &view.path), ("CDP_VIEW_MOUNT", &view.mount)] {
        if !value.is_empty() {
            child.env(name, value);
        }
    }
    let ended = tokio::task::spawn_blocking(move || child.status()).await;
    ended.unwrap_or_else(|error| Err(std::io::Error::other(error)))
}

/// The instant that shows a state.
async fn time_of(agent: &Agent, search: &Search, number: u64) -> Result<u64, Failure> {
    match number {
        0 => Ok(search.from),
        number if number == search.total => Ok(search.to),
        number => Ok(change(agent, search, number).await?.time),
    }
}

/// Change `number`, counted from 1.
async fn change(agent: &Agent, search: &Search, number: u64) -> Result<v1::Change, Failure> {
    let list = changes(agent, &search.volume_uuid, search.from, search.to, number - 1, 1).await?;
    if list.total != search.total {
        let words = format!("the history has {} changes now and had {}; use --restart", list.total, search.total);
        return Err(Failure::call("bisect", tonic::Status::failed_precondition(words)));
    }
    list.changes.into_iter().next().ok_or_else(|| missing("bisect"))
}

async fn conclude(agent: &Agent, search: &Search, name: &str, log: &Log) -> Result<Answer, Failure> {
    let (Some(good), Some(bad)) = (search.good, search.bad) else { return Err(missing("bisect")) };
    let first_bad = change(agent, search, bad).await?;
    let last_good = first_bad.time - 1;
    let good_change = time_of(agent, search, good).await?;
    let what = match first_bad.kind() {
        v1::ChangeKind::Revert => "a revert".to_owned(),
        v1::ChangeKind::Zero => {
            format!("zeroes over {} bytes at byte {}", first_bad.length, first_bad.offset)
        }
        _ => format!("a write of {} bytes at byte {}", first_bad.length, first_bad.offset),
    };
    log.line(&format!("found after {}: {what}, at {}", count(search.runs, "run"), first_bad.time))?;
    let json = json!({
        "volume_uuid": search.volume_uuid,
        "last_good": last_good,
        "last_good_change": good_change,
        "first_bad": first_bad.time,
        "kind": first_bad.kind().word(),
        "offset": first_bad.offset,
        "length": first_bad.length,
        "number": bad,
        "changes": search.total,
        "runs": search.runs,
        "log": log.0.display().to_string(),
    });
    let text = output::fields(&[
        ("Broken by", format!("{what}, change {bad} of {}", search.total)),
        ("First bad", format!("{} ({})", instant(first_bad.time), first_bad.time)),
        ("Last good", format!("{} ({last_good})", instant(last_good))),
        ("Runs", search.runs.to_string()),
        ("Log", log.0.display().to_string()),
        ("Look with", format!("cdpctl view open {name} --at {last_good}")),
        ("Go back with", format!("cdpctl revert {name} --at {last_good}")),
    ]);
    Ok(Answer::done(json, text))
}

/// The search is over: its file goes.
fn finish(state: &Path) {
    if let Err(error) = fs::remove_file(state) {
        eprintln!("cdpctl: remove {}: {error}", state.display());
    }
}

pub async fn changes(
    agent: &Agent,
    volume: &str,
    from: u64,
    to: u64,
    skip: u64,
    limit: u32,
) -> Result<v1::ChangesResponse, Failure> {
    let question = v1::ChangesRequest { volume: volume.to_owned(), from, to, skip, limit };
    agent.call("changes", question, |mut client, question| async move { client.changes(question).await }).await
}

/// Where the search of a volume is remembered, unless --state says otherwise.
fn state_path(volume: &str) -> Result<PathBuf, Failure> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_STATE_HOME").or_else(|| set("HOME").map(|home| home.join(".local/state")));
    let folder = base
        .ok_or_else(|| Failure::Usage("--state: neither XDG_STATE_HOME nor HOME is set: give a file".into()))?
        .join("cdpctl");
    fs::create_dir_all(&folder).map_err(|source| Failure::io(format!("create {}", folder.display()), source))?;
    Ok(folder.join(format!("bisect-{volume}.json")))
}

fn load(path: &Path, volume: &str, asked: &Value, restart: bool) -> Result<Option<Search>, Failure> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(Failure::io(format!("read {}", path.display()), source)),
        Ok(_) if restart => return Ok(None),
        Ok(text) => text,
    };
    match Search::parse(&text) {
        Some(search) if search.volume_uuid == volume && search.asked == *asked => Ok(Some(search)),
        Some(search) => Err(Failure::Usage(format!(
            "{} has a search that was asked with {}: repeat that, or begin anew with --restart",
            path.display(),
            search.asked
        ))),
        None => {
            Err(Failure::Usage(format!("{} is no search: remove it, or begin anew with --restart", path.display())))
        }
    }
}

fn save(path: &Path, search: &Search) -> Result<(), Failure> {
    let beside = path.with_extension("tmp");
    let write = || {
        let mut file = File::create(&beside)?;
        file.write_all(format!("{:#}\n", search.json()).as_bytes())?;
        file.sync_all()?;
        fs::rename(&beside, path)
    };
    write().map_err(|source| Failure::io(format!("write {}", path.display()), source))
}

/// What happened, and what the command printed.
struct Log(PathBuf);

impl Log {
    fn open(&self) -> std::io::Result<File> {
        OpenOptions::new().create(true).append(true).open(&self.0)
    }

    fn line(&self, text: &str) -> Result<(), Failure> {
        let write = || self.open()?.write_all(format!("bisect: {text}\n").as_bytes());
        write().map_err(|source| Failure::io(format!("write {}", self.0.display()), source))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    fn search(total: u64) -> Search {
        Search {
            volume_uuid: "v".into(),
            asked: json!({ "from": "1" }),
            from: 1,
            to: 9,
            total,
            good: None,
            bad: None,
            runs: 0,
        }
    }

    /// Goal: whatever change broke it, it is found, in at most log2 + 2 runs.
    #[test]
    fn every_change_is_found_within_the_bound() {
        for total in [1, 2, 3, 7, 8, 9, 100, 1_000_000] {
            let bound = u64::from((total as f64).log2().ceil() as u32) + 2;
            for broken in [1, 2, total / 2 + 1, total - 1, total].into_iter().filter(|n| (1..=total).contains(n)) {
                let mut search = search(total);
                while let Some(number) = search.next() {
                    search.runs += 1;
                    if number < broken {
                        search.good = Some(number)
                    } else {
                        search.bad = Some(number)
                    }
                    assert_eq!(
                        Search::parse(&search.json().to_string()).as_ref(),
                        Some(&search),
                        "it goes on from a file"
                    );
                }
                assert_eq!((search.good, search.bad), (Some(broken - 1), Some(broken)), "{broken} of {total}");
                assert!(search.runs <= bound, "{} runs for {broken} of {total}", search.runs);
            }
        }
    }

    #[test]
    fn a_file_that_makes_no_sense_is_no_search() {
        let mut odd = search(10);
        (odd.good, odd.bad) = (Some(5), Some(5));
        for text in ["", "{}", "[1]", &odd.json().to_string(), &search(10).json().to_string().replace("1,", "2,")] {
            if text.contains("\"version\":2") || text.len() < 4 || text.contains("\"good\":5") {
                assert_eq!(Search::parse(text), None, "{text}");
            }
        }
        (odd.good, odd.bad) = (Some(11), None);
        assert_eq!(Search::parse(&odd.json().to_string()), None);
    }

    #[test]
    fn what_a_run_came_to_is_a_sentence() {
        for (words, expected) in [("is good", "Z is good (7 left"), ("cannot be judged", "Z cannot be judged (7 left")]
        {
            let told = told(1, 1_000_000_000, words, 7);
            assert!(told.contains("run 1: the state at 1970-") && told.contains(expected), "{told}");
        }
    }

    #[test]
    fn a_run_that_does_not_count_says_so_and_why() {
        let status = tonic::Status::failed_precondition("it went away");
        for failure in [
            Failure::call("bisect", status),
            Failure::Unreachable { endpoint: "unix:/x".into(), why: "it went away".into() },
        ] {
            let exit = failure.exit();
            let told = uncounted(3, failure);
            assert_eq!(told.exit(), exit);
            for words in ["run 3 does not count", "goes on", "it went away"] {
                assert!(told.to_string().contains(words), "{told}");
            }
        }
    }

    #[test]
    fn exit_codes_are_read_as_by_other_bisections() {
        let status = |code: i32| ExitStatus::from_raw(code << 8);
        assert_eq!(
            [0, 1, 124, 125, 127].map(|code| verdict(status(code))),
            [Some(true), Some(false), Some(false), None, None]
        );
        assert_eq!(verdict(ExitStatus::from_raw(9)), None);
    }
}
