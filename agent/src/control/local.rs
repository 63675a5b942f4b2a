//! Views on this host: whose they are, how long they live, and where they are mounted.
//!
//! A mount is written down before it is made and until it is gone (`views` in the state directory), so that whoever comes next, after
//! whatever crash, knows what to undo; and at the start of the agent everything that is attached to a view's file is taken away first
//! ([`crate::mounts::sweep`]), then made anew for the views that came back. `mounting` is held across a mount and across an unmount, so
//! two never cross; it is taken before `changing`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cdp_journal::info::ViewInfo;
use cdp_journal::{Error, Instant, Result};
use cdp_proto::v1::EventKind;
use uuid::Uuid;

use super::{Control, blocking};
use crate::events::wall_ns;
use crate::mounts;
use crate::state::{MountRecord, ViewRecord};

/// How often views are looked at for their end.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(1);

/// A view: what the engine says, and what is recorded of it.
#[derive(Clone, Debug)]
pub struct ViewStatus {
    /// What it shows.
    pub info: ViewInfo,
    /// Whose it is, its end, its mount.
    pub record: ViewRecord,
}

/// Whose a view is and how long it lives.
#[derive(Clone, Debug, Default)]
pub struct Terms {
    /// In words.
    pub owner: String,
    /// It is closed after so long; `None`: never.
    pub ttl: Option<Duration>,
    /// It belongs to a call and goes with it; nobody shares it.
    pub temporary: bool,
}

/// Where a view is to be mounted.
#[derive(Clone, Debug)]
pub struct MountWish {
    /// The directory; `None`: one of the agent's own.
    pub dir: Option<PathBuf>,
    /// Number of the partition (0: the whole); `None`: the only file system.
    pub partition: Option<u32>,
}

impl Control {
    /// Takes the directory where views are files, and mounts again what was mounted when the agent ended.
    pub async fn give_local(self: &Arc<Self>, views: &Path) {
        *self.local.write() = Some(views.to_owned());
        remove_private(&views.with_file_name("calls"));
        let again: Vec<(Uuid, MountRecord)> = {
            let registry = self.registry.read();
            let mounted = registry.views.iter().filter_map(|(id, slot)| Some((*id, slot.record.mount.clone()?)));
            mounted.collect()
        };
        let _mounting = self.mounting.lock().await;
        for (id, mount) in again {
            if let Err(error) = self.attach(id, &mount).await {
                let volume = self.registry.read().views.get(&id).map(|slot| slot.record.volume);
                let message = format!("view {id} could not be mounted again at {}: {error}", mount.dir.display());
                self.events.publish_now(EventKind::ViewLost, volume, None, message);
                self.forget_mount(id, &mount).await;
            }
        }
    }

    /// Unmounts all views; they stay on record, for the next start. What is in use is detached all the same.
    pub async fn take_local(&self) {
        let _mounting = self.mounting.lock().await;
        let views = self.local.write().take();
        let Some(views) = views else { return };
        let mounted: Vec<(Uuid, MountRecord)> = {
            let registry = self.registry.read();
            registry.views.iter().filter_map(|(id, slot)| Some((*id, slot.record.mount.clone()?))).collect()
        };
        for (id, mount) in mounted {
            if let Err(error) = self.detach(&views, id, &mount, true).await {
                tracing::warn!(view = %id, dir = %mount.dir.display(), %error, "it could not be unmounted");
            }
        }
    }

    /// Refuses to take for a disk what this agent serves itself: its shard would wait, in a system call, for its own answer. Asked before anything is
    /// locked, since also this may wait for an answer.
    pub(super) async fn refuse_own(&self, path: &Path) -> Result<()> {
        let views = self.local.read().clone();
        let Some(views) = views else { return Ok(()) };
        let path = path.to_owned();
        blocking(move || {
            let near = views.parent().unwrap_or(&views);
            let near = near.canonicalize().unwrap_or_else(|_| near.to_owned());
            let own = mounts::is_own(&path, &["views", "volumes"].map(|name| near.join(name)));
            if own.map_err(|error| Error::device("read", "/proc/self/mountinfo", &error))? {
                let bound = "none of the agent's own files, and no device that is made of one";
                return Err(Error::invalid("path", path.display(), bound));
            }
            Ok(())
        })
        .await
    }

    /// Opens a view, or answers the one that is open.
    pub async fn open_view(
        &self,
        volume: Uuid,
        time: Instant,
        name: String,
        writable: bool,
        terms: Terms,
    ) -> Result<ViewStatus> {
        let _changing = self.changing.lock().await;
        self.open_view_locked(volume, time, name, writable, terms).await
    }

