//! Where an export is served, in the words of libvirt and of qemu.

use std::str::FromStr;

/// An NBD URI taken apart: `nbd+unix:///NAME?socket=PATH`, `nbd://HOST:PORT/NAME`, `nbds://HOST:PORT/NAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    pub name: String,
    pub server: Server,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Server {
    Unix { socket: String },
    Tcp { host: String, port: u16, tls: bool },
}

/// Seconds for which a guest's requests wait for an agent that restarts: as long as the unit lets a stop and a start take (5 and 10 minutes), since an error
/// costs a guest its file system, and waiting only time.
const RECONNECT_S: u32 = 900;

/// The port that NBD has where none is given.
const PORT: u16 = 10809;

impl FromStr for Export {
    type Err = &'static str;

    fn from_str(uri: &str) -> Result<Self, Self::Err> {
        if let Some(rest) = uri.strip_prefix("nbd+unix:///").or_else(|| uri.strip_prefix("nbds+unix:///")) {
            let (name, query) = rest.split_once('?').ok_or("has no socket")?;
            let socket = query.split('&').find_map(|pair| pair.strip_prefix("socket=")).ok_or("has no socket")?;
            return Ok(Self { name: decode(name)?, server: Server::Unix { socket: decode(socket)? } });
        }
        let (rest, tls) = match (uri.strip_prefix("nbd://"), uri.strip_prefix("nbds://")) {
            (Some(rest), _) => (rest, false),
            (_, Some(rest)) => (rest, true),
            _ => return Err("is not an NBD URI"),
        };
        let (authority, name) = rest.split_once('/').ok_or("has no export name")?;
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => (host, port.parse().map_err(|_| "has no valid port")?),
            _ => (authority, PORT),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let name = decode(name.split('?').next().unwrap_or(name))?;
        Ok(Self { name, server: Server::Tcp { host, port, tls } })
    }
}

impl Export {
    /// The `<disk>` element of a libvirt domain.
    pub fn libvirt(&self, target: &str, serial: &str) -> String {
        let (tls, host) = match &self.server {
            Server::Unix { socket } => ("", format!("<host transport='unix' socket='{}'/>", escape(socket))),
            Server::Tcp { host, port, tls } => {
                (if *tls { " tls='yes'" } else { "" }, format!("<host name='{}' port='{port}'/>", escape(host)))
            }
        };
        let bus = match &target[..target.len().min(2)] {
            "sd" => "scsi",
            "hd" => "ide",
            "xv" => "xen",
            _ => "virtio",
        };
        let serial = serial_of(serial);
        format!(
            "<disk type='network' device='disk'>\n  \
               <driver name='qemu' type='raw' cache='none' discard='unmap'/>\n  \
               <source protocol='nbd' name='{name}'{tls}>\n    \
                 {host}\n    \
                 <reconnect delay='{RECONNECT_S}'/>\n  \
               </source>\n  \
               <target dev='{target}' bus='{bus}'/>\n  \
               <serial>{serial}</serial>\n\
             </disk>\n",
            name = escape(&self.name),
        )
    }

    /// `-blockdev` and `-device` of qemu.
    pub fn qemu_blockdev(&self, serial: &str) -> Vec<String> {
        let server = match &self.server {
            Server::Unix { socket } => format!("server.type=unix,server.path={}", comma(socket)),
            Server::Tcp { host, port, .. } => {
                format!("server.type=inet,server.host={},server.port={port}", comma(host))
            }
        };
        let tls = if matches!(self.server, Server::Tcp { tls: true, .. }) { ",tls-creds=tls0" } else { "" };
        let serial = serial_of(serial);
        // Node names have at most 31 bytes and a small alphabet: the volume's name does not fit always, its uuid does.
        let node: String = serial.chars().filter(char::is_ascii_alphanumeric).take(12).collect();
        vec![
            "-blockdev".into(),
            format!(
                "driver=nbd,node-name=cdp-{node},{server},export={},reconnect-delay={RECONNECT_S},cache.direct=on,discard=unmap{tls}",
                comma(&self.name)
            ),
            "-device".into(),
            format!("virtio-blk-pci,drive=cdp-{node},serial={serial}"),
        ]
    }

