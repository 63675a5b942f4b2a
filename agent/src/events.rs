//! State changes, from whoever sees them to whoever watches: a ring of recent ones and a bounded broadcast.
//!
//! Publishing never blocks and never waits for a watcher. A watcher that is too slow loses the oldest events and is told how
//! many ([`Watch`]).

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{SystemTime, UNIX_EPOCH};

use cdp_journal::info::{Event as EngineEvent, EventKind as EngineKind};
use cdp_proto::v1::{Event, EventKind};
use parking_lot::Mutex;
use tokio::sync::broadcast;
use tokio_stream::Stream;
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::wrappers::errors::BroadcastStreamRecvError;
use uuid::Uuid;

/// Events kept for replay, and the number by which a watcher may fall behind.
pub const EVENTS_MAX: usize = 1024;

/// See the module's text. Shared behind an `Arc` by shards and the control plane.
pub struct EventHub {
    recent: Mutex<Recent>,
    sender: broadcast::Sender<Arc<Event>>,
}

struct Recent {
    events: VecDeque<Arc<Event>>,
    names: HashMap<Uuid, String>,
    counts: HashMap<EventKind, u64>,
}

impl Default for EventHub {
    fn default() -> Self {
        let recent =
            Recent { events: VecDeque::with_capacity(EVENTS_MAX), names: HashMap::new(), counts: HashMap::new() };
        Self { recent: Mutex::new(recent), sender: broadcast::channel(EVENTS_MAX).0 }
    }
}

impl EventHub {
    /// Takes an engine's event; called on the shard's thread.
    pub fn publish_engine(&self, event: EngineEvent) {
        let EngineEvent { time_ns, volume, disk, kind, message } = event;
        self.publish(time_ns, volume, disk, event_kind(kind), message);
    }

    /// Takes an event of the control plane.
    pub fn publish_now(&self, kind: EventKind, volume: Option<Uuid>, disk: Option<String>, message: String) {
        self.publish(wall_ns(), volume, disk, kind, message);
    }

    fn publish(&self, time: u64, volume: Option<Uuid>, disk: Option<String>, kind: EventKind, message: String) {
        let mut recent = self.recent.lock();
        let event = Arc::new(Event {
            time,
            volume_uuid: volume.map(|id| id.to_string()).unwrap_or_default(),
            volume_name: volume.and_then(|id| recent.names.get(&id).cloned()).unwrap_or_default(),
            disk: disk.unwrap_or_default(),
            kind: kind.into(),
            message,
        });
        log(&event, kind);
        if recent.events.len() == EVENTS_MAX {
            recent.events.pop_front();
        }
        recent.events.push_back(Arc::clone(&event));
        *recent.counts.entry(kind).or_default() += 1;
        // Under the lock, so that a new watcher sees each event once: in its replay or in its stream.
        let _ = self.sender.send(event); // nobody watches: that is fine
    }

    /// Tells the name that events about a volume carry.
    pub fn name_volume(&self, id: Uuid, name: &str) {
        self.recent.lock().names.insert(id, name.to_owned());
    }

    /// Begins with up to `replay` recent events about `volumes` (empty: all events); goes on with new ones if `follow`.
    pub fn watch(&self, volumes: Vec<Uuid>, replay: usize, follow: bool) -> Watch {
        let volumes: Vec<String> = volumes.iter().map(Uuid::to_string).collect();
        let recent = self.recent.lock();
        let mut replayed: VecDeque<_> =
            recent.events.iter().rev().filter(|event| wanted(&volumes, event)).take(replay).cloned().collect();
        replayed.make_contiguous().reverse();
        let live = follow.then(|| BroadcastStream::new(self.sender.subscribe()));
        Watch { replayed, live, volumes }
    }

    /// How many events of each kind there were.
    pub fn counts(&self) -> Vec<(EventKind, u64)> {
        let mut counts: Vec<_> = self.recent.lock().counts.iter().map(|(kind, count)| (*kind, *count)).collect();
        counts.sort_by_key(|(kind, _)| *kind as i32);
        counts
    }
}

