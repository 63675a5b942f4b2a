//! `export`: an instant, or what changed up to it, as a file.
//!
//! What is to be copied is listed first, from the view's metadata contexts, and written beside the target with everything that was asked; then the copying
//! goes through the list in order. Each step of it is synced and then noted, so an export that was interrupted goes on where it was.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _};
use std::path::{Path, PathBuf};

use cdp_proto::{parse::size_text, v1};
use serde_json::{Value, json};

use super::{missing, when};
use crate::{
    args::{Export, ExportFormat},
    connect::Agent,
    failure::Failure,
    nbd::Export as Address,
    nbd_client::Client,
    output::{self, Answer, instant},
    progress,
    qcow2::{self, CLUSTER, Layout},
};

const VERSION: u64 = 1;
/// Bytes between two notes of how far it is.
const STEP: u64 = 64 << 20;
/// What is all zeroes in pieces of this size stays a hole.
const PIECE: usize = 4096;
const ALLOCATION: &str = "base:allocation";
const ZERO: u32 = 2;

/// What is copied, and to where.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Plan {
    volume_uuid: String,
    /// As it was asked for: an export goes on only for the same question.
    asked: Value,
    at: u64,
    /// 0: everything.
    since: u64,
    qcow2: bool,
    backing: Option<String>,
    size: u64,
    /// What changed: everything, without `since`.
    changed: Vec<(u64, u64)>,
    /// What is read: of what changed that which is not known to be zero. For qcow2 in whole clusters.
    copied: Vec<(u64, u64)>,
}

fn extents_json(extents: &[(u64, u64)]) -> Value {
    extents.iter().map(|(offset, len)| json!([offset, len])).collect()
}

fn extents_of(value: &Value) -> Option<Vec<(u64, u64)>> {
    value.as_array()?.iter().map(|pair| Some((pair[0].as_u64()?, pair[1].as_u64()?))).collect()
}

impl Plan {
    fn json(&self) -> Value {
        json!({
            "version": VERSION,
            "volume_uuid": self.volume_uuid,
            "asked": self.asked,
            "at": self.at,
            "since": self.since,
            "qcow2": self.qcow2,
            "backing": self.backing,
            "size": self.size,
            "changed": extents_json(&self.changed),
            "copied": extents_json(&self.copied),
        })
    }

    fn parse(text: &str) -> Option<Self> {
        let value: Value = serde_json::from_str(text).ok()?;
        let plan = Self {
            volume_uuid: value["volume_uuid"].as_str()?.to_owned(),
            asked: value["asked"].clone(),
            at: value["at"].as_u64()?,
            since: value["since"].as_u64()?,
            qcow2: value["qcow2"].as_bool()?,
            backing: value["backing"].as_str().map(str::to_owned),
            size: value["size"].as_u64()?,
            changed: extents_of(&value["changed"])?,
            copied: extents_of(&value["copied"])?,
        };
        (value["version"].as_u64() == Some(VERSION)).then_some(plan)
    }

    fn bytes(&self) -> u64 {
        self.copied.iter().map(|(_, len)| len).sum()
    }

    /// The pieces of `copied` behind its first `done` bytes, at most `most` bytes of them.
    fn slice(&self, done: u64, most: u64) -> Vec<(u64, u64)> {
        let (mut skip, mut left) = (done, most);
        let mut pieces = Vec::new();
        for (offset, len) in &self.copied {
            let from = skip.min(*len);
            skip -= from;
            let take = (len - from).min(left);
            if take > 0 {
                pieces.push((offset + from, take));
                left -= take;
            }
        }
        pieces
    }
}

/// What is in both lists; each is ascending and without overlaps.
fn intersect(a: &[(u64, u64)], b: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let (mut i, mut j) = (0, 0);
    let mut both = Vec::new();
    while let (Some((a_at, a_len)), Some((b_at, b_len))) = (a.get(i), b.get(j)) {
        let (start, end) = ((*a_at).max(*b_at), (a_at + a_len).min(b_at + b_len));
        if start < end {
            both.push((start, end - start));
        }
        if a_at + a_len < b_at + b_len { i += 1 } else { j += 1 }
    }
    both
}

/// In whole clusters, as far as the disk goes; neighbours joined.
fn in_clusters(extents: &[(u64, u64)], size: u64) -> Vec<(u64, u64)> {
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for cluster in qcow2::clusters_of(extents) {
        let (at, len) = (cluster * CLUSTER, CLUSTER.min(size - cluster * CLUSTER));
        match joined.last_mut() {
            Some((offset, known)) if *offset + *known == at => *known += len,
            _ => joined.push((at, len)),
        }
    }
    joined
}

