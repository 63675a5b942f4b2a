//! Where an agent listens, and where a client finds it.

use std::{fmt, path::PathBuf, str::FromStr};

use super::InputError;

/// Most bytes of a unix socket's path: what `sockaddr_un` holds beside its closing zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// An endpoint of the gRPC service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `unix:/path`
    Unix(PathBuf),
    /// `http://host:port`: TCP without TLS.
    Http {
        /// Host name or address; an IPv6 address without its brackets.
        host: String,
        /// Port.
        port: u16,
    },
    /// `https://host:port`: TCP with TLS.
    Https {
        /// Host name or address; an IPv6 address without its brackets.
        host: String,
        /// Port.
        port: u16,
    },
}

impl FromStr for Endpoint {
    type Err = InputError;

    fn from_str(text: &str) -> Result<Self, InputError> {
        let refuse = |bound: &str| InputError::new("endpoint", text, bound);
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").filter(|path| path.starts_with('/')).unwrap_or(path);
            return match path.len() {
                0 => Err(refuse("the path of the socket is missing: unix:/run/cdp-agent/agent.sock")),
                1..=SOCKET_PATH_BYTES_MAX if path.contains('\0') => Err(refuse("a path has no zero byte")),
                1..=SOCKET_PATH_BYTES_MAX => Ok(Endpoint::Unix(path.into())),
                _ => Err(refuse("the path of a socket has at most 107 bytes")),
            };
        }
        if let Some(authority) = text.strip_prefix("http://") {
            return authority_of(authority).map(|(host, port)| Endpoint::Http { host, port }).map_err(refuse);
        }
        if let Some(authority) = text.strip_prefix("https://") {
            return authority_of(authority).map(|(host, port)| Endpoint::Https { host, port }).map_err(refuse);
        }
        Err(refuse("write unix:/path, http://host:port or https://host:port"))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, host, port) = match self {
            Endpoint::Unix(path) => return write!(f, "unix:{}", path.display()),
            Endpoint::Http { host, port } => ("http", host, port),
            Endpoint::Https { host, port } => ("https", host, port),
        };
        if host.contains(':') { write!(f, "{scheme}://[{host}]:{port}") } else { write!(f, "{scheme}://{host}:{port}") }
    }
}

fn authority_of(text: &str) -> Result<(String, u16), &'static str> {
    let text = text.strip_suffix('/').unwrap_or(text);
    let (host, port) = text.rsplit_once(':').ok_or("the port is missing: host:port")?;
    let port = match port.parse::<u16>() {
        Ok(number) if number != 0 && !port.starts_with('+') => number,
        _ => return Err("the port is a number from 1 to 65535"),
    };
    let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(address) if address.parse::<std::net::Ipv6Addr>().is_ok() => address,
        Some(_) => return Err("what is in brackets is an IPv6 address"),
        None if host.contains(':') => return Err("an IPv6 address is in brackets: [::1]:7070"),
        None => host,
    };
    let plain = |b: u8| b.is_ascii_alphanumeric() || b".-_:".contains(&b);
    if host.is_empty() || !host.bytes().all(plain) {
        return Err("the host is a name or an address, and nothing follows the port");
    }
    Ok((host.to_owned(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_read_and_print() {
        let http = |host: &str, port| Endpoint::Http { host: host.into(), port };
        let https = |host: &str, port| Endpoint::Https { host: host.into(), port };
        let table = [
            ("unix:/run/cdp-agent/agent.sock", Endpoint::Unix("/run/cdp-agent/agent.sock".into())),
            ("unix:///run/agent.sock", Endpoint::Unix("/run/agent.sock".into())),
            ("unix:agent.sock", Endpoint::Unix("agent.sock".into())),
            ("http://127.0.0.1:7070", http("127.0.0.1", 7070)),
            ("http://[::1]:7070/", http("::1", 7070)),
            ("https://host-1.example:443", https("host-1.example", 443)),
        ];
        for (text, endpoint) in table {
            assert_eq!(text.parse(), Ok(endpoint.clone()), "{text}");
            assert_eq!(endpoint.to_string().parse(), Ok(endpoint), "{text}");
        }
    }

    #[test]
    fn what_is_no_endpoint_says_why() {
        let long = format!("unix:/{}", "x".repeat(107));
        let table = [
            ("", "write unix:"),
            ("/run/agent.sock", "write unix:"),
            ("ftp://host:1", "write unix:"),
            ("unix:", "path of the socket is missing"),
            (long.as_str(), "at most 107 bytes"),
            ("http://host", "port is missing"),
            ("http://host:0", "1 to 65535"),
            ("http://host:65536", "1 to 65535"),
            ("http://host:x", "1 to 65535"),
            ("http://host:+80", "1 to 65535"),
            ("https://:443", "name or an address"),
            ("https://host/path:443", "name or an address"),
            ("https://user@host:443", "name or an address"),
            ("https://::1:443", "in brackets"),
            ("https://[zz]:443", "in brackets"),
        ];
        for (text, bound) in table {
            let error = text.parse::<Endpoint>().expect_err(text).to_string();
            assert!(error.contains(bound), "{text}: {error}");
        }
    }
}