/// The events for one watcher.
pub struct Watch {
    replayed: VecDeque<Arc<Event>>,
    live: Option<BroadcastStream<Arc<Event>>>,
    volumes: Vec<String>,
}

impl Stream for Watch {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Event>> {
        if let Some(event) = self.replayed.pop_front() {
            return Poll::Ready(Some(Event::clone(&event)));
        }
        let this = &mut *self;
        let Some(live) = &mut this.live else { return Poll::Ready(None) };
        loop {
            return match Pin::new(&mut *live).poll_next(context) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(None) => Poll::Ready(None),
                Poll::Ready(Some(Ok(event))) if !wanted(&this.volumes, &event) => continue,
                Poll::Ready(Some(Ok(event))) => Poll::Ready(Some(Event::clone(&event))),
                Poll::Ready(Some(Err(BroadcastStreamRecvError::Lagged(count)))) => Poll::Ready(Some(missed(count))),
            };
        }
    }
}

fn wanted(volumes: &[String], event: &Event) -> bool {
    volumes.is_empty() || volumes.contains(&event.volume_uuid)
}

fn missed(count: u64) -> Event {
    let message = format!("{count} events were lost because this client read too slowly");
    Event { time: wall_ns(), kind: EventKind::Missed.into(), message, ..Event::default() }
}

/// An event is a state change, so it is logged where it is published.
fn log(event: &Event, kind: EventKind) {
    let (volume, disk, message, kind_word) = (&event.volume_name, &event.disk, &event.message, kind.word());
    match kind {
        EventKind::Offline
        | EventKind::NeedsJournal
        | EventKind::PrimaryChanged
        | EventKind::PrimaryFailing
        | EventKind::RevertIncomplete
        | EventKind::StateFailing
        | EventKind::Damage => tracing::error!(kind = kind_word, volume, disk, "{message}"),
        EventKind::EvictedEarly
        | EventKind::WindowShort
        | EventKind::ViewLost
        | EventKind::BacklogFull
        | EventKind::ClockLead
        | EventKind::ClockStep
        | EventKind::PrimaryResized => tracing::warn!(kind = kind_word, volume, disk, "{message}"),
        EventKind::Evicted => tracing::debug!(kind = kind_word, volume, disk, "{message}"),
        _ => tracing::info!(kind = kind_word, volume, disk, "{message}"),
    }
}

/// The engine's kind on the wire.
fn event_kind(kind: EngineKind) -> EventKind {
    match kind {
        EngineKind::Protected => EventKind::Protected,
        EngineKind::Offline => EventKind::Offline,
        EngineKind::Enabled => EventKind::Enabled,
        EngineKind::Disabled => EventKind::Disabled,
        EngineKind::Edited => EventKind::Edited,
        EngineKind::EvictedEarly => EventKind::EvictedEarly,
        EngineKind::Evicted => EventKind::Evicted,
        EngineKind::WindowShort => EventKind::WindowShort,
        EngineKind::ViewOpened => EventKind::ViewOpened,
        EngineKind::ViewClosed => EventKind::ViewClosed,
        EngineKind::ViewLost => EventKind::ViewLost,
        EngineKind::BacklogFull => EventKind::BacklogFull,
        EngineKind::BacklogDrained => EventKind::BacklogDrained,
        EngineKind::ClockLead => EventKind::ClockLead,
        EngineKind::ClockStep => EventKind::ClockStep,
        EngineKind::Reverted => EventKind::Reverted,
        EngineKind::RevertDone => EventKind::RevertDone,
        EngineKind::RevertIncomplete => EventKind::RevertIncomplete,
        EngineKind::PrimaryFailing => EventKind::PrimaryFailing,
        EngineKind::PrimaryRecovered => EventKind::PrimaryRecovered,
        EngineKind::PrimaryChanged => EventKind::PrimaryChanged,
        EngineKind::PrimaryResized => EventKind::PrimaryResized,
        EngineKind::NeedsJournal => EventKind::NeedsJournal,
        EngineKind::Recovered => EventKind::Recovered,
        EngineKind::Cleaned => EventKind::Cleaned,
        EngineKind::Marked => EventKind::Marked,
        EngineKind::Damage => EventKind::Damage,
        EngineKind::StateFailing => EventKind::StateFailing,
        EngineKind::StateRecovered => EventKind::StateRecovered,
    }
}

