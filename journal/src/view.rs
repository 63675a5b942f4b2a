//! A view: a volume as it was at an instant. Nothing is materialised; each read is resolved when it comes.
//!
//! A writable view puts its writes into a scratch overlay in memory, with a bound of its own, that goes with the view.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use uuid::Uuid;

use crate::buf::{IoBuf, Slice};
use crate::engine::{BlockStatus, ClientGuard, Export};
use crate::error::{Error, Result};
use crate::host::LocalFuture;
use crate::index::Touched;
use crate::info::{EventKind, ViewInfo};
use crate::log::Log;
use crate::overlay::{Content, Overlay, copy_sectors};
use crate::types::{BLOCK, Instant, SECTOR};
use crate::volume::{Mode, Volume, blocks_of, check_range, read::Point};

/// See the module's text.
pub struct View {
    id: Uuid,
    volume: Rc<Volume>,
    /// The instant it shows.
    pub(crate) time: Instant,
    /// The log in which the instant lies.
    pub(crate) log: Rc<Log>,
    size: u64,
    snapshot_name: String,
    writable: bool,
    scratch: RefCell<Overlay>,
    scratch_bytes_max: u64,
    opened_ns: u64,
    lost: RefCell<Option<String>>,
    clients: RefCell<BTreeMap<u64, Option<Box<dyn FnOnce()>>>>,
    client_next: Cell<u64>,
}

impl Volume {
    /// Opens a view. Idempotent per instant: a read-only view that is already open is answered again.
    pub async fn open_view(self: &Rc<Self>, time: Instant, snapshot_name: &str, writable: bool) -> Result<Rc<View>> {
        if !writable
            && let Some(view) =
                self.state.borrow().views.values().find(|v| v.time == time && !v.writable && v.lost().is_none())
        {
            return Ok(Rc::clone(view));
        }
        self.open_another_view(time, snapshot_name, writable).await
    }

    /// Opens a view of its own, whichever are open.
    pub async fn open_another_view(
        self: &Rc<Self>,
        time: Instant,
        snapshot_name: &str,
        writable: bool,
    ) -> Result<Rc<View>> {
        let id = Uuid::from_u64_pair(self.host.random_u64(), self.host.random_u64());
        let id = uuid::Builder::from_random_bytes(*id.as_bytes()).into_uuid();
        self.open_view_as(id, time, snapshot_name, writable).await
    }

    /// As it was opened before a restart, under its old id.
    pub async fn reopen_view(self: &Rc<Self>, id: Uuid, time: Instant, snapshot_name: &str) -> Result<Rc<View>> {
        if let Some(view) = self.state.borrow().views.get(&id) {
            return Ok(Rc::clone(view));
        }
        self.open_view_as(id, time, snapshot_name, false).await
    }

    async fn open_view_as(
        self: &Rc<Self>,
        id: Uuid,
        time: Instant,
        snapshot_name: &str,
        writable: bool,
    ) -> Result<Rc<View>> {
        self.serving()?;
        let engine = self.engine()?;
        self.until_not_reverting().await;
        let now = engine.tick().await?;
        self.viewable(time, now)?;
        let config = engine.config().clone();
        // Every write at or before the instant is in the journal before the view answers.
        self.completed_up_to(time).await;
        // And durable: what an instant has once shown, and what was copied of it, no power cut may change.
        let (disk, upto) = {
            let state = self.state.borrow();
            (state.attach.as_ref().map(|attach| Rc::clone(&attach.disk)), time.min(state.instant_last))
        };
        if let Some(disk) = disk {
            self.sync_journal(&disk, upto).await?;
        }
        let log = self.viewable(time, now)?;
        let mut state = self.state.borrow_mut();
        // While the journal is left the primary moves on without before-images; views that were open have been lost.
        if state.mode != Mode::Journal || state.attach.as_ref().is_none_or(|a| a.disk.failure().is_some()) {
            return Err(Error::State(format!("volume {:?} is leaving its journal: its history ends", state.name)));
        }
        if state.views.len() >= config.views_max {
            return Err(Error::NoSpace { what: "views of a volume", needed: 1, free: 0 });
        }
        drop(state);
        let view = Rc::new(View {
            id,
            volume: Rc::clone(self),
            time,
            log,
            size: self.size_at(time),
            snapshot_name: snapshot_name.to_owned(),
            writable,
            scratch: RefCell::default(),
            scratch_bytes_max: config.scratch_bytes_max,
            opened_ns: self.host.wall_ns(),
            lost: RefCell::new(None),
            clients: RefCell::default(),
            client_next: Cell::new(0),
        });
        state = self.state.borrow_mut();
        state.views.insert(id, Rc::clone(&view));
        drop(state);
        self.event(EventKind::ViewOpened, format!("view {id} at {time}"));
        Ok(view)
    }