pub async fn export(agent: &Agent, args: Export) -> Result<Answer, Failure> {
    let info = super::info::fetch(agent, &args.volume, false).await?;
    let volume = info.volume.ok_or_else(|| missing("export"))?;
    let beside = |suffix: &str| PathBuf::from(format!("{}{suffix}", args.target.display()));
    let notes = beside(".cdp-export");
    let asked = json!({
        "at": args.at.to_string(),
        "since": args.since.as_ref().map(ToString::to_string),
        "format": args.format.word(),
        "backing": args.backing,
    });
    if args.restart {
        for path in [&notes, &args.target] {
            remove(path)?;
        }
    }
    let known = load(&notes, &volume.volume_uuid, &asked)?;
    let goes_on = known.is_some();
    let (at, since) = match &known {
        Some((plan, _)) => (plan.at, plan.since),
        None => {
            let at = when::resolve(agent, &args.volume, &args.at).await?;
            let since = match &args.since {
                None => 0,
                Some(since) => when::resolve(agent, &args.volume, since).await?,
            };
            if since > at {
                return Err(Failure::Usage(format!("--since {since}: must not lie after --at, which is {at}")));
            }
            if args.target.exists() {
                let words = format!("{} is there already: choose another target, or --restart", args.target.display());
                return Err(Failure::call("export", tonic::Status::already_exists(words)));
            }
            (at, since)
        }
    };
    let before = views(agent, &volume.volume_uuid).await?;
    let question = v1::ViewRequest { volume: volume.volume_uuid.clone(), timestamp: at, ..Default::default() };
    let what = format!("view of {} at {at}", volume.volume_name);
    let opened =
        agent.call(what.clone(), question, |mut client, question| async move { client.view(question).await }).await?;
    let view = opened.view.ok_or_else(|| missing(&what))?;
    let job = Job { args, notes, asked, volume_uuid: volume.volume_uuid.clone(), at, since, uri: view.nbd_uri.clone() };
    let result = tokio::task::spawn_blocking(move || job.run(known)).await;
    // A view that was open before is somebody else's.
    if !before.iter().any(|known| known.id == view.id) {
        let question = v1::CloseViewRequest { id: view.id.clone(), force: false };
        let closed =
            agent.call("view close", question, |mut client, question| async move { client.close_view(question).await });
        if let Err(failure) = closed.await {
            eprintln!("cdpctl: {failure}");
        }
    }
    let done = result.unwrap_or_else(|_| Err(missing("export")))?;
    Ok(answer(&volume.volume_name, &done, goes_on))
}

/// What was done.
struct Done {
    plan: Plan,
    target: PathBuf,
    blocks: Option<PathBuf>,
    format: ExportFormat,
}

fn answer(volume: &str, done: &Done, goes_on: bool) -> Answer {
    let Done { plan, target, blocks, format } = done;
    let changed: u64 = plan.changed.iter().map(|(_, len)| len).sum();
    let json = json!({
        "target": target.display().to_string(),
        "format": format.word(),
        "time": plan.at,
        "since": output::instant_or_null(plan.since),
        "size": plan.size,
        "changed_bytes": changed,
        "copied_bytes": plan.bytes(),
        "blocks": blocks.as_ref().map(|path| path.display().to_string()),
        "backing": plan.backing,
        "resumed": goes_on,
    });
    let what = match plan.since {
        0 => format!("{volume} at {}", instant(plan.at)),
        since => format!("what changed of {volume} from {} to {}", instant(since), instant(plan.at)),
    };
    let mut text = format!("{}: {what}, {} of {}\n", target.display(), size_text(plan.bytes()), size_text(plan.size));
    if let Some(blocks) = blocks {
        text += &format!("{}: which bytes of it count, a line 'offset length' for each extent\n", blocks.display());
    }
    Answer::done(json, text)
}

/// The blocking part, on a thread of its own.
struct Job {
    args: Export,
    notes: PathBuf,
    asked: Value,
    volume_uuid: String,
    at: u64,
    since: u64,
    uri: String,
}

