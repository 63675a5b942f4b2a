//! The agent's interface: what `proto/cdp/v1/agent.proto` generates, and the parsers that both of its ends share.

pub mod parse;
mod words;

/// Package `cdp.v1`: messages, [`cdp_agent_client`](v1::cdp_agent_client) and [`cdp_agent_server`](v1::cdp_agent_server).
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    tonic::include_proto!("cdp.v1");
}

/// The compiled interface, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/cdp.v1.bin"));
