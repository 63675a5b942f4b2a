//! Where the journal of a volume is that this host has no fence for.
//!
//! A volume lives on one shard, and that shard's engine sees its own CDP disks alone: placed away from its journal, a volume whose fence is lost would be
//! served as one that never had any, without the acked writes that only the journal holds. So every shard is asked before such a volume is placed.

use cdp_journal::{Error, Result};

use super::{Control, stopping};
use crate::state::VolumeRecord;

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
            let disks = shard.call(move |local, _| async move { local.engine.disks_with(volume) });
            let disks = disks.await.map_err(|_| stopping())?;
            found.extend((!disks.is_empty()).then_some((number, disks)));
        }
        match &found[..] {
            [] => Ok(None),
            [(shard, _)] => Ok(Some(*shard)),
            several => {
                let disks: Vec<String> = several.iter().flat_map(|(_, disks)| disks).cloned().collect();
                Err(Error::State(format!(
                    "CDP disks of several shards hold history of volume {volume}, for which this host has no fence, and one of them at most is its newest \
                     ({}): take all but that one out of the configuration and restart the agent",
                    disks.join(", ")
                )))
            }
        }
    }
}