impl Job {
    fn run(self, known: Option<(Plan, u64)>) -> Result<Done, Failure> {
        let target = self.args.target.clone();
        let io = |what: &'static str| move |source| Failure::io(what, source);
        let address: Address = self.uri.parse().map_err(|why| {
            Failure::call("export", tonic::Status::failed_precondition(format!("{:?} {why}", self.uri)))
        })?;
        let (plan, mut done) = match known {
            Some(known) => known,
            None => (self.plan(&address).map_err(io("ask the view what to copy"))?, 0),
        };
        let clusters = if plan.qcow2 { qcow2::clusters_of(&plan.copied) } else { Vec::new() };
        let layout = Layout::new(plan.size, &clusters);
        let fresh = done == 0;
        let file =
            open_target(&target, fresh).map_err(|source| Failure::io(format!("open {}", target.display()), source))?;
        let put = |at: u64, bytes: &[u8]| file.write_all_at(bytes, at);
        if fresh {
            let begin = || {
                file.set_len(0)?;
                file.set_len(if plan.qcow2 { layout.file_bytes } else { plan.size })?;
                if plan.qcow2 {
                    layout.write(&clusters, plan.backing.as_deref(), put)?;
                }
                file.sync_all()?;
                note_plan(&self.notes, &plan)
            };
            begin().map_err(|source| Failure::io(format!("write {}", target.display()), source))?;
        }
        let mut client = Client::connect(&address, ALLOCATION).map_err(io("connect to the view"))?;
        let mut notes =
            OpenOptions::new().append(true).open(&self.notes).map_err(io("open the notes of the export"))?;
        let total = plan.bytes();
        let mut bar = progress::bytes(&format!("export to {}", target.display()));
        while done < total {
            let pieces = plan.slice(done, STEP);
            let take = |at: u64, bytes: &[u8]| {
                // For qcow2 a run of clusters in the disk is a run in the file, but pieces end inside of clusters.
                for (i, piece) in bytes.chunks(PIECE).enumerate() {
                    let place = at + (i * PIECE) as u64;
                    if piece.iter().any(|byte| *byte != 0) {
                        put(if plan.qcow2 { host_offset(&layout, &clusters, place) } else { place }, piece)?;
                    }
                }
                Ok(())
            };
            client.read(&pieces, take).map_err(io("copy from the view"))?;
            done += pieces.iter().map(|(_, len)| len).sum::<u64>();
            let note = || {
                file.sync_data()?;
                notes.write_all(format!("{done}\n").as_bytes())?;
                notes.sync_data()
            };
            let mut note = note;
            note().map_err(|source| Failure::io(format!("write {}", target.display()), source))?;
            bar(done, total);
        }
        let blocks = if plan.since != 0 && !plan.qcow2 { Some(self.write_blocks(&plan)?) } else { None };
        file.sync_all().map_err(|source| Failure::io(format!("sync {}", target.display()), source))?;
        remove(&self.notes)?;
        Ok(Done { plan, target, blocks, format: self.args.format })
    }

    fn plan(&self, address: &Address) -> io::Result<Plan> {
        let mut client = Client::connect(address, ALLOCATION)?;
        let size = client.size;
        let data = client.status(|flags| flags & ZERO == 0)?;
        drop(client);
        let changed = match self.since {
            0 => vec![(0, size)],
            since => {
                Client::connect(address, &format!("qemu:dirty-bitmap:since-{since}"))?.status(|flags| flags & 1 != 0)?
            }
        };
        let qcow2 = self.args.format == ExportFormat::Qcow2;
        // A cluster that is in the file hides the backing file's: with `since` also what became zero must be there.
        let copied = match (qcow2, self.since) {
            (false, _) => intersect(&changed, &data),
            (true, 0) => in_clusters(&data, size),
            (true, _) => in_clusters(&changed, size),
        };
        Ok(Plan {
            volume_uuid: self.volume_uuid.clone(),
            asked: self.asked.clone(),
            at: self.at,
            since: self.since,
            qcow2,
            backing: self.args.backing.clone(),
            size,
            changed,
            copied,
        })
    }

    /// The list of what counts in a raw overlay.
    fn write_blocks(&self, plan: &Plan) -> Result<PathBuf, Failure> {
        let path = PathBuf::from(format!("{}.blocks", self.args.target.display()));
        let write = || {
            let mut file = io::BufWriter::new(File::create(&path)?);
            for (offset, len) in &plan.changed {
                writeln!(file, "{offset} {len}")?;
            }
            file.into_inner()?.sync_all()
        };
        write().map_err(|source| Failure::io(format!("write {}", path.display()), source))?;
        Ok(path)
    }
}

