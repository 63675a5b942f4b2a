//! The agent: guests' block requests on one side, disks on the other, the engine between.
//!
//! * Data plane: [`shard`]s, each one OS thread with its own io_uring ([`ring`]) that runs the engine, the disks ([`device`])
//!   and the clients' connections ([`frontend`]). Nothing on that path takes a lock.
//! * Control plane: tokio. It talks to shards by message.

pub mod device;
pub mod frontend;
pub mod ring;
pub mod shard;
