//! `view ls` and `view cp`: single files out of a volume as it was.
//!
//! The agent opens a view on scratch for this call, mounts it in a directory of its own, and takes both away when the call ends: also
//! when this program is killed. Paths are looked up *inside* of that file system (a link to `/etc/passwd` there is its own, not this host's).

use std::{
    fs,
    io::{self, Read as _},
    os::fd::{AsRawFd, OwnedFd},
    os::unix::{
        ffi::{OsStrExt as _, OsStringExt as _},
        fs::{FileTypeExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use cdp_proto::v1;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use super::{own_view::OwnView, when::Fields};
use crate::{
    args::{ViewCp, ViewFiles, ViewLs},
    connect::Agent,
    failure::Failure,
    output::{self, Answer, instant},
};

/// How often a copy is looked at.
const LOOK: Duration = Duration::from_millis(20);

pub async fn list(agent: &Agent, args: ViewLs) -> Result<Answer, Failure> {
    let path = args.path;
    with_files(agent, "view ls", args.files, async |root, _| {
        let entries = entries(root, &path).map_err(|source| Failure::io(path.display().to_string(), source))?;
        let rows: Vec<_> = entries.iter().map(Entry::row).collect();
        let json = json!({ "path": path.display().to_string(), "entries": entries.iter().map(Entry::json).collect::<Vec<_>>() });
        Ok(Answer::done(json, output::table(&["MODE", ">UID", ">GID", ">SIZE", "CHANGED", "NAME"], &rows, "empty")))
    })
    .await
}

pub async fn copy(agent: &Agent, args: ViewCp) -> Result<Answer, Failure> {
    let (path, dest) = (args.path, args.dest);
    with_files(agent, "view cp", args.files, async |root, view| {
        let io = |source| Failure::io(path.display().to_string(), source);
        let found = open_inside(root, &path, OFlag::O_PATH).map_err(io)?;
        // As `cp` has it: into a directory that is there, else under the new name.
        let target = match (fs::metadata(&dest), path.file_name()) {
            (Ok(there), Some(name)) if there.is_dir() => dest.join(name),
            _ => dest.clone(),
        };
        // Its own name for the open file; `-H` goes through this one link and no other.
        let source = format!("/proc/{}/fd/{}", std::process::id(), found.as_raw_fd());
        let mut child = Command::new("cp")
            .args(["-aHT", "--sparse=auto", "--", &source])
            .arg(&target)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| Failure::io("run cp", source))?;
        let guard = scopeguard(child.id());
        let status = loop {
            match child.try_wait().map_err(|source| Failure::io("wait for cp", source))? {
                Some(status) => break status,
                None => tokio::time::sleep(LOOK).await,
            }
        };
        guard.disarm();
        if !status.success() {
            let mut said = String::new();
            if let Some(mut stderr) = child.stderr.take() {
                let _ = stderr.read_to_string(&mut said); // for the message only
            }
            let said = said.replace(&source, &path.display().to_string());
            return Err(Failure::io(format!("copy {}", path.display()), io::Error::other(said.trim().to_owned())));
        }
        let json = json!({
            "path": path.display().to_string(), "dest": target.display().to_string(), "time": view.time,
        });
        let text = format!("copied {} as it was at {} to {}\n", path.display(), instant(view.time), target.display());
        Ok(Answer::done(json, text))
    })
    .await
}

/// Ends the copying program when this one goes before it.
struct EndWithUs(Option<u32>);

fn scopeguard(pid: u32) -> EndWithUs {
    EndWithUs(Some(pid))
}

impl EndWithUs {
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for EndWithUs {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            let pid = nix::unistd::Pid::from_raw(pid.cast_signed());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            let _ = nix::sys::wait::waitpid(pid, None); // so that it holds nothing of the view any more
        }
    }
}

/// Has the files of an instant while `work` runs; Ctrl-C and errors end it in order.
pub(super) async fn with_files<T>(
    agent: &Agent,
    what: &str,
    files: ViewFiles,
    work: impl AsyncFnOnce(&OwnedFd, &v1::ViewInfo) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let what = format!("{what} {} at {}", files.volume, files.at);
    if !agent.is_local() {
        return Err(Failure::Usage(format!("{what}: wants the agent of this host, over its unix socket (--agent)")));
    }
    let Fields { snapshot_name, timestamp, ago_ns, flush_before } = files.at.into();
    let question = v1::UseViewRequest {
        volume: files.volume,
        snapshot_name,
        timestamp,
        ago_ns,
        flush_before,
        partition: files.partition,
        ..Default::default()
    };
    let stopped = |kind| signal(kind).map_err(|source| Failure::io("watch for signals", source));
    let (mut interrupt, mut terminate) = (stopped(SignalKind::interrupt())?, stopped(SignalKind::terminate())?);
    let interrupted = || Failure::io(&*what, io::Error::new(io::ErrorKind::Interrupted, "interrupted"));
    let own = tokio::select! {
        own = OwnView::open(agent, what.clone(), question) => own?,
        _ = interrupt.recv() => return Err(interrupted()),
        _ = terminate.recv() => return Err(interrupted()),
    };
    let ended = {
        let mount = &own.view.mount;
        let root = fs::File::open(mount).map(OwnedFd::from);
        let root = root.map_err(|source| Failure::io(format!("open {mount}"), source))?;
        tokio::select! {
            done = work(&root, &own.view) => done,
            _ = interrupt.recv() => Err(interrupted()),
            _ = terminate.recv() => Err(interrupted()),
        }
    };
    // The end of the stream would do; this way it has happened when the command ends.
    let closed = own.close().await;
    let answer = ended?;
    closed.map(|()| answer)
}

/// Opens a path inside of a mounted file system, whatever links are on the way.
fn open_inside(root: &OwnedFd, path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS | ResolveFlag::RESOLVE_NO_XDEV);
    let path = if path.as_os_str().is_empty() { Path::new("/") } else { path };
    Ok(openat2(root, path, how)?)
}

