//! Views as block devices of the kernel's NBD client, for hosts that prefer it to loop devices on FUSE files (`[views] attach = "nbd"`): one
//! copy and one switch to user space less per request.
//!
//! `nbd-client` shakes hands with the agent's own socket and then waits in the kernel for as long as the device is connected. It is a
//! child that dies with the agent: then the kernel ends the device, its requests fail, and nothing of it is left to find.
//! (The kernel's other way to connect, by netlink, leaves devices behind that nobody owns.)

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel};
use std::time::{Duration, Instant};

use cdp_journal::{Error, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use parking_lot::Mutex;
use uuid::Uuid;

use super::{in_own_words, run};

/// How long connecting and disconnecting may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// Connections of a device: its requests are spread over them.
const CONNECTIONS: &str = "2";

/// The devices that this agent has connected, by view.
#[derive(Debug)]
pub struct NbdDevices {
    socket: PathBuf,
    /// The lock is held while one is connected, so that two calls never try the same device.
    connected: Mutex<HashMap<Uuid, Client>>,
}

/// A connected device.
#[derive(Debug)]
struct Client {
    device: String,
    /// `nbd-client`, as the kernel names it for the device.
    pid: u32,
    /// How `nbd-client` ended.
    ended: Receiver<std::io::Result<Output>>,
}

impl NbdDevices {
    /// `socket`: the agent's NBD socket.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket, connected: Mutex::default() }
    }

    /// Connects a free device to the export of a view; answers `/dev/nbd3`.
    ///
    /// # Errors
    /// When the kernel has no NBD client or no free device, or `nbd-client` is missing or fails.
    pub fn connect(&self, view: Uuid, writable: bool) -> Result<String> {
        let mut connected = self.connected.lock();
        let free = free_devices()?;
        let mut refusal = String::new();
        for name in &free {
            match self.connect_to(name, view, writable)? {
                Ok(client) => {
                    let device = client.device.clone();
                    connected.insert(view, client);
                    return Ok(device);
                }
                // Somebody else may have taken it meanwhile.
                Err(said) => refusal = said,
            }
        }
        let why = if free.is_empty() { "all are in use".to_owned() } else { refusal };
        Err(Error::State(format!("no NBD device can be connected: {why}")))
    }

    /// The inner error: what `nbd-client` said.
    fn connect_to(&self, name: &str, view: Uuid, writable: bool) -> Result<std::result::Result<Client, String>> {
        let device = format!("/dev/{name}");
        let mut command = Command::new("nbd-client");
        command.arg("-unix").arg(&self.socket).arg(&device).args(["-name", &view.to_string()]);
        command.args(["-nonetlink", "-nofork", "-connections", CONNECTIONS, "-block-size", "512"]);
        command.args((!writable).then_some("-readonly"));
        let mut wrapped = in_own_words(&command);
        let (tell, ended) = channel();
        let (born, started) = channel();
        // A thread of its own: the child dies when the thread that started it does.
        let spawned = std::thread::Builder::new().name("nbd-client".to_owned()).spawn(move || {
            let output = wrapped.spawn().and_then(|child| {
                let _ = born.send(child.id()); // nobody waits for it any more
                child.wait_with_output()
            });
            let _ = tell.send(output); // nobody waits for it any more
        });
        spawned.map_err(|error| Error::device("start a thread for", device.clone(), &error))?;
        let end = Instant::now() + PATIENCE;
        let pid = started.recv_timeout(PATIENCE).ok();
        while Instant::now() < end {
            if let Some(pid) = pid.filter(|pid| connected_by(name) == Some(*pid) && sectors(name) > 0) {
                return Ok(Ok(Client { device, pid, ended }));
            }
            match ended.recv_timeout(Duration::from_millis(5)) {
                Err(RecvTimeoutError::Timeout) => {}
                Ok(Ok(output)) if output.status.code() == Some(127) => {
                    return Err(Error::State("nbd-client is missing on this host".to_owned()));
                }
                Ok(Ok(output)) => return Ok(Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
                Ok(Err(error)) => return Err(Error::device("run", "nbd-client", &error)),
                Err(RecvTimeoutError::Disconnected) => return Ok(Err("nbd-client ended".to_owned())),
            }
        }
        // Our own client and with it what it has of the device, which may be somebody else's meanwhile.
        if let Some(pid) = pid {
            let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL); // it has just ended
        }
        Ok(Err(format!("{device} was not connected in {} s", PATIENCE.as_secs())))
    }

    /// Ends the device of a view, if it has one; what still uses it gets errors. A device that was taken away from the view before (its export was
    /// lost, or an admin disconnected it) may be somebody else's by now, and stays as it is.
    pub fn disconnect(&self, view: Uuid) {
        // Held between the look and the deed, so that no other view of ours is given this device.
        let mut connected = self.connected.lock();
        let Some(client) = connected.remove(&view) else { return };
        let name = client.device.trim_start_matches("/dev/");
        if !client.holds(connected_by(name)) {
            tracing::info!(device = client.device, %view, "the NBD device is not the view's any more: it is left alone");
            return;
        }
        disconnect(&client.device);
        drop(connected);
        if matches!(client.ended.recv_timeout(PATIENCE), Err(RecvTimeoutError::Timeout)) {
            tracing::warn!(device = client.device, "the NBD device is still connected");
        }
    }
}