    /// Closes a view: its clients are disconnected, its scratch goes.
    pub async fn close_view(self: &Rc<Self>, id: Uuid) -> Result<()> {
        let view = self.state.borrow_mut().views.remove(&id);
        let view = view.ok_or_else(|| Error::NotFound { what: "view", name: id.to_string() })?;
        view.lose("closed");
        self.changed.notify();
        self.event(EventKind::ViewClosed, format!("view {id} at {}", view.time));
        Ok(())
    }
}

impl View {
    /// Its id, which is its export name too.
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// Everything about it.
    pub fn info(&self) -> ViewInfo {
        ViewInfo {
            id: self.id,
            volume: self.volume.id(),
            time: self.time,
            snapshot_name: self.snapshot_name.clone(),
            size: self.size,
            writable: self.writable,
            scratch_bytes: self.scratch.borrow().bytes(),
            scratch_bytes_max: if self.writable { self.scratch_bytes_max } else { 0 },
            opened_ns: self.opened_ns,
            clients: self.clients.borrow().len() as u32,
            lost: self.lost(),
        }
    }

    /// As something that a frontend serves.
    pub fn export(self: &Rc<Self>) -> Rc<dyn Export> {
        Rc::new(ViewExport(Rc::clone(self)))
    }

    /// Reads fail from now on, and clients are asked to go.
    pub(crate) fn lose(&self, why: &str) {
        self.lost.borrow_mut().get_or_insert_with(|| why.to_owned());
        let calls: Vec<_> = self.clients.borrow_mut().values_mut().filter_map(Option::take).collect();
        for call in calls {
            call();
        }
    }

    /// Why reads fail, where they do: it was lost, or will be told so in a moment, since its log is gone.
    fn lost(&self) -> Option<String> {
        let told = self.lost.borrow().clone();
        told.or_else(|| self.log.state.borrow().gone.then(|| "its log was evicted".to_owned()))
    }

    fn check(&self, offset: u64, len: u64) -> Result<()> {
        if let Some(why) = self.lost() {
            return Err(Error::Gone(format!("view {}: {why}", self.id)));
        }
        check_range(offset, len, self.size)
    }

    fn point(&self) -> Point {
        Point::At(self.time, Rc::clone(&self.log))
    }

    async fn read(self: Rc<Self>, offset: u64, len: u64) -> Result<Vec<Slice>> {
        self.check(offset, len)?;
        let (first, count) = blocks_of(offset, len);
        let parts = self.volume.read_at(&self.point(), offset, len).await?;
        // Lost meanwhile (its log was evicted, or the CDP disk failed and the primary moves on without before-images): what was read may be newer.
        self.check(offset, len)?;
        if !self.writable || !self.scratch.borrow().intersects(first, count) {
            return Ok(parts);
        }
        // The scratch on top, block by block.
        let mut buf = IoBuf::zeroed((count * BLOCK) as usize);
        let mut at = (offset - first * BLOCK) as usize;
        for part in parts {
            buf[at..at + part.len()].copy_from_slice(&part);
            at += part.len();
        }
        let scratch = self.scratch.borrow();
        for block in first..first + count {
            let at = ((block - first) * BLOCK) as usize;
            match scratch.get(block) {
                Some(Content::Data(data, mask)) => copy_sectors(&mut buf[at..at + BLOCK as usize], data, *mask),
                Some(Content::Zero) => buf[at..at + BLOCK as usize].fill(0),
                None => {}
            }
        }
        Ok(vec![buf.share().slice((offset - first * BLOCK) as usize, len as usize)])
    }

    fn check_write(&self, offset: u64, len: u64, payload: u64) -> Result<()> {
        self.check(offset, len)?;
        if !self.writable {
            return Err(Error::Device {
                op: "write to",
                device: format!("view {}", self.id),
                message: "the view is read-only".into(),
                errno: 1,
            });
        }
        let used = self.scratch.borrow().bytes();
        if used + payload > self.scratch_bytes_max {
            return Err(Error::NoSpace {
                what: "scratch of the view",
                needed: payload,
                free: self.scratch_bytes_max.saturating_sub(used),
            });
        }
        Ok(())
    }