    /// The caller holds `changing`.
    pub(crate) async fn open_view_locked(
        &self,
        volume: Uuid,
        time: Instant,
        name: String,
        writable: bool,
        terms: Terms,
    ) -> Result<ViewStatus> {
        let expires_ns =
            terms.ttl.map(|ttl| wall_ns().saturating_add(u64::try_from(ttl.as_nanos()).unwrap_or(u64::MAX)));
        let shared = |view: &ViewStatus| {
            view.info.writable == writable
                && view.info.time == time
                && view.info.lost.is_none()
                && !view.record.temporary
                && !terms.temporary
        };
        if let Some(open) = self.views(Some(volume)).await.into_iter().find(shared) {
            // Whoever wants it longer has it.
            let later = match (open.record.expires_ns, expires_ns) {
                (Some(old), Some(new)) => Some(old.max(new)),
                _ => None,
            };
            if later != open.record.expires_ns {
                self.change_view(open.info.id, |record| record.expires_ns = later).await?;
            }
            return self.view_status(open.info.id).await;
        }
        self.within_limits(volume, writable)?;
        // Who shares what was decided above: the engine does not know which ones are temporary.
        let info = self
            .on_volume(volume, move |volume| async move {
                Ok(volume.open_another_view(time, &name, writable).await?.info())
            })
            .await?;
        let record = ViewRecord {
            id: info.id,
            volume: info.volume,
            time_ns: info.time.0,
            snapshot_name: info.snapshot_name.clone(),
            writable: info.writable,
            owner: terms.owner,
            opened_ns: info.opened_ns,
            expires_ns,
            temporary: terms.temporary,
            mount: None,
        };
        {
            let mut registry = self.registry.write();
            let shard = registry.volumes.get(&volume).map_or(0, |slot| slot.shard);
            registry.views.insert(info.id, super::ViewSlot { record: record.clone(), shard });
        }
        if let Err(error) = self.record_views().await {
            let id = info.id;
            self.registry.write().views.remove(&id);
            self.on_volume(volume, move |volume| async move { volume.close_view(id).await }).await?;
            return Err(error);
        }
        Ok(ViewStatus { info, record })
    }

    /// The bounds over all volumes; those of a volume are the engine's.
    fn within_limits(&self, volume: Uuid, writable: bool) -> Result<()> {
        let registry = self.registry.read();
        if registry.views.len() >= self.views_max {
            return Err(Error::NoSpace { what: "views (views.max)", needed: 1, free: 0 });
        }
        if writable && registry.volumes.contains_key(&volume) {
            let each = self.engine_config.scratch_bytes_max;
            let taken = each * registry.views.values().filter(|slot| slot.record.writable).count() as u64;
            if taken + each > self.views_scratch_bytes_max {
                let free = self.views_scratch_bytes_max.saturating_sub(taken);
                return Err(Error::NoSpace { what: "scratch of views (views.scratch_total)", needed: each, free });
            }
        }
        Ok(())
    }

    /// Mounts an open view.
    ///
    /// # Errors
    /// When it is mounted elsewhere, or the system refuses; the view stays open.
    pub async fn mount_view(&self, id: Uuid, wish: MountWish) -> Result<ViewStatus> {
        let _mounting = self.mounting.lock().await;
        let view = self.view_status(id).await?;
        let images = self.local.read().clone().ok_or_else(no_files)?;
        let private = wish.dir.is_none();
        let dir = match wish.dir {
            Some(dir) => resolve_dir(&images, dir).await?,
            None => images.with_file_name("calls").join(id.to_string()),
        };
        let known = self.registry.read().views.get(&id).and_then(|slot| slot.record.mount.clone());
        if let Some(mount) = known {
            if mounts::is_mounted(&mounts::places()?, &mount.dir, &mount.device) {
                if mount.dir == dir && wish.partition.is_none_or(|wanted| mount.partition == Some(wanted)) {
                    return Ok(view);
                }
                let (at, number) = (mount.dir.display(), mount.partition.unwrap_or(0));
                let part = if number == 0 { String::new() } else { format!("partition {number} of ") };
                return Err(Error::State(format!("{part}view {id} is mounted at {at} already: close it first")));
            }
            // Somebody unmounted it by hand.
            self.unmount(id, true).await?;
        }
        let mount = MountRecord {
            made: prepare_dir(&dir, private).await?,
            dir,
            partition: wish.partition,
            device: String::new(),
            kind: String::new(),
        };
        let made = async {
            self.change_view(id, |record| record.mount = Some(mount.clone())).await?;
            self.attach(id, &mount).await
        };
        if let Err(error) = made.await {
            self.forget_mount(id, &mount).await;
            return Err(error);
        }
        self.view_status(id).await
    }

