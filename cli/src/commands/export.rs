//! `export`: an instant, or what changed up to it, as a file.
//!
//! What is to be copied is listed first, from the view's metadata contexts, and written beside the target with everything that was asked; then the target is
//! made, and which file it is is noted before a byte goes into it; then the copying goes through the list in order. Each step of it is synced and then noted,
//! so an export that was interrupted goes on where it was, whenever that happened, and no other file is ever taken for its own.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use cdp_proto::parse::size_text;
use serde_json::{Value, json};

use super::{missing, own_view::OwnView, when};
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

const VERSION: u64 = 2;
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

/// What an export notes beside its target, and what it finds there of one that was interrupted.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Notes {
    plan: Plan,
    /// Which file is its target; `None`: it was not made yet, or there is not a byte in it.
    identity: Option<String>,
    /// Bytes of the plan that are in the target.
    done: u64,
}

/// What stays the same of a file under whatever name, and is never that of another one.
fn identity(file: &Metadata) -> String {
    let born = file.created().ok().and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
    format!("{}-{}", file.ino(), born.unwrap_or_default().as_nanos())
}

impl Notes {
    /// Notes of an export end with whole lines: what a crash cut off is not there.
    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
        let mut notes = Self { plan: Plan::parse(lines.next()?)?, identity: None, done: 0 };
        for line in lines {
            match line.strip_prefix("target ") {
                Some(file) => notes.identity = Some(file.to_owned()),
                None => notes.done = line.parse().ok()?,
            }
        }
        (notes.done <= notes.plan.bytes()).then_some(notes)
    }

    /// What stands at `path`; `None`: nothing.
    fn read(path: &Path) -> Result<Option<Self>, Failure> {
        let text = match std::fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Failure::io(format!("read {}", path.display()), source)),
            Ok(text) => text,
        };
        let notes = std::str::from_utf8(&text).ok().and_then(Self::parse);
        let words = || format!("{} is not what an export notes: it stays as it is; move it away", path.display());
        notes.map(Some).ok_or_else(|| refusal(words()))
    }

    /// Puts them at `path`, durably.
    fn write(&self, path: &Path) -> io::Result<()> {
        let beside = PathBuf::from(format!("{}.tmp", path.display()));
        let mut file = File::create(&beside)?;
        writeln!(file, "{}", self.plan.json())?;
        if let Some(identity) = &self.identity {
            writeln!(file, "target {identity}\n{}", self.done)?;
        }
        file.sync_all()?;
        std::fs::rename(&beside, path)?;
        sync_folder(path)
    }

    /// Whether a file at the target's place is this export's: the one that it made, or the empty one that it was about to note.
    fn own(&self, found: &Metadata) -> bool {
        found.is_file() && self.identity.as_ref().map_or(found.len() == 0, |known| *known == identity(found))
    }
}

fn refusal(words: String) -> Failure {
    Failure::call("export", tonic::Status::failed_precondition(words))
}

/// What is at a path, links not followed.
fn found_at(path: &Path) -> Result<Option<Metadata>, Failure> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Failure::io(format!("look at {}", path.display()), source)),
        Ok(found) => Ok(Some(found)),
    }
}

/// The folder that a file is in.
fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes the names in a file's folder durable, where the file system can be asked for that.
fn sync_folder(path: &Path) -> io::Result<()> {
    match File::open(folder(path))?.sync_all() {
        Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
        synced => synced,
    }
}

/// What an export to `target` that was interrupted has left, if it was asked in the same words. With `restart` it is forgotten, and what it has written.
///
/// # Errors
/// When what is there is something else: it stays as it is.
fn earlier(target: &Path, notes: &Path, volume: &str, asked: &Value, restart: bool) -> Result<Option<Notes>, Failure> {
    let found = found_at(target)?;
    let Some(known) = Notes::read(notes)? else {
        return match found {
            Some(_) if restart => Err(refusal(format!(
                "--restart: {} is no export that was interrupted (there is no {}): it stays as it is; choose another target",
                target.display(),
                notes.display()
            ))),
            Some(_) => {
                let words = format!("{} is there already: choose another target", target.display());
                Err(Failure::call("export", tonic::Status::already_exists(words)))
            }
            None if in_dev(target) => {
                Err(refusal(format!("{}: an export makes no files in /dev; choose another target", target.display())))
            }
            None => Ok(None),
        };
    };
    if found.is_some_and(|found| !known.own(&found)) {
        return Err(refusal(format!(
            "{} is not the file that {} is about: both stay as they are; choose another target",
            target.display(),
            notes.display()
        )));
    }
    if restart {
        // In this order: what is left half-way is an export that goes on.
        remove(target)?;
        remove(notes)?;
        return Ok(None);
    }
    if known.plan.volume_uuid != volume || known.plan.asked != *asked {
        return Err(Failure::Usage(format!(
            "{} is of an export that was asked with {}: repeat that, or begin anew with --restart",
            notes.display(),
            known.plan.asked
        )));
    }
    Ok(Some(known))
}