    /// `-drive` of qemu.
    pub fn qemu_drive(&self) -> Vec<String> {
        let server = match &self.server {
            Server::Unix { socket } => format!("file.server.type=unix,file.server.path={}", comma(socket)),
            Server::Tcp { host, port, .. } => {
                format!("file.server.type=inet,file.server.host={},file.server.port={port}", comma(host))
            }
        };
        let tls = if matches!(self.server, Server::Tcp { tls: true, .. }) { ",file.tls-creds=tls0" } else { "" };
        vec![
            "-drive".into(),
            format!(
                "file.driver=nbd,{server},file.export={},file.reconnect-delay={RECONNECT_S}{tls},format=raw,if=virtio,cache=none,discard=unmap",
                comma(&self.name)
            ),
        ]
    }
}

/// A volume's serial number in the guest: virtio has 20 bytes for it, so the uuid goes without its hyphens and its end.
fn serial_of(uuid: &str) -> String {
    uuid.chars().filter(char::is_ascii_hexdigit).take(20).collect()
}

/// A comma inside an option of qemu is written twice.
fn comma(text: &str) -> String {
    text.replace(',', ",,")
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('\'', "&apos;").replace('"', "&quot;")
}

/// Undoes percent-encoding.
fn decode(text: &str) -> Result<String, &'static str> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let hex = rest.get(..2).and_then(|hex| std::str::from_utf8(hex).ok()).filter(|hex| !hex.starts_with('+'));
        bytes.push(hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()).ok_or("has a bad percent escape")?);
        rest = &rest[2..];
    }
    String::from_utf8(bytes).map_err(|_| "is not UTF-8")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_come_apart() {
        let unix =
            |name: &str, socket: &str| Export { name: name.into(), server: Server::Unix { socket: socket.into() } };
        let tcp = |name: &str, host: &str, port, tls| Export {
            name: name.into(),
            server: Server::Tcp { host: host.into(), port, tls },
        };
        let table = [
            ("nbd+unix:///demo?socket=/run/nbd.sock", Ok(unix("demo", "/run/nbd.sock"))),
            ("nbd+unix:///a%20b?x=1&socket=/run/a%2Cb", Ok(unix("a b", "/run/a,b"))),
            ("nbd://host:7/demo", Ok(tcp("demo", "host", 7, false))),
            ("nbds://[::1]:7/demo", Ok(tcp("demo", "::1", 7, true))),
            ("nbd://[::1]/demo", Ok(tcp("demo", "::1", 10809, false))),
            ("nbd+unix:///demo", Err("has no socket")),
            ("nbd+unix:///%zz?socket=/x", Err("has a bad percent escape")),
            ("nbd+unix:///%f?socket=/x", Err("has a bad percent escape")),
            ("nbd+unix:///%ff?socket=/x", Err("is not UTF-8")),
            ("nbd://host:x/demo", Err("has no valid port")),
            ("nbd://host", Err("has no export name")),
            ("", Err("is not an NBD URI")),
        ];
        for (uri, export) in table {
            assert_eq!(uri.parse(), export, "{uri}");
        }
    }

    #[test]
    fn odd_names_are_escaped() {
        let export: Export = "nbd+unix:///a'b%2Cc?socket=/run/a%26b".parse().expect("parses");
        let xml = export.libvirt("sda", "aae751ba-8b97-4259-9579-c40cbb806d9d");
        assert!(xml.contains("name='a&apos;b,c'") && xml.contains("socket='/run/a&amp;b'"), "{xml}");
        assert!(
            xml.contains("<target dev='sda' bus='scsi'/>") && xml.contains("<serial>aae751ba8b9742599579</serial>"),
            "{xml}"
        );
        assert!(export.qemu_blockdev("x")[1].contains("export=a'b,,c,"));
        assert!(export.qemu_drive()[1].contains("file.export=a'b,,c,"));
    }
}