/// The wall clock, nanoseconds since the epoch.
pub fn wall_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_stream::StreamExt as _;

    fn publish(hub: &EventHub, volume: u128, message: impl ToString) {
        hub.publish_engine(EngineEvent {
            time_ns: 5,
            volume: Some(Uuid::from_u128(volume)),
            disk: None,
            kind: EngineKind::Enabled,
            message: message.to_string(),
        });
    }

    async fn messages(watch: Watch, count: usize) -> Vec<String> {
        watch.take(count).map(|event| event.message).collect().await
    }

    #[tokio::test]
    async fn a_watcher_sees_each_event_once_replayed_or_live() {
        let hub = EventHub::default();
        hub.name_volume(Uuid::from_u128(1), "one");
        for number in 0..5 {
            publish(&hub, 1, number);
        }
        let watch = hub.watch(Vec::new(), 3, true);
        publish(&hub, 2, 5);
        let events: Vec<Event> = watch.take(4).collect().await;
        assert_eq!(events.iter().map(|event| event.message.as_str()).collect::<Vec<_>>(), ["2", "3", "4", "5"]);
        assert_eq!((events[0].volume_name.as_str(), events[0].kind()), ("one", EventKind::Enabled));
        assert_eq!(events[3].volume_uuid, Uuid::from_u128(2).to_string());
        assert_eq!(hub.counts(), [(EventKind::Enabled, 6)]);
    }

    #[tokio::test]
    async fn without_follow_the_stream_ends_after_the_replay() {
        let hub = EventHub::default();
        publish(&hub, 1, "a");
        publish(&hub, 2, "b");
        publish(&hub, 1, "c");
        assert_eq!(messages(hub.watch(Vec::new(), 100, false), 100).await, ["a", "b", "c"]);
        assert_eq!(messages(hub.watch(vec![Uuid::from_u128(1)], 1, false), 100).await, ["c"]);
        assert_eq!(messages(hub.watch(vec![Uuid::from_u128(1)], 2, false), 100).await, ["a", "c"]);
        assert!(messages(hub.watch(Vec::new(), 0, false), 100).await.is_empty());
    }

    #[tokio::test]
    async fn only_the_volumes_asked_for_are_told() {
        let hub = EventHub::default();
        let watch = hub.watch(vec![Uuid::from_u128(7)], 0, true);
        for volume in [1, 7, 2, 7] {
            publish(&hub, volume, volume);
        }
        assert_eq!(messages(watch, 2).await, ["7", "7"]);
    }

    /// Goal: a watcher that does not read costs a bounded amount of memory, and learns how much it missed.
    #[tokio::test]
    async fn a_slow_watcher_is_told_how_many_it_missed() {
        let hub = EventHub::default();
        let mut watch = hub.watch(Vec::new(), 0, true);
        let total = EVENTS_MAX + 100;
        for number in 0..total {
            publish(&hub, 1, number);
        }
        let first = watch.next().await.expect("told");
        assert_eq!(first.kind(), EventKind::Missed);
        assert!(first.message.starts_with("100 events were lost"), "{}", first.message);
        assert_eq!(watch.next().await.expect("goes on").message, "100");
        let rest: Vec<Event> = watch.take(EVENTS_MAX - 1).collect().await;
        assert_eq!(rest.last().expect("all that were kept").message, (total - 1).to_string());
        assert_eq!(messages(hub.watch(Vec::new(), usize::MAX, false), usize::MAX).await.len(), EVENTS_MAX);
    }

    #[test]
    fn every_kind_of_the_engine_has_its_name_on_the_wire() {
        assert_eq!(event_kind(EngineKind::NeedsJournal).word(), "needs_journal");
        assert_eq!(event_kind(EngineKind::Damage).word(), "damage");
    }
}
