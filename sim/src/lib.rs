//! The deterministic simulator: the real engine on a seeded scheduler, seeded clocks and disks that misbehave, judged by a
//! model that is deliberately simple. `docs/testing.md` says what is promised, what is forgiven and how to replay a seed.
#![deny(unsafe_code)]

pub mod disk;
pub mod executor;
pub mod model;
pub mod rng;
pub mod stamp;
pub mod store;
