//! The deterministic simulator: the real engine on a seeded scheduler, seeded clocks and disks that misbehave, judged by a
//! model that is deliberately simple. `docs/testing.md` says what is promised, what is forgiven and how to replay a seed.
#![deny(unsafe_code)]

pub mod admin;
pub mod boot;
pub mod bounds;
pub mod disk;
pub mod executor;
pub mod exhaust;
pub mod group;
pub mod guest;
pub mod model;
pub mod rng;
pub mod run;
pub mod shrink;
pub mod stamp;
pub mod store;
pub mod workload;
pub mod world;