    /// Makes a mount that is on record.
    async fn attach(&self, id: Uuid, mount: &MountRecord) -> Result<()> {
        let images = self.local.read().clone().ok_or_else(no_files)?;
        let writable = self.registry.read().views.get(&id).is_some_and(|slot| slot.record.writable);
        let (wanted, devices) = (mount.clone(), self.nbd_devices.clone());
        let attached = blocking(move || {
            std::fs::create_dir_all(&wanted.dir)
                .map_err(|error| Error::device("make directory", wanted.dir.display().to_string(), &error))?;
            let mount = |image: &Path| mounts::attach(image, &wanted.dir, wanted.partition, writable);
            if let Some(devices) = devices {
                match devices.connect(id, writable) {
                    Ok(device) => return mount(Path::new(&device)).inspect_err(|_| devices.disconnect(id)),
                    Err(error) => tracing::warn!(view = %id, %error, "mounted by a loop device instead"),
                }
            }
            mount(&images.join(id.to_string()))
        });
        let attached = attached.await?;
        self.change_view(id, |record| {
            if let Some(mount) = &mut record.mount {
                mount.partition = Some(attached.partition);
                (mount.device, mount.kind) = (attached.device, attached.kind);
            }
        })
        .await
    }

    /// Takes a mount off the record, and its directory away if the agent made it.
    async fn forget_mount(&self, id: Uuid, mount: &MountRecord) {
        if let Err(error) = self.change_view(id, |record| record.mount = None).await {
            tracing::warn!(view = %id, %error, "its record could not be written");
        }
        if mount.made {
            let _ = std::fs::remove_dir(&mount.dir); // not empty: somebody uses it
        }
    }

    /// Closes a view by its id, and unmounts it before; `force`: also when programs use the mount.
    pub async fn close_view(&self, id: Uuid, force: bool) -> Result<ViewStatus> {
        let _mounting = self.mounting.lock().await;
        self.unmount(id, force).await?;
        let _changing = self.changing.lock().await;
        self.close_view_locked(id).await
    }

    /// The caller holds `mounting`.
    pub(super) async fn unmount(&self, id: Uuid, force: bool) -> Result<()> {
        let mount = self.registry.read().views.get(&id).and_then(|slot| slot.record.mount.clone());
        let Some(mount) = mount else { return Ok(()) };
        let images = self.local.read().clone();
        if let Some(images) = images {
            self.detach(&images, id, &mount, force).await?;
        }
        self.forget_mount(id, &mount).await;
        Ok(())
    }

    /// Takes a mount away, and its device; waits for them to go.
    async fn detach(&self, images: &Path, id: Uuid, mount: &MountRecord, lazily: bool) -> Result<()> {
        let (images, mount, devices) = (images.to_owned(), mount.clone(), self.nbd_devices.clone());
        blocking(move || {
            mounts::detach(&mount.dir, &mount.device, lazily)?;
            if let Some(devices) = devices {
                devices.disconnect(id);
            }
            if !lazily {
                mounts::wait_for_loops(|bound| mounts::lies_in(&bound.file, &images, &id.to_string()));
            }
            Ok(())
        })
        .await
    }

    /// Changes a view's record, durably.
    async fn change_view(&self, id: Uuid, change: impl FnOnce(&mut ViewRecord)) -> Result<()> {
        {
            let mut registry = self.registry.write();
            let slot = registry.views.get_mut(&id);
            let slot = slot.ok_or_else(|| Error::Gone(format!("view {id} was closed meanwhile")))?;
            change(&mut slot.record);
        }
        self.record_views().await
    }

    /// One view.
    pub async fn view_status(&self, id: Uuid) -> Result<ViewStatus> {
        let views = self.views_where(|record| record.id == id).await;
        views.into_iter().next().ok_or_else(|| Error::NotFound { what: "view", name: id.to_string() })
    }

    /// Open views, of one volume or of all, by time of opening.
    pub async fn views(&self, of: Option<Uuid>) -> Vec<ViewStatus> {
        self.views_where(|record| of.is_none_or(|volume| record.volume == volume)).await
    }

    async fn views_where(&self, wanted: impl Fn(&ViewRecord) -> bool) -> Vec<ViewStatus> {
        let slots: Vec<(ViewRecord, usize)> = {
            let registry = self.registry.read();
            let wanted = registry.views.values().filter(|slot| wanted(&slot.record));
            wanted.map(|slot| (slot.record.clone(), slot.shard)).collect()
        };
        let asked = slots.into_iter().map(|(record, shard)| async move {
            let id = record.id;
            let info =
                self.shards[shard].call(move |local, _| async move { local.engine.view(id).map(|view| view.info()) });
            let mut info = info.await.ok().flatten()?;
            if record.opened_ns != 0 {
                info.opened_ns = record.opened_ns; // it may have been reopened since
            }
            Some(ViewStatus { info, record })
        });
        let mut views: Vec<_> = futures::future::join_all(asked).await.into_iter().flatten().collect();
        let made = |view: &ViewStatus| view.record.mount.as_ref().is_some_and(|mount| !mount.device.is_empty());
        if views.iter().any(made)
            && let Ok(places) = mounts::places()
        {
            for view in views.iter_mut().filter(|view| made(view)) {
                // Otherwise somebody unmounted it by hand.
                let there = |mount: &MountRecord| mounts::is_mounted(&places, &mount.dir, &mount.device);
                view.record.mount = view.record.mount.take().filter(there);
            }
        }
        views.sort_by_key(|view| (view.info.opened_ns, view.info.id));
        views
    }