/// Where a byte of the disk lies in the file.
fn host_offset(layout: &Layout, clusters: &[u64], at: u64) -> u64 {
    let number = clusters.partition_point(|cluster| *cluster < at / CLUSTER) as u64;
    layout.data_at + number * CLUSTER + at % CLUSTER
}

fn open_target(path: &Path, fresh: bool) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).create(fresh).truncate(false).open(path)?;
    let kind = file.metadata()?.file_type();
    if !kind.is_file() {
        let found = if kind.is_block_device() { "a block device" } else { "no regular file" };
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("it is {found}: an export goes to a file")));
    }
    Ok(file)
}

fn remove(path: &Path) -> Result<(), Failure> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Failure::io(format!("remove {}", path.display()), error))
        }
        _ => Ok(()),
    }
}

fn note_plan(path: &Path, plan: &Plan) -> io::Result<()> {
    let beside = PathBuf::from(format!("{}.tmp", path.display()));
    let mut file = File::create(&beside)?;
    writeln!(file, "{}", plan.json())?;
    file.sync_all()?;
    std::fs::rename(&beside, path)
}

/// What an export that was interrupted has left: its plan, and how many bytes of it are done.
fn load(path: &Path, volume: &str, asked: &Value) -> Result<Option<(Plan, u64)>, Failure> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(Failure::io(format!("read {}", path.display()), source)),
        Ok(file) => file,
    };
    let mut lines = BufReader::new(file).lines();
    let plan = lines.next().and_then(Result::ok).and_then(|line| Plan::parse(&line));
    // A line that a crash cut off says too little, never too much: it has fewer digits.
    let done = lines.map_while(Result::ok).filter_map(|line| line.parse().ok()).last().unwrap_or(0);
    match plan {
        Some(plan) if plan.volume_uuid == volume && plan.asked == *asked && done <= plan.bytes() => {
            Ok(Some((plan, done)))
        }
        Some(plan) => Err(Failure::Usage(format!(
            "{} is of an export that was asked with {}: repeat that, or begin anew with --restart",
            path.display(),
            plan.asked
        ))),
        None => Err(Failure::Usage(format!("{} is no export's: remove it, or use --restart", path.display()))),
    }
}

async fn views(agent: &Agent, volume: &str) -> Result<Vec<v1::ViewInfo>, Failure> {
    let question = v1::ListViewsRequest { volume: volume.to_owned() };
    let answer = agent
        .call("view list", question, |mut client, question| async move { client.list_views(question).await })
        .await?;
    Ok(answer.views)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_meet_where_both_are() {
        assert_eq!(intersect(&[(0, 10), (20, 10)], &[(5, 20)]), [(5, 5), (20, 5)]);
        assert_eq!(intersect(&[(0, 100)], &[(1, 2), (50, 60)]), [(1, 2), (50, 50)]);
        assert_eq!(intersect(&[], &[(1, 2)]), []);
        assert_eq!(in_clusters(&[(1, 1), (CLUSTER * 3, 5)], CLUSTER * 3 + 512), [(0, CLUSTER), (CLUSTER * 3, 512)]);
    }

    #[test]
    fn a_plan_goes_on_from_any_byte() {
        let plan = Plan {
            volume_uuid: "v".into(),
            asked: json!({ "at": "now" }),
            at: u64::MAX,
            since: 1,
            qcow2: false,
            backing: None,
            size: 1 << 40,
            changed: vec![(0, 10), (100, 50)],
            copied: vec![(0, 10), (100, 50)],
        };
        assert_eq!(Plan::parse(&plan.json().to_string()), Some(plan.clone()));
        assert_eq!((plan.bytes(), plan.slice(0, 1000)), (60, plan.copied.clone()));
        assert_eq!(plan.slice(4, 10), [(4, 6), (100, 4)]);
        assert_eq!(plan.slice(14, 1000), [(104, 46)]);
        assert_eq!(plan.slice(60, 1000), []);
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("x.cdp-export");
        note_plan(&path, &plan).expect("writes");
        let mut file = OpenOptions::new().append(true).open(&path).expect("opens");
        file.write_all(b"10\n40\n4").expect("writes");
        assert_eq!(load(&path, "v", &plan.asked).expect("loads").map(|(_, done)| done), Some(4));
        assert!(load(&path, "other", &plan.asked).is_err());
    }
}
