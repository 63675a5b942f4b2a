//! Which instant a request means, and what lies around it.

use cdp_journal::info::{FlushNear, Marker};
use cdp_journal::{Error, Instant, Result};
use cdp_proto::v1;
use futures::future::join_all;
use uuid::Uuid;

use super::request::At;
use super::{Service, convert, volume_result};
use crate::control::Resolved;

/// How often the search for an instant that is flush-clean in several volumes goes one flush back.
const STEPS_MAX: usize = 10_000;

impl Service {
    /// The instant that a request means, for one volume.
    pub(super) async fn instant_of(&self, volume: &Resolved, at: &At) -> Result<Instant> {
        self.group_instant(std::slice::from_ref(volume), at).await
    }

    /// One instant for all volumes of a call: by a marker, it must be the same in each.
    pub(super) async fn group_instant(&self, volumes: &[Resolved], at: &At) -> Result<Instant> {
        let (at, flush_before) = match at {
            At::FlushBefore(at) => (&**at, true),
            at => (at, false),
        };
        let mut found: Option<(Instant, &Resolved)> = None;
        for volume in volumes {
            let instant = self.plain_instant(volume.uuid, at).await?;
            match found {
                Some((first, other)) if first != instant => {
                    let value = format!("{instant} in {:?}, {first} in {:?}", volume.name, other.name);
                    return Err(Error::invalid("snapshot_name", value, "the same instant in each volume"));
                }
                _ => found = Some((instant, volume)),
            }
            // "Ago" is counted once, so that it is one instant.
            if !matches!(at, At::Marker(_) | At::NotBefore(..)) {
                break;
            }
        }
        let (instant, _) = found.ok_or_else(|| Error::invalid("volumes", 0, "at least one"))?;
        if flush_before { self.flush_clean(volumes, instant).await } else { Ok(instant) }
    }

    async fn plain_instant(&self, volume: Uuid, at: &At) -> Result<Instant> {
        let name = match at {
            At::Time(time) => return Ok(Instant(*time)),
            At::Ago(ago) => {
                let now = self.control.instant().await?;
                let bound = "not more than the time since the epoch";
                return now.0.checked_sub(*ago).map(Instant).ok_or_else(|| Error::invalid("ago_ns", ago, bound));
            }
            At::Marker(name) | At::NotBefore(name, _) => name.clone(),
            At::FlushBefore(_) => return Err(Error::invalid("flush_before", "twice", "once")),
        };
        let marker = {
            let name = name.clone();
            self.control.on_volume(volume, |volume| async move { Ok(volume.marker(&name)) }).await?
        };
        let marker = marker.ok_or(Error::NotFound { what: "marker", name: name.clone() })?;
        match at {
            At::NotBefore(_, time) if *time < marker.time.0 => {
                let bound = format!("not before its marker {name:?}, which is at {}", marker.time);
                Err(Error::invalid("timestamp", time, bound))
            }
            At::NotBefore(_, time) => Ok(Instant(*time)),
            _ => Ok(marker.time),
        }
    }

    async fn flush_near(&self, volume: Uuid, at: Instant) -> Result<FlushNear> {
        self.control.on_volume(volume, move |volume| async move { volume.flush_near(at).await }).await
    }

    /// The newest instant at or before `at` that is flush-clean in every volume. A volume stays clean from its flush to its next change, so with
    /// several of them the instant may lie behind the flush of each.
    async fn flush_clean(&self, volumes: &[Resolved], at: Instant) -> Result<Instant> {
        let mut at = at;
        for _ in 0..STEPS_MAX {
            let mut unclean: Option<Instant> = None;
            let mut newest = Instant::ZERO;
            for volume in volumes {
                let before = self.flush_near(volume.uuid, at).await?.before;
                let flush = before.ok_or_else(|| Error::NotFound {
                    what: "flush-clean instant",
                    name: format!("of volume {:?} at or before {at}", volume.name),
                })?;
                newest = newest.max(flush);
                let changed = self
                    .control
                    .on_volume(volume.uuid, move |volume| async move { volume.changes(flush, at, 0, 0).await })
                    .await;
                // A stretch whose writes are not kept is not known to be without any.
                if !matches!(changed, Ok(list) if list.total == 0) {
                    unclean = Some(unclean.map_or(flush, |other| other.min(flush)));
                }
            }
            match unclean {
                // The newest flush of all: nothing changed between it and where the search stands.
                None => return Ok(newest),
                Some(flush) => at = flush,
            }
        }
        Err(Error::NotFound {
            what: "instant",
            name: format!("that is flush-clean in all {} volumes, in {STEPS_MAX} flushes before", volumes.len()),
        })
    }

    /// What lies around an instant, per volume.
    pub(super) async fn locate_all(
        &self,
        volumes: Vec<(String, Result<Resolved>)>,
        at: &At,
    ) -> Result<v1::LocateResponse> {
        let known: Vec<Resolved> = volumes.iter().filter_map(|(_, volume)| volume.as_ref().ok().cloned()).collect();
        if let (true, Some((_, Err(error)))) = (known.is_empty(), volumes.first()) {
            return Err(error.clone());
        }
        let time = self.group_instant(&known, at).await?;
        let results = join_all(volumes.into_iter().map(|(name, volume)| self.located(name, volume, time))).await;
        Ok(v1::LocateResponse { time: time.0, results })
    }

    async fn located(&self, asked: String, volume: Result<Resolved>, at: Instant) -> v1::Located {
        let around = async {
            let volume = volume.clone()?;
            let near = self.flush_near(volume.uuid, at).await?;
            let info = self.control.info(volume.uuid).await?;
            Ok((near, info))
        };
        match around.await {
            Err(error) => v1::Located {
                result: Some(volume_result(asked, volume.as_ref().ok(), Some(&error))),
                ..v1::Located::default()
            },
            Ok((near, info)) => {
                let before = |marker: &&Marker| marker.time <= at;
                v1::Located {
                    result: Some(volume_result(asked, volume.as_ref().ok(), None)),
                    viewable: at <= info.now
                        && info.coverage.iter().any(|i| i.start <= at && i.end.is_none_or(|end| at <= end)),
                    flush_before: near.before.map_or(0, |instant| instant.0),
                    flush_after: near.after.map_or(0, |instant| instant.0),
                    // Markers come by instant.
                    snap_before: info.markers.iter().rfind(before).map(convert::snap),
                    snap_after: info.markers.iter().find(|marker| marker.time > at).map(convert::snap),
                }
            }
        }
    }

    /// Where each volume goes when its newest revert is undone.
    pub(super) async fn before_last_revert(&self, volume: &Resolved) -> Result<Instant> {
        let reverts = self.control.on_volume(volume.uuid, |volume| async move { volume.reverts().await }).await?;
        let last = reverts.last().map(|revert| revert.instant.before());
        last.ok_or_else(|| Error::NotFound { what: "revert to undo", name: volume.name.clone() })
    }
}