    /// Closes views whose time is over, as long as the agent runs.
    pub async fn expire_views(self: Arc<Self>) {
        loop {
            tokio::time::sleep(EXPIRY_INTERVAL).await;
            let now = wall_ns();
            let over = |record: &ViewRecord| record.expires_ns.is_some_and(|end| end <= now);
            let ended: Vec<ViewRecord> = {
                let registry = self.registry.read();
                registry.views.values().map(|slot| &slot.record).filter(|record| over(record)).cloned().collect()
            };
            for record in ended {
                match self.close_view(record.id, true).await {
                    Ok(_) => {
                        let message = format!(
                            "view {} at {} of {}: its time is over, it was closed",
                            record.id,
                            record.time_ns,
                            if record.owner.is_empty() { "nobody" } else { &record.owner }
                        );
                        self.events.publish_now(EventKind::ViewExpired, Some(record.volume), None, message);
                    }
                    Err(Error::NotFound { .. }) => {} // somebody else closed it just now
                    Err(error) => {
                        tracing::warn!(view = %record.id, %error, "its time is over, and it cannot be closed")
                    }
                }
            }
        }
    }
}

/// Removes what calls that ended with an earlier agent left: empty directories.
fn remove_private(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let _ = std::fs::remove_dir(entry.path()); // in use, or not ours
    }
}

fn no_files() -> Error {
    Error::State(
        "views are not local files on this host (FUSE is off or not to be had): nothing can be mounted".to_owned(),
    )
}

/// The directory that a path means, as the kernel will name it in its list of mounts: without links, also where its last parts are to be made.
async fn resolve_dir(images: &Path, dir: PathBuf) -> Result<PathBuf> {
    let near = images.parent().unwrap_or(images).to_owned();
    let own = |near: &Path, dir: &Path| ["views", "volumes"].iter().any(|name| dir.starts_with(near.join(name)));
    let refuse = |dir: &Path| Err(Error::invalid("mount", dir.display(), "not inside of the agent's own files"));
    // Looking below our own files from here could wait for ourselves.
    if own(&near, &dir) {
        return refuse(&dir);
    }
    blocking(move || {
        let there = dir.ancestors().find(|part| part.symlink_metadata().is_ok()).unwrap_or(Path::new("/"));
        let rest = dir.strip_prefix(there).expect("one of its ancestors");
        let real = there.canonicalize();
        let real = real.map_err(|error| Error::device("resolve", there.display().to_string(), &error))?;
        let real = if rest.as_os_str().is_empty() { real } else { real.join(rest) };
        if own(&near.canonicalize().unwrap_or(near), &real) { refuse(&dir) } else { Ok(real) }
    })
    .await
}

/// Has a directory to mount at. Whether it was made.
async fn prepare_dir(dir: &Path, private: bool) -> Result<bool> {
    let refuse = |why: &str| Err(Error::invalid("mount", dir.display(), why));
    let mounts = mounts::mounted().map_err(|error| Error::device("read", "/proc/self/mountinfo", &error))?;
    if mounts.iter().any(|mount| mount.dir == dir) {
        return refuse("a directory where nothing is mounted");
    }
    let dir = dir.to_owned();
    blocking(move || {
        use std::os::unix::fs::DirBuilderExt as _;
        let failed = |error| Error::device("make directory", dir.display().to_string(), &error);
        match std::fs::metadata(&dir) {
            Ok(found) if found.is_dir() => {
                let mut entries = std::fs::read_dir(&dir).map_err(failed)?;
                return match entries.next() {
                    None => Ok(false),
                    Some(_) => Err(Error::invalid(
                        "mount",
                        dir.display(),
                        "an empty directory: a mount would hide what is in it",
                    )),
                };
            }
            Ok(_) => return Err(Error::invalid("mount", dir.display(), "a directory")),
            Err(_) => {}
        }
        let mode = if private { 0o700 } else { 0o755 };
        std::fs::DirBuilder::new().recursive(true).mode(mode).create(&dir).map_err(failed)?;
        Ok(true)
    })
    .await
}