    fn write(&self, offset: u64, len: u64, data: IoBuf) -> Result<()> {
        let (_, count) = blocks_of(offset, len);
        self.check_write(offset, len, count * BLOCK)?;
        if (data.len() as u64) < count * BLOCK {
            return Err(Error::invalid("payload buffer", data.len(), format!("at least {} bytes", count * BLOCK)));
        }
        let mut scratch = self.scratch.borrow_mut();
        scratch.insert_data(offset / SECTOR, len / SECTOR, &data.share(), Instant::ZERO);
        scratch.forget_queue();
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.check_write(offset, len, 2 * BLOCK)?;
        let mut scratch = self.scratch.borrow_mut();
        scratch.insert_zero(offset / SECTOR, len / SECTOR, Instant::ZERO);
        scratch.forget_queue();
        Ok(())
    }

    pub(crate) fn has_clients(&self) -> bool {
        !self.clients.borrow().is_empty()
    }

    fn connect(self: &Rc<Self>, writable: bool, on_disconnect: Box<dyn FnOnce()>) -> Result<ClientGuard> {
        self.check(0, SECTOR)?;
        if writable && !self.writable {
            return Err(Error::State(format!("view {} is read-only", self.id)));
        }
        let id = self.client_next.get();
        self.client_next.set(id + 1);
        self.clients.borrow_mut().insert(id, Some(on_disconnect));
        let view = Rc::clone(self);
        Ok(ClientGuard::new(move || {
            view.clients.borrow_mut().remove(&id);
        }))
    }
}

struct ViewExport(Rc<View>);

impl Export for ViewExport {
    fn size(&self) -> u64 {
        self.0.size
    }
    fn read_only(&self) -> bool {
        !self.0.writable
    }
    fn read(&self, offset: u64, len: u32) -> LocalFuture<'static, Result<Vec<Slice>>> {
        Box::pin(Rc::clone(&self.0).read(offset, u64::from(len)))
    }
    fn write(&self, offset: u64, len: u32, data: IoBuf, _fua: bool) -> LocalFuture<'static, Result<()>> {
        let result = self.0.write(offset, u64::from(len), data);
        Box::pin(async move { result })
    }
    fn write_zeroes(&self, offset: u64, len: u32, _no_hole: bool, _fua: bool) -> LocalFuture<'static, Result<()>> {
        let result = self.0.write_zeroes(offset, u64::from(len));
        Box::pin(async move { result })
    }
    fn trim(&self, offset: u64, len: u32) -> LocalFuture<'static, Result<()>> {
        let result = self.0.check_write(offset, u64::from(len), 0);
        Box::pin(async move { result })
    }
    fn flush(&self) -> LocalFuture<'static, Result<()>> {
        let result = self.0.check(0, SECTOR);
        Box::pin(async move { result })
    }
    fn status(&self, offset: u64, len: u64) -> LocalFuture<'static, Result<Vec<BlockStatus>>> {
        let view = Rc::clone(&self.0);
        Box::pin(async move {
            view.check(offset, len)?;
            let (first, count) = blocks_of(offset, len);
            if view.writable && view.scratch.borrow().intersects(first, count) {
                return Ok(vec![BlockStatus { len, hole: false, zero: false }]);
            }
            let told = view.volume.status_at(&view.point(), offset, len).await?;
            // It may have lost its history meanwhile.
            view.check(offset, len)?;
            Ok(told)
        })
    }
    fn changed_since(&self, since: Instant) -> LocalFuture<'static, Result<Rc<Touched>>> {
        let view = Rc::clone(&self.0);
        Box::pin(async move {
            view.check(0, SECTOR)?;
            if view.writable {
                return Err(Error::State(format!(
                    "view {} is writable: what changed is told by a read-only one",
                    view.id
                )));
            }
            if since > view.time {
                let bound = format!("not after the view's own instant, which is {}", view.time);
                return Err(Error::invalid("since", since, bound));
            }
            let mut changed = view.volume.changed_between(since, view.time).await?;
            // What was not there then is new.
            let size = view.volume.size_at(since);
            if size < view.size {
                let first = size / BLOCK;
                changed.insert_range(first, view.size.div_ceil(BLOCK) - first);
            }
            Ok(Rc::new(changed))
        })
    }
    fn connect(&self, writable: bool, on_disconnect: Box<dyn FnOnce()>) -> Result<ClientGuard> {
        self.0.connect(writable, on_disconnect)
    }
}
