//! The server as clients see it: a real shard serves an export in memory on a unix socket.

mod bad_input;
mod client;
mod fixture;
mod lifetime;
mod pieces;
mod requests;
mod tls;
mod tools;
