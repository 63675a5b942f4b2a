//! Deliberate faults of the engine, to prove that the simulator finds them. Only with the feature `mutations`, which nothing
//! but that test switches on; without it [`active`] is `false` at compile time and the marked places cost nothing.

/// One deliberate fault. The text says what the engine does wrong, the label which invariant (design part 4) it breaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mutation {
    /// The engine as it is.
    #[default]
    None,
    /// I1: a write is acked when its frame is submitted, not when it has completed.
    AckBeforeAppend,
    /// I1: a write is acked when its frame has completed, while an earlier one has not.
    AckAheadOfEarlier,
    /// I1: a flush is acked without a sync.
    FlushWithoutSync,
    /// I1: a sync counts for frames that completed while it was under way.
    SyncCoversLater,
    /// I1: a sync counts for frames that were in flight when it was submitted.
    SyncCoversAll,
    /// I1: the watermark passes writes before the primary was synced.
    WatermarkEarly,
    /// I2: a view leaves out the write at exactly its instant.
    ViewExclusive,
    /// I2: a log is cleaned under a view that was opened while the log was being sealed.
    CleanedUnderView,
    /// I2: redo takes a second before-image of a block that has one.
    BeforeImageTwice,
    /// I2: a start no longer counts as history what was journaled before it.
    HistoryForgotten,
    /// I2: a marker is answered before it is durable.
    MarkNotDurable,
    /// I2: logs go for capacity while most of it is free.
    EvictedForNothing,
    /// I2: age takes a log from an open view.
    ViewLostByAge,
    /// I3: recovery does not compare a frame's checksum of its predecessor.
    ChainUnchecked,
    /// I3, I7: recovery takes frames of the tail whose payload is torn.
    TornTailAccepted,
    /// I4: the primary is overwritten before the before-images were synced.
    DestageBeforeSync,
    /// I4: some before-images are left out.
    BeforeImageSkipped,
    /// I5: a revert returns before its record is durable.
    RevertNotDurable,
    /// I5: blocks of a pending revert are read from the primary.
    RevertNotRedirected,
    /// I5: the next log is destaged while what says that a revert was copied is not durable.
    RevertSealedInCompany,
    /// I5: recovery counts the revert of a group that was not decided.
    UndecidedCounts,
    /// I6: a view does not look again for a before-image after it has read the primary.
    NoRecheck,
    /// I7: the checksum of a payload is not compared.
    PayloadUnchecked,
    /// I7: a hole below the durable point is cut like a torn tail.
    HoleAccepted,
    /// I7: nobody misses the last frames of a log when the next one has begun.
    LastFramesUnmissed,
    /// I5: a write before a revert ends the loss of a block that the revert could not bring back.
    LossEndedEarly,
    /// I8: an error of the CDP disk reaches the guest.
    ErrorToGuest,
    /// I8: what was recovered is dropped when the CDP disk fails before the start is complete.
    RecoveredBacklogDropped,
    /// I8: a volume that lost its CDP disk does not look for another one.
    NeverProtectedAgain,
    /// I9: the span in which CDP was disabled counts as history.
    DisabledSpanCovered,
    /// I10: before-images are not counted when room is made.
    BeforeImagesUncounted,
    /// A freed segment is reused before the record that frees it is durable.
    ReuseEarly,
    /// I3: the clock's mark is raised in memory only, so instants may come twice.
    ClockPastMark,
}

impl Mutation {
    /// All of them.
    pub const ALL: [Self; 33] = [
        Self::AckBeforeAppend,
        Self::AckAheadOfEarlier,
        Self::FlushWithoutSync,
        Self::SyncCoversLater,
        Self::SyncCoversAll,
        Self::WatermarkEarly,
        Self::ViewExclusive,
        Self::CleanedUnderView,
        Self::BeforeImageTwice,
        Self::HistoryForgotten,
        Self::MarkNotDurable,
        Self::EvictedForNothing,
        Self::ViewLostByAge,
        Self::ChainUnchecked,
        Self::TornTailAccepted,
        Self::DestageBeforeSync,
        Self::BeforeImageSkipped,
        Self::RevertNotDurable,
        Self::RevertNotRedirected,
        Self::RevertSealedInCompany,
        Self::UndecidedCounts,
        Self::NoRecheck,
        Self::PayloadUnchecked,
        Self::HoleAccepted,
        Self::LastFramesUnmissed,
        Self::LossEndedEarly,
        Self::ErrorToGuest,
        Self::RecoveredBacklogDropped,
        Self::NeverProtectedAgain,
        Self::DisabledSpanCovered,
        Self::BeforeImagesUncounted,
        Self::ReuseEarly,
        Self::ClockPastMark,
    ];
}

#[cfg(feature = "mutations")]
thread_local! {
    static ACTIVE: std::cell::Cell<Mutation> = const { std::cell::Cell::new(Mutation::None) };
}

/// Switches one fault on for this thread.
#[cfg(feature = "mutations")]
pub fn set(mutation: Mutation) {
    ACTIVE.with(|active| active.set(mutation));
}

/// Whether this fault is switched on.
#[cfg(feature = "mutations")]
pub fn active(mutation: Mutation) -> bool {
    ACTIVE.with(|active| active.get() == mutation)
}

/// Whether this fault is switched on: never.
#[cfg(not(feature = "mutations"))]
#[inline(always)]
pub const fn active(_mutation: Mutation) -> bool {
    false
}
