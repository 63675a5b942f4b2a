//! Where the journal of a volume is that this host has no fence for.
//!
//! A volume lives on one shard, and that shard's engine sees its own CDP disks alone: placed beside its journal, a volume whose fence is lost would be
//! served as one that never had any, without the acked writes that only the journal holds. So every shard is asked before such a volume is placed.

use std::cell::Cell;
use std::io;
use std::rc::Rc;

use cdp_journal::info::{Event, Health};
use cdp_journal::{Allocation, Device, Error, Identity, IoBuf, LocalFuture, Result, SECTOR, Slice, VolumeSpec};
use uuid::Uuid;

use super::{Control, Local, stopping};
use crate::state::VolumeRecord;

/// The volume that a shard is asked about, while it is: nothing happens to it meanwhile, so what the engine tells of it is nobody's event.
pub(super) type Asked = Rc<Cell<Option<Uuid>>>;

/// Whether an event only comes of being asked.
pub(super) fn of_asking(asked: &Asked, event: &Event) -> bool {
    event.volume.is_some() && event.volume == asked.get()
}

impl Control {
    /// The shard with a CDP disk that has history of this volume; `None`: there is none, or there is one shard only.
    ///
    /// # Errors
    /// Where disks of several shards have some. The newest acked writes may be on either, and an engine that has one of them says nothing of the others: which
    /// one counts is for somebody who knows them.
    pub(super) async fn find_journal(&self, record: &VolumeRecord) -> Result<Option<usize>> {
        if self.shards.len() == 1 {
            return Ok(None);
        }
        let volume = record.uuid;
        let mut found = Vec::new();
        for (number, shard) in self.shards.iter().enumerate() {
            let asked = shard.call(move |local, _| async move { history_of(&local, volume).await });
            found.extend(asked.await.unwrap_or_else(|_| Err(stopping()))?.map(|words| (number, words)));
        }
        match &found[..] {
            [] => Ok(None),
            [(shard, _)] => Ok(Some(*shard)),
            several => {
                let words: Vec<&str> = several.iter().map(|(_, words)| words.as_str()).collect();
                Err(Error::State(format!(
                    "CDP disks of several shards hold history of volume {volume}, for which this host has no fence, and one of them at most is its newest \
                     ({}): take all but that one out of the configuration and restart the agent",
                    words.join("; ")
                )))
            }
        }
    }
}

/// What a shard says of the history that its CDP disks have of a volume that is not open: the engine tells it of a volume without a fence that it opens, and
/// does nothing else then.
async fn history_of(local: &Local, volume: Uuid) -> Result<Option<String>> {
    let spec = VolumeSpec {
        id: volume,
        name: volume.to_string(),
        path: String::new(),
        size: SECTOR,
        primary: Rc::new(NoPrimary),
        fence: None,
        accept: None,
        attach_journal: false,
        undecided_reverts: Vec::new(),
    };
    local.asked.set(Some(volume));
    let asked = async {
        let info = local.engine.open_volume(spec).await?.info();
        local.engine.close_volume(volume).await?;
        // Its own words, without what to do about it: that is another thing where there are several.
        let words = || info.health_reason.split(", but").next().unwrap_or_default().to_owned();
        Ok((info.health == Health::NeedsJournal).then(words))
    };
    let answer = asked.await;
    local.asked.set(None);
    answer
}

/// Stands in for the primary of a volume that is only asked about.
struct NoPrimary;

impl NoPrimary {
    fn refuse<T: 'static>() -> LocalFuture<'static, io::Result<T>> {
        Box::pin(async { Err(io::ErrorKind::Unsupported.into()) })
    }
}

impl Device for NoPrimary {
    fn size(&self) -> u64 {
        SECTOR
    }

    fn current_size(&self) -> io::Result<u64> {
        Ok(SECTOR)
    }

    fn physical_block(&self) -> u32 {
        512
    }

    fn identity(&self) -> io::Result<Identity> {
        Ok(Identity::default())
    }

    fn read(&self, _: u64, buf: IoBuf) -> LocalFuture<'static, (io::Result<()>, IoBuf)> {
        Box::pin(async { (Err(io::ErrorKind::Unsupported.into()), buf) })
    }

    fn write(&self, _: u64, _: Vec<Slice>) -> LocalFuture<'static, io::Result<()>> {
        Self::refuse()
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> LocalFuture<'static, io::Result<()>> {
        Self::refuse()
    }

    /// Closing a volume ends with this, and there is nothing to be made durable.
    fn sync(&self) -> LocalFuture<'static, io::Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn allocation(&self, _: u64, _: u64) -> LocalFuture<'static, io::Result<Vec<Allocation>>> {
        Self::refuse()
    }
}
