//! Volumes and views as local files: `<dir>/volumes/<name>` and `<dir>/views/<id>`, raw images of the right size, by FUSE.
//!
//! A session per directory, with threads of its own that only take requests apart (`tree.rs`); data goes to the export's shard by
//! message and is answered from there (`files.rs`). Many requests are in flight at a time.
//!
//! * What can change is never in the page cache, so a file agrees with NBD clients and with reverts at every moment. A read-only
//!   view never changes, and may be cached.
//! * The host may write back dirty pages through these files: their threads are marked as I/O flushers, and nothing on the way of
//!   a write allocates behind a lock that the writer holds.
//! * The agent itself never touches a path below these directories. A thread of its own that waits for its own answer would keep
//!   a killed process, and with it the mount, for ever; programs that it starts do that (`crate::mounts`).

pub(crate) mod files;
mod tree;

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fuser::{Config, MountOption, Session, SessionACL};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, umount2};

use super::nbd::{ExportDirectory, ExportKind, ExportSource};
use tree::Tree;

/// Threads that take requests apart, for each directory.
const THREADS: usize = 2;
/// How long a mount may take.
const MOUNT_PATIENCE: Duration = Duration::from_secs(10);
/// How long an agent that was killed may take to let go of its lock.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
/// Between two tries.
const LOCK_RETRY: Duration = Duration::from_millis(50);
/// Under this name the mounts are found again, also those of an agent that was killed.
pub const SOURCE: &str = "cdp-agent";

/// The two directories, mounted.
pub struct FuseServer {
    volumes: Mounted,
    views: Mounted,
    _lock: Flock<File>,
}

/// The right to serve files below a directory, and to detach what is mounted there.
pub struct Place {
    dir: PathBuf,
    lock: Flock<File>,
}

impl Place {
    /// Takes the directory, and touches nothing that is mounted there.
    ///
    /// # Errors
    /// When another agent serves its files there.
    pub fn take(dir: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let path = dir.join("fuse.lock");
        let end = Instant::now() + LOCK_PATIENCE;
        loop {
            let file = File::options().create(true).truncate(false).write(true).mode(0o600).open(&path)?;
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(Self { dir: dir.to_owned(), lock }),
                Err((_, Errno::EWOULDBLOCK)) if Instant::now() < end => std::thread::sleep(LOCK_RETRY),
                Err((_, Errno::EWOULDBLOCK)) => {
                    return Err(io::Error::other(format!("another agent serves its files in {}", dir.display())));
                }
                Err((_, error)) => return Err(error.into()),
            }
        }
    }

    /// Detaches what an earlier agent left mounted there. Programs that still have files of it open get errors, as they do already.
    pub fn clear(&self) {
        for kind in [ExportKind::Volume, ExportKind::View] {
            detach(&directory_of(&self.dir, kind));
        }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// A directory while it is mounted.
struct Mounted(PathBuf);

impl FuseServer {
    /// Mounts the two directories.
    ///
    /// # Errors
    /// When FUSE is not to be had here.
    pub fn start<S>(place: Place, directory: &Arc<dyn ExportDirectory<S>>) -> io::Result<Self>
    where
        S: ExportSource + Clone + 'static,
    {
        let mount = |kind| mount(&directory_of(&place.dir, kind), kind, Arc::clone(directory));
        let volumes = mount(ExportKind::Volume)?;
        let views = mount(ExportKind::View)?;
        Ok(Self { volumes, views, _lock: place.lock })
    }

    /// Where the files of volumes are.
    pub fn volumes(&self) -> &Path {
        &self.volumes.0
    }

    /// Where the files of views are.
    pub fn views(&self) -> &Path {
        &self.views.0
    }
}

/// Where the files of a kind are.
pub fn directory_of(dir: &Path, kind: ExportKind) -> PathBuf {
    dir.join(match kind {
        ExportKind::Volume => "volumes",
        ExportKind::View => "views",
    })
}

impl Drop for Mounted {
    fn drop(&mut self) {
        detach(&self.0);
        let _ = std::fs::remove_dir(&self.0); // not empty, or not ours: then it stays
    }
}

/// Unmounts everything of ours at `path`, whether it is in use or not.
fn detach(path: &Path) {
    for _ in 0..16 {
        let ours = |mount: &crate::mounts::Mount| mount.dir == path && mount.kind.starts_with("fuse");
        match crate::mounts::mounted() {
            Ok(mounts) if mounts.iter().any(ours) => {}
            Ok(_) => return,
            Err(error) => return tracing::warn!(%error, "the list of mounts cannot be read"),
        }
        if let Err(error) = umount2(path, MntFlags::MNT_DETACH) {
            let helped = std::process::Command::new("fusermount3").args(["-u", "-z", "--"]).arg(path).output();
            if !helped.is_ok_and(|output| output.status.success()) {
                return tracing::warn!(path = %path.display(), %error, "a mount cannot be detached");
            }
        }
    }
}

fn mount<S>(path: &Path, kind: ExportKind, directory: Arc<dyn ExportDirectory<S>>) -> io::Result<Mounted>
where
    S: ExportSource + Clone + 'static,
{
    std::fs::create_dir_all(path)?;
    let tree = Tree::new(kind, directory, tokio::runtime::Handle::current());
    let name = if kind == ExportKind::Volume { "cdp-fuse-volumes" } else { "cdp-fuse-views" };
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    let place = path.to_owned();
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        // Threads that the session starts have what this one has.
        crate::shard::protect_from_writeback();
        let session = match session(tree, &place) {
            Ok(session) => session,
            Err(error) => return drop(tell.send(Err(error))),
        };
        let _ = tell.send(Ok(()));
        match session.run() {
            Ok(()) => tracing::debug!(path = %place.display(), "unmounted"),
            Err(error) => tracing::error!(path = %place.display(), %error, "the files are not served any more"),
        }
    })?;
    match told.recv_timeout(MOUNT_PATIENCE) {
        Ok(Ok(())) => Ok(Mounted(path.to_owned())),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "mounting takes too long")),
    }
}

fn session<S: ExportSource + Clone + 'static>(tree: Tree<S>, place: &Path) -> io::Result<Session<Tree<S>>> {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName(SOURCE.to_owned()),
        MountOption::DefaultPermissions,
        MountOption::NoExec,
        MountOption::NoAtime,
    ];
    config.n_threads = Some(THREADS);
    config.clone_fd = true;
    // Root sees what others mounted in any case; without it only the owner does.
    config.acl = if nix::unistd::geteuid().is_root() { SessionACL::All } else { SessionACL::Owner };
    Session::new(tree, place, &config)
}
