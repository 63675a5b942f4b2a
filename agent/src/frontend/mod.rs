//! Frontends: each translates one guest protocol to requests on an engine's export, and knows nothing of journals.

pub mod fuse;
pub mod nbd;