/// Whether a new file there would lie among the devices. /dev/shm is for files.
fn in_dev(target: &Path) -> bool {
    let folder = folder(target).canonicalize();
    folder.is_ok_and(|folder| folder.starts_with("/dev") && !folder.starts_with("/dev/shm"))
}

/// Refuses a backing file that cannot be the volume at `since`, when it had `size` bytes. A name is relative to the folder of the file that has it.
fn check_backing(target: &Path, backing: &str, size: u64, since: u64) -> Result<(), Failure> {
    let path = folder(target).join(backing);
    let opened = File::open(&path).and_then(|mut file| {
        let mut magic = [0; 4];
        let known = file.read_at(&mut magic, 0)? == magic.len() && magic == qcow2::MAGIC.to_be_bytes();
        Ok((file.seek(SeekFrom::End(0))?, known))
    });
    let (bytes, qcow2) = opened.map_err(|source| Failure::io(format!("--backing {}", path.display()), source))?;
    if bytes == size {
        return Ok(());
    }
    let hint = if qcow2 { "; it looks like a qcow2 file, and is to be a raw one" } else { "" };
    Err(refusal(format!(
        "--backing {}: it has {bytes} bytes, and the volume had {size} at {since}{hint}",
        path.display()
    )))
}

pub async fn export(agent: &Agent, args: Export) -> Result<Answer, Failure> {
    let info = super::info::fetch(agent, &args.volume, false).await?;
    let volume = info.volume.ok_or_else(|| missing("export"))?;
    let notes = PathBuf::from(format!("{}.cdp-export", args.target.display()));
    let asked = json!({
        "at": args.at.to_string(),
        "since": args.since.as_ref().map(ToString::to_string),
        "format": args.format.word(),
        "backing": args.backing,
    });
    let known = earlier(&args.target, &notes, &volume.volume_uuid, &asked, args.restart)?;
    let goes_on = known.is_some();
    let (at, since) = match &known {
        Some(Notes { plan, .. }) => (plan.at, plan.since),
        None => {
            let at = when::resolve(agent, &args.volume, &args.at).await?;
            let since = match &args.since {
                None => 0,
                Some(since) => when::resolve(agent, &args.volume, since).await?,
            };
            if since > at {
                return Err(Failure::Usage(format!("--since {since}: must not lie after --at, which is {at}")));
            }
            (at, since)
        }
    };
    match (args.format, &args.backing) {
        (ExportFormat::Qcow2, Some(backing)) if !goes_on => {
            let before = OwnView::unmounted(agent, "export", &volume.volume_uuid, since).await?;
            let size = before.view.size;
            before.close().await?;
            check_backing(&args.target, backing, size, since)?;
        }
        (ExportFormat::Qcow2, None) if since != 0 => eprintln!(
            "cdpctl: note: blocks of {} that did not change read as zeroes until it is given a backing file \
             (--backing; later: qemu-img rebase -u -F raw -b FILE)",
            args.target.display()
        ),
        _ => {}
    }
    let own = OwnView::unmounted(agent, "export", &volume.volume_uuid, at).await?;
    let (volume_uuid, uri) = (volume.volume_uuid.clone(), own.view.nbd_uri.clone());
    let job = Job { args, notes, asked, volume_uuid, at, since, uri };
    let result = tokio::task::spawn_blocking(move || job.run(known)).await;
    let closed = own.close().await;
    let done = result.unwrap_or_else(|_| Err(missing("export")))?;
    if let Err(failure) = closed {
        eprintln!("cdpctl: {failure}"); // all that was to be read was read
    }
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
    fn run(self, known: Option<Notes>) -> Result<Done, Failure> {
        let target = self.args.target.clone();
        let io = |what: &'static str| move |source| Failure::io(what, source);
        let address: Address = self.uri.parse().map_err(|why| {
            Failure::call("export", tonic::Status::failed_precondition(format!("{:?} {why}", self.uri)))
        })?;
        let mut known = match known {
            Some(known) => known,
            None => {
                let plan = self.plan(&address).map_err(io("ask the view what to copy"))?;
                Notes { plan, identity: None, done: 0 }
            }
        };
        let clusters = if known.plan.qcow2 { qcow2::clusters_of(&known.plan.copied) } else { Vec::new() };
        let layout = Layout::new(known.plan.size, &clusters);
        let file_bytes = if known.plan.qcow2 { layout.file_bytes } else { known.plan.size };
        let mut begin = || {
            let file = open_target(&target, &self.notes, &mut known, file_bytes)?;
            if known.done == 0 {
                file.set_len(0)?;
                file.set_len(file_bytes)?;
                if known.plan.qcow2 {
                    layout.write(&clusters, known.plan.backing.as_deref(), |at, bytes| file.write_all_at(bytes, at))?;
                }
                file.sync_all()?;
            }
            Ok(file)
        };
        let file = begin().map_err(|source| Failure::io(format!("write {}", target.display()), source))?;
        let put = |at: u64, bytes: &[u8]| file.write_all_at(bytes, at);
        let Notes { plan, mut done, .. } = known;
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

/// Opens the target; makes it first where there is none. When this returns, the notes at `path` are durable, and say which file it is.
fn open_target(target: &Path, path: &Path, notes: &mut Notes, bytes: u64) -> io::Result<File> {
    let mut how = OpenOptions::new();
    how.read(true).write(true).custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK);
    let file = match how.open(target) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            (notes.identity, notes.done) = (None, 0);
            notes.write(path)?;
            how.create_new(true).open(target)?
        }
        opened => opened?,
    };
    let found = file.metadata()?;
    if !notes.own(&found) {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "somebody else made it meanwhile: it stays as it is"));
    }
    if found.len() != bytes {
        notes.done = 0; // nothing is noted as done before it has its length
    }
    notes.identity = Some(identity(&found));
    notes.write(path)?;
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
        let mut notes = Notes { plan, identity: Some("7-9".into()), done: 10 };
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("x.cdp-export");
        notes.write(&path).expect("writes");
        let mut file = OpenOptions::new().append(true).open(&path).expect("opens");
        file.write_all(b"40\n5").expect("writes");
        notes.done = 40;
        assert_eq!(Notes::read(&path).expect("reads"), Some(notes.clone()), "a line that was cut off says nothing");
        file.write_all(b"0\n61\n").expect("writes");
        assert!(Notes::read(&path).is_err(), "more than there is");
    }

    fn notes(identity: Option<String>) -> Notes {
        let plan = Plan {
            volume_uuid: "v".into(),
            asked: json!({ "at": "now" }),
            at: 5,
            since: 0,
            qcow2: false,
            backing: None,
            size: 4096,
            changed: vec![(0, 4096)],
            copied: vec![(0, 4096)],
        };
        Notes { plan, identity, done: 0 }
    }

    #[test]
    fn wherever_it_is_killed_the_same_words_go_on() {
        let folder = tempfile::tempdir().expect("a folder");
        let (target, path) = (folder.path().join("x"), folder.path().join("x.cdp-export"));
        let asked = json!({ "at": "now" });
        let again = || earlier(&target, &path, "v", &asked, false).expect("goes on");
        assert_eq!(again(), None);
        // Before the target is made; once it is made; once it is noted; with bytes in it.
        notes(None).write(&path).expect("writes");
        assert_eq!(again(), Some(notes(None)));
        let file = File::create(&target).expect("makes");
        assert_eq!(again(), Some(notes(None)));
        let mut known = notes(None);
        drop(open_target(&target, &path, &mut known, 4096).expect("takes the empty one"));
        assert_eq!(known, notes(Some(identity(&file.metadata().expect("is there")))));
        assert_eq!(again(), Some(known.clone()));
        file.set_len(4096).expect("grows");
        known.done = 1024;
        known.write(&path).expect("writes");
        assert_eq!(again(), Some(known.clone()));
        // Somebody removed it, or cut it off: it is written from the start.
        file.set_len(1).expect("shrinks");
        drop(open_target(&target, &path, &mut known, 4096).expect("opens"));
        assert_eq!(known.done, 0);
        std::fs::remove_file(&target).expect("removes");
        assert_eq!(again(), Some(known.clone()));
        let made = open_target(&target, &path, &mut known, 4096).expect("makes");
        assert_eq!(again(), Some(notes(Some(identity(&made.metadata().expect("is there"))))));
        assert!(earlier(&target, &path, "other", &asked, false).is_err());
    }

    #[test]
    fn a_restart_removes_an_export_of_ours_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let (target, path) = (folder.path().join("x"), folder.path().join("x.cdp-export"));
        let asked = json!({ "at": "1h ago" });
        let ask = |restart| earlier(&target, &path, "v", &asked, restart);
        let refused = |restart, words: &str| {
            let said = ask(restart).expect_err("refused").to_string();
            assert!(said.contains(words), "{said:?} lacks {words:?}");
            said
        };
        std::fs::write(&target, "precious").expect("writes");
        refused(true, "no export that was interrupted");
        assert!(!refused(false, "is there already").contains("--restart"), "it would not help");
        for odd in ["precious", "", "{}\n", "\u{0}\n"] {
            std::fs::write(&path, odd).expect("writes");
            refused(true, "is not what an export notes");
            refused(false, "is not what an export notes");
            assert_eq!(std::fs::read_to_string(&path).expect("is there"), odd);
        }
        // Notes of another file, and such that know of no file yet.
        for other in [Some("1-2".to_owned()), None] {
            notes(other).write(&path).expect("writes");
            refused(true, "is not the file that");
            assert!(!refused(false, "is not the file that").contains("--restart"), "it would not help");
            assert!(path.exists());
        }
        assert_eq!(std::fs::read_to_string(&target).expect("is there"), "precious");
        let elsewhere = folder.path().join("elsewhere");
        std::fs::rename(&target, &elsewhere).expect("renames");
        std::os::unix::fs::symlink(&elsewhere, &target).expect("links");
        let own = std::fs::metadata(&elsewhere).expect("is there");
        notes(Some(identity(&own))).write(&path).expect("writes");
        refused(true, "is not the file that");
        std::fs::rename(&elsewhere, &target).expect("renames");
        refused(false, "begin anew with --restart");
        assert_eq!(ask(true).expect("forgets"), None);
        assert!(!target.exists() && !path.exists());
        assert_eq!(ask(true).expect("there is nothing to forget"), None);
    }

    #[test]
    fn no_file_is_made_among_the_devices() {
        let folder = tempfile::tempdir().expect("a folder");
        std::os::unix::fs::symlink("/dev", folder.path().join("link")).expect("links");
        for (target, expected) in [
            (PathBuf::from("/dev/nothing-of-this-name"), true),
            (folder.path().join("link/nothing-of-this-name"), true),
            (folder.path().join("x"), false),
            (PathBuf::from("x"), false),
            (PathBuf::from("/dev/shm/x"), false),
        ] {
            assert_eq!(in_dev(&target), expected, "{}", target.display());
        }
        let device = Path::new("/dev/nothing-of-this-name");
        let asked = json!({});
        let said = earlier(device, Path::new("/dev/nothing-of-this-name.cdp-export"), "v", &asked, false);
        assert!(said.expect_err("refused").to_string().contains("no files in /dev"));
    }

    #[test]
    fn a_backing_file_is_there_and_as_long_as_the_volume_was() {
        let folder = tempfile::tempdir().expect("a folder");
        let target = folder.path().join("new.qcow2");
        let check = |backing: &str| check_backing(&target, backing, 4096, 5).map_err(|failure| failure.to_string());
        let base = folder.path().join("base.img");
        let refused = check("base.img").expect_err("it is not there");
        assert!(refused.contains(&base.display().to_string()), "{refused}");
        std::fs::write(&base, [0; 512]).expect("writes");
        let refused = check("base.img").expect_err("it is too short");
        assert!(refused.contains("base.img: it has 512 bytes, and the volume had 4096 at 5"), "{refused}");
        std::fs::write(&base, b"QFI\xfb").expect("writes");
        assert!(check("base.img").expect_err("it is not raw").contains("qcow2"));
        File::create(&base).and_then(|file| file.set_len(4096)).expect("writes");
        assert_eq!(check("base.img"), Ok(()));
        assert_eq!(check(base.to_str().expect("ASCII")), Ok(()));
    }
}
