//! Groups: several volumes under one name, such as the disks of one VM. Any list of volumes can be marked, viewed and reverted at one instant; a
//! group only spares naming them.

use cdp_journal::{Error, Instant, Result};
use futures::future::join_all;
use uuid::Uuid;

use crate::config::GroupConfig;
use crate::control::{Control, Resolved, Terms, ViewStatus};
use crate::state::GroupRecord;

/// A group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Its name. Neither the configuration nor a call gives it to a volume, too; but one of the two may be added, and the other be configured later.
    pub name: String,
    /// Names or uuids of its volumes.
    pub members: Vec<String>,
    /// It stands in the configuration file.
    pub configured: bool,
}

/// Most groups of a host.
const GROUPS_MAX: usize = 4096;

impl Control {
    /// The groups of the configuration, and those that were added before. One with the name of a volume keeps nobody from being served: whoever uses that name for several
    /// volumes is told ([`Control::group_members`]).
    pub(crate) fn take_groups(&self, configured: &[GroupConfig], added: Vec<GroupRecord>) {
        let mut registry = self.registry.write();
        for record in added {
            let members = record.volumes.iter().map(Uuid::to_string).collect();
            registry.groups.insert(record.name.clone(), Group { name: record.name, members, configured: false });
        }
        for group in configured {
            let known = Group { name: group.name.clone(), members: group.volumes.clone(), configured: true };
            if registry.groups.insert(group.name.clone(), known).is_some_and(|old| !old.configured) {
                tracing::warn!(
                    group = group.name,
                    "it was added, and the configuration has it too: the configuration counts"
                );
            }
        }
    }

    /// Groups by name.
    pub fn groups(&self) -> Vec<Group> {
        self.registry.read().groups.values().cloned().collect()
    }

    /// The volumes of a group; `None`: there is no such group.
    ///
    /// # Errors
    /// A volume has that name, too: a forced revert, say, must not be about disks that nobody meant.
    pub fn group_members(&self, name: &str) -> Result<Option<Vec<String>>> {
        let Some(members) = self.registry.read().groups.get(name).map(|group| group.members.clone()) else {
            return Ok(None);
        };
        match self.resolve(name) {
            Ok(volume) => Err(Error::invalid(
                "volumes",
                format!("{name:?}, a group of {} and the volume {}", members.len(), volume.uuid),
                "a name of one of both: give uuids, and one of them another name",
            )),
            Err(_) => Ok(Some(members)),
        }
    }

    /// A group that a volume is in.
    pub(crate) fn group_with(&self, volume: Uuid) -> Option<Group> {
        self.groups().into_iter().find(|group| {
            group.members.iter().any(|member| self.resolve(member).is_ok_and(|member| member.uuid == volume))
        })
    }

    /// Names volumes as one. The same group once more is no error.
    pub async fn add_group(&self, name: &str, volumes: &[Resolved]) -> Result<Group> {
        let _changing = self.changing.lock().await;
        if self.resolve(name).is_ok() || self.registry.read().has_left(name) {
            return Err(Error::Exists { what: "volume", name: name.to_owned() });
        }
        // They were looked up before this call had its turn.
        if let Some(gone) = volumes.iter().find(|volume| self.resolved(volume.uuid).is_none()) {
            return Err(Error::NotFound { what: "volume", name: gone.name.clone() });
        }
        let members: Vec<String> = volumes.iter().map(|volume| volume.uuid.to_string()).collect();
        let group = Group { name: name.to_owned(), members, configured: false };
        {
            let mut registry = self.registry.write();
            match registry.groups.get(name) {
                Some(known) if *known == group => return Ok(group),
                Some(_) => return Err(Error::Exists { what: "group", name: name.to_owned() }),
                None if registry.groups.len() >= GROUPS_MAX => {
                    return Err(Error::NoSpace { what: "groups", needed: 1, free: 0 });
                }
                None => registry.groups.insert(name.to_owned(), group.clone()),
            };
        }
        if let Err(error) = self.record_groups().await {
            self.registry.write().groups.remove(name);
            return Err(error);
        }
        Ok(group)
    }

    /// Forgets a group.
    pub async fn remove_group(&self, name: &str) -> Result<Group> {
        let _changing = self.changing.lock().await;
        let group = {
            let mut registry = self.registry.write();
            let configured = registry.groups.get(name).map(|group| group.configured);
            match configured {
                None => return Err(Error::NotFound { what: "group", name: name.to_owned() }),
                Some(true) => {
                    return Err(Error::State(format!(
                        "group {name:?} is part of the configuration file: take it out there and restart the agent"
                    )));
                }
                Some(false) => registry.groups.remove(name),
            }
        };
        let group = group.ok_or_else(|| Error::NotFound { what: "group", name: name.to_owned() })?;
        if let Err(error) = self.record_groups().await {
            self.registry.write().groups.insert(name.to_owned(), group);
            return Err(error);
        }
        Ok(group)
    }

    /// A volume that is gone is in no group; one that was the last member takes its group along. The caller holds `changing`.
    pub(crate) async fn leave_groups(&self, volume: Uuid) -> Result<()> {
        let left = {
            let mut registry = self.registry.write();
            let before: usize = registry.groups.values().map(|group| group.members.len()).sum();
            for group in registry.groups.values_mut().filter(|group| !group.configured) {
                group.members.retain(|member| *member != volume.to_string());
            }
            registry.groups.retain(|_, group| !group.members.is_empty());
            before != registry.groups.values().map(|group| group.members.len()).sum::<usize>()
        };
        if left { self.record_groups().await } else { Ok(()) }
    }

    async fn record_groups(&self) -> Result<()> {
        let added = self.groups().into_iter().filter(|group| !group.configured);
        let records: Vec<GroupRecord> = added
            .map(|group| GroupRecord {
                name: group.name,
                volumes: group.members.iter().filter_map(|member| Uuid::parse_str(member).ok()).collect(),
            })
            .collect();
        self.recorded("groups", self.state().put_groups(&records).await)
    }

    /// Opens a view of each volume at one instant, all or none. Answers in the order given.
    pub async fn open_views(
        &self,
        volumes: &[Resolved],
        time: Instant,
        name: &str,
        writable: bool,
        terms: &Terms,
    ) -> Result<Vec<ViewStatus>> {
        let _changing = self.changing.lock().await;
        let before = join_all(volumes.iter().map(|volume| self.views(Some(volume.uuid)))).await;
        let was_open = |id: Uuid| before.iter().flatten().any(|view| view.info.id == id);
        let mut views: Vec<ViewStatus> = Vec::new();
        for volume in volumes {
            match self.open_view_locked(volume.uuid, time, name.to_owned(), writable, terms.clone()).await {
                Ok(view) => views.push(view),
                Err(error) => {
                    // A part of a group would be taken for all of it.
                    for view in views.iter().map(|view| &view.info).filter(|view| !was_open(view.id)) {
                        if let Err(failure) = self.close_view_locked(view.id).await {
                            tracing::warn!(view = %view.id, %failure, "a view of a group that could not be opened stays");
                        }
                    }
                    return Err(error);
                }
            }
        }
        Ok(views)
    }
}
