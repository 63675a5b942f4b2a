//! The agent: guests' block requests on one side, disks on the other, the engine between.
//!
//! * Data plane: [`shard`]s, each one OS thread with its own io_uring ([`ring`]) that runs the engine, the disks ([`device`])
//!   and the clients' connections ([`frontend`]). Nothing on that path takes a lock.
//! * Control plane: tokio. [`control`] knows what is served where and talks to shards by message; [`grpc`] and [`metrics`] are
//!   its faces; [`config`] and [`state`] are what it starts from; [`daemon`] starts and stops it all.

pub mod config;
pub mod control;
pub mod copying;
pub mod daemon;
pub mod device;
pub mod events;
pub mod frontend;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod groups;
pub mod grpc;
pub mod listen;
pub mod metrics;
pub mod mounts;
pub mod quiesce;
pub mod revert;
pub mod ring;
pub mod shard;
pub mod state;