impl Client {
    /// Whether the device is still the one that was connected here: `nbd-client` runs, and the kernel names it as the one that has the device.
    /// (Its number alone does not tell: the system gives it out anew.)
    fn holds(&self, connected_by: Option<u32>) -> bool {
        connected_by == Some(self.pid) && matches!(self.ended.try_recv(), Err(TryRecvError::Empty))
    }
}

fn disconnect(device: &str) {
    let mut command = Command::new("nbd-client");
    command.args(["-disconnect", device]);
    if let Err(error) = run(&command) {
        tracing::warn!(device, %error, "the NBD device cannot be disconnected");
    }
}

/// The device that a node belongs to: `/dev/nbd3` of `/dev/nbd3p1`; `None`: it is none of the NBD client's.
pub fn device_of(node: &str) -> Option<&str> {
    let number = node.strip_prefix("/dev/nbd")?;
    let digits = number.bytes().take_while(u8::is_ascii_digit).count();
    (digits > 0).then(|| &node[..node.len() - number.len() + digits])
}

/// The node of a partition, once the kernel has read the table.
///
/// # Errors
/// When there is none after a while.
pub fn partition(device: &str, number: u32) -> Result<PathBuf> {
    let node = PathBuf::from(format!("{device}p{number}"));
    let mut partx = Command::new("partx");
    partx.args(["--update", "--nr", &number.to_string(), device]);
    let end = Instant::now() + PATIENCE;
    while !node.exists() {
        let asked = run(&partx)?;
        if Instant::now() >= end {
            let said = String::from_utf8_lossy(&asked.stderr).trim().to_owned();
            return Err(Error::State(format!("{} does not appear: {said}", node.display())));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(node)
}

/// The process that has connected a device.
fn connected_by(name: &str) -> Option<u32> {
    std::fs::read_to_string(Path::new("/sys/block").join(name).join("pid")).ok()?.trim().parse().ok()
}

fn sectors(name: &str) -> u64 {
    let size = std::fs::read_to_string(Path::new("/sys/block").join(name).join("size"));
    size.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// Names of the devices that are not connected, lowest first.
fn free_devices() -> Result<Vec<String>> {
    let entries = std::fs::read_dir("/sys/block").map_err(|error| Error::device("read", "/sys/block", &error))?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let number = |name: &str| name.strip_prefix("nbd")?.parse::<u32>().ok();
    let mut devices: Vec<_> = names.filter_map(|name| Some((number(&name)?, name))).collect();
    if devices.is_empty() {
        return Err(Error::State("this kernel has no NBD devices: `modprobe nbd` first".to_owned()));
    }
    devices.sort();
    let free = |name: &String| connected_by(name).is_none() && sectors(name) == 0;
    Ok(devices.into_iter().map(|(_, name)| name).filter(free).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the end of a view never ends the device of somebody who took it after the view had lost it.
    /// Method: each combination of what the kernel says of the device and of how the view's own client fares.
    #[test]
    fn a_device_that_somebody_else_took_is_not_disconnected() {
        let client = || {
            let (tell, ended) = channel();
            (tell, Client { device: "/dev/nbd0".to_owned(), pid: 7, ended })
        };
        let (_running, ours) = client();
        assert!(ours.holds(Some(7)));
        assert!(!ours.holds(None), "nobody has it: nothing is to be ended");
        assert!(!ours.holds(Some(8)), "it is somebody else's");
        let (tell, ended) = client();
        tell.send(Err(std::io::ErrorKind::Other.into())).expect("somebody listens");
        assert!(!ended.holds(Some(7)), "another process was given the number of ours");
        let (tell, gone) = client();
        drop(tell);
        assert!(!gone.holds(Some(7)), "its thread is gone");
    }

    #[test]
    fn a_node_belongs_to_its_device() {
        assert_eq!(device_of("/dev/nbd3"), Some("/dev/nbd3"));
        assert_eq!(device_of("/dev/nbd12p2"), Some("/dev/nbd12"));
        assert_eq!(device_of("/dev/nbd"), None);
        assert_eq!(device_of("/dev/loop3"), None);
        assert_eq!(device_of("nbd3"), None);
    }
}