/// A line of `view ls`.
struct Entry {
    name: PathBuf,
    meta: fs::Metadata,
    link: Option<PathBuf>,
}

fn entries(root: &OwnedFd, path: &Path) -> io::Result<Vec<Entry>> {
    let found = open_inside(root, path, OFlag::O_PATH)?;
    let place = PathBuf::from(format!("/proc/self/fd/{}", found.as_raw_fd()));
    let meta = fs::metadata(&place)?;
    if !meta.is_dir() {
        return Ok(vec![Entry { name: path.to_owned(), meta, link: None }]);
    }
    let mut entries = Vec::new();
    for entry in fs::read_dir(&place)? {
        let entry = entry?;
        let meta = fs::symlink_metadata(entry.path())?;
        let link = if meta.is_symlink() { fs::read_link(entry.path()).ok() } else { None };
        entries.push(Entry { name: PathBuf::from(entry.file_name()), meta, link });
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(entries)
}

impl Entry {
    fn kind(&self) -> (char, &'static str) {
        let kind = self.meta.file_type();
        match () {
            () if kind.is_dir() => ('d', "directory"),
            () if kind.is_symlink() => ('l', "link"),
            () if kind.is_block_device() => ('b', "block device"),
            () if kind.is_char_device() => ('c', "character device"),
            () if kind.is_fifo() => ('p', "pipe"),
            () if kind.is_socket() => ('s', "socket"),
            () => ('-', "file"),
        }
    }

    fn changed_ns(&self) -> u64 {
        let (seconds, rest) = (self.meta.mtime(), self.meta.mtime_nsec());
        let ns = i128::from(seconds) * 1_000_000_000 + i128::from(rest);
        u64::try_from(ns).unwrap_or(0) // before 1970
    }

    fn row(&self) -> Vec<String> {
        let mode = self.meta.mode();
        let mut bits: String = self.kind().0.into();
        for (at, letter) in "rwxrwxrwx".chars().enumerate() {
            bits.push(if mode & (0o400 >> at) != 0 { letter } else { '-' });
        }
        let name = printable(&self.name);
        vec![
            bits,
            self.meta.uid().to_string(),
            self.meta.gid().to_string(),
            self.meta.len().to_string(),
            instant(self.changed_ns()),
            self.link.as_ref().map_or_else(|| name.clone(), |link| format!("{name} -> {}", printable(link))),
        ]
    }

    fn json(&self) -> Value {
        json!({
            "name": self.name.to_string_lossy(),
            "kind": self.kind().1,
            "size": self.meta.len(),
            "mode": self.meta.mode() & 0o7777,
            "uid": self.meta.uid(),
            "gid": self.meta.gid(),
            "changed": self.changed_ns(),
            "link": self.link.as_ref().map(|link| link.to_string_lossy()),
        })
    }
}

/// A name for a terminal: what could move its cursor is escaped.
fn printable(name: &Path) -> String {
    let text = std::ffi::OsString::from_vec(name.as_os_str().as_bytes().to_vec());
    text.to_string_lossy()
        .chars()
        .flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] })
        .collect()
}
