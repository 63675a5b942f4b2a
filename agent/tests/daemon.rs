//! The agent as its host sees it: readiness, watchdog, health, signals, sockets, the units that start it.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cdp_proto::v1::cdp_agent_client::CdpAgentClient;
use cdp_proto::v1::{
    AddGroupRequest, AddVolumeRequest, EnableRequest, EventKind, InitDiskRequest, ListDisksRequest, ListRequest,
    MarkRequest, StatusRequest, WatchEventsRequest,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

/// What does not happen within this time does not happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// `cdp-agent --dev` in a fresh directory, with a service manager of ours.
struct Agent {
    dir: tempfile::TempDir,
    manager: UnixDatagram,
    child: Child,
}

impl Agent {
    fn start() -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
        let socket = dir.path().join("notify.sock");
        let manager = UnixDatagram::bind(&socket).expect("a socket for readiness");
        manager.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let child = Command::new(env!("CARGO_BIN_EXE_cdp-agent"))
            .args(["--dev", dir.path().to_str().expect("ASCII"), "--size", "8MiB", "--cdp-size", "512MiB"])
            .env("NOTIFY_SOCKET", &socket)
            .env("WATCHDOG_USEC", "900000")
            .env_remove("WATCHDOG_PID")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start the agent");
        let agent = Self { dir, manager, child };
        agent.wait_for("READY=1");
        agent
    }

    /// Reads the manager's messages up to one that has this line.
    fn wait_for(&self, line: &str) {
        let mut message = [0; 4096];
        loop {
            let length = self.manager.recv(&mut message).unwrap_or_else(|error| panic!("no {line}: {error}"));
            let text = String::from_utf8_lossy(&message[..length]);
            if text.lines().any(|found| found == line) {
                return;
            }
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).expect("signal the agent");
    }

    fn end(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("wait for the agent") {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "the agent does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    async fn channel(&self) -> tonic::transport::Channel {
        let uri = format!("unix:{}", self.file("agent.sock").display());
        tonic::transport::Endpoint::from_shared(uri).expect("a URI").connect().await.expect("connect")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.child.kill();
            let mut log = String::new();
            if let Some(stderr) = &mut self.child.stderr {
                let _ = stderr.read_to_string(&mut log);
            }
            eprintln!("the agent's log:\n{log}");
        }
        let _ = self.child.kill(); // it has ended already in most tests
        let _ = self.child.wait();
        // A killed agent leaves its files' directories mounted, where it could mount them.
        for name in ["volumes", "views"] {
            let _ = Command::new("umount").args(["--quiet", "--lazy"]).arg(self.file(name)).output();
        }
    }
}

#[test]
fn readiness_the_watchdog_and_the_stop_are_told_and_nothing_is_left_behind() {
    let mut agent = Agent::start();
    for name in ["agent.sock", "nbd.sock", "metrics.addr"] {
        assert!(agent.file(name).exists(), "{name} is there once the agent is ready");
    }
    for _ in 0..3 {
        agent.wait_for("WATCHDOG=1");
    }
    agent.signal(Signal::SIGTERM);
    agent.wait_for("STOPPING=1");
    assert!(agent.end().success());
    for name in ["agent.sock", "nbd.sock", "metrics.addr"] {
        assert!(!agent.file(name).exists(), "{name} is removed at stop");
    }
}

/// Goal: a second signal ends the agent at once. Method: an idle connection holds the first stop up for seconds.
#[test]
fn a_second_signal_ends_at_once_and_says_so() {
    let mut agent = Agent::start();
    let _idle = UnixStream::connect(agent.file("agent.sock")).expect("connect");
    agent.signal(Signal::SIGSTOP);
    agent.signal(Signal::SIGTERM);
    agent.signal(Signal::SIGINT);
    agent.signal(Signal::SIGCONT);
    assert_eq!(agent.end().code(), Some(1));
}

#[tokio::test]
async fn health_reflection_and_status_answer() {
    let agent = Agent::start();
    let channel = agent.channel().await;
    for service in ["", "cdp.v1.CdpAgent"] {
        let request = HealthCheckRequest { service: service.to_owned() };
        let health = HealthClient::new(channel.clone()).check(request).await.expect("answers").into_inner();
        assert_eq!(health.status(), ServingStatus::Serving, "{service:?}");
    }
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut replies = ServerReflectionClient::new(channel.clone())
        .server_reflection_info(tokio_stream::once(request))
        .await
        .expect("answers")
        .into_inner();
    let reply = replies.message().await.expect("no error").expect("a reply").message_response;
    let Some(MessageResponse::ListServicesResponse(list)) = reply else { panic!("{reply:?}") };
    let names: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
    assert!(names.contains(&"cdp.v1.CdpAgent") && names.contains(&"grpc.health.v1.Health"), "{names:?}");

    let status = CdpAgentClient::new(channel).status(StatusRequest {}).await.expect("answers").into_inner();
    assert_eq!((status.volumes, status.volumes_unhealthy, status.disks, status.disks_offline), (1, 0, 1, 0));
    assert!(status.nbd_uris[0].starts_with("nbd+unix:///?socket=/"), "{:?}", status.nbd_uris);
    assert!(status.now >= status.start_time && !status.host_uuid.is_empty());
}

/// Goal: a watcher's stream ends with the agent, and does not hold its stop up.
#[tokio::test]
async fn an_event_stream_replays_follows_and_ends_with_the_agent() {
    let mut agent = Agent::start();
    let mut client = CdpAgentClient::new(agent.channel().await);
    let request = WatchEventsRequest { volumes: vec!["demo".to_owned()], replay: 100, follow: true };
    let mut events = client.watch_events(request).await.expect("watches").into_inner();
    loop {
        let event = events.message().await.expect("no error").expect("goes on");
        assert_eq!(event.volume_name, "demo");
        if event.kind() == EventKind::Enabled {
            break;
        }
    }
    let unknown = WatchEventsRequest { volumes: vec!["nothing".to_owned()], replay: 0, follow: true };
    let refusal = client.watch_events(unknown).await.expect_err("there is no such volume");
    assert_eq!(refusal.code(), tonic::Code::NotFound);
    agent.signal(Signal::SIGTERM);
    while let Ok(Some(_)) = events.message().await {}
    let ended = tokio::task::spawn_blocking(move || agent.end()).await.expect("waited");
    assert!(ended.success());
}

/// A guest agent whose freeze takes so long. Whether its guest is frozen.
fn slow_guest(socket: &Path, freeze_takes: Duration) -> Arc<AtomicBool> {
    let listener = UnixListener::bind(socket).expect("listens");
    let frozen = Arc::<AtomicBool>::default();
    let guest = Arc::clone(&frozen);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let Ok(mut answers) = stream.try_clone() else { continue };
            // Bytes, since a synchronisation begins with one that is no text.
            for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line);
                let answer = if line.contains("guest-sync-delimited") {
                    let id: String = line.chars().filter(char::is_ascii_digit).collect();
                    [&[0xff], format!("{{\"return\": {id}}}\n").as_bytes()].concat()
                } else if line.contains("guest-fsfreeze-freeze") {
                    guest.store(true, Ordering::SeqCst);
                    std::thread::sleep(freeze_takes);
                    b"{\"return\": 1}\n".to_vec()
                } else {
                    let was = guest.swap(false, Ordering::SeqCst);
                    format!("{{\"return\": {}}}\n", u8::from(was)).into_bytes()
                };
                if answers.write_all(&answer).is_err() {
                    break;
                }
            }
        }
    });
    frozen
}

/// Goal: an agent that is told to stop while a guest is being frozen thaws it before it ends, though nobody waits for the call any more.
/// Method: a freeze that takes three seconds; the caller goes and the stop comes in its middle.
#[tokio::test]
async fn a_stop_leaves_no_guest_frozen() {
    let mut agent = Agent::start();
    let socket = agent.file("qga.sock");
    let frozen = slow_guest(&socket, Duration::from_secs(3));
    let mut client = CdpAgentClient::new(agent.channel().await);
    let mark = MarkRequest {
        volumes: vec!["demo".to_owned()],
        quiesce: vec![format!("qga:{}", socket.display())],
        quiesce_ms: 60_000,
        ..MarkRequest::default()
    };
    let call = tokio::spawn(async move { client.mark(mark).await });
    let begun = Instant::now();
    while !frozen.load(Ordering::SeqCst) {
        assert!(begun.elapsed() < PATIENCE, "the guest is not frozen");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    call.abort();
    let _ = call.await; // its connection is closed
    agent.signal(Signal::SIGTERM);
    let ended = tokio::task::spawn_blocking(move || agent.end()).await.expect("waited");
    assert!(ended.success());
    assert!(!frozen.load(Ordering::SeqCst), "the guest stays frozen");
}

#[test]
fn check_says_what_is_wrong_and_where() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let run = |text: &str| {
        let file = dir.path().join("config.toml");
        std::fs::write(&file, text.replace("DIR", dir.path().to_str().expect("ASCII"))).expect("write");
        let output = Command::new(env!("CARGO_BIN_EXE_cdp-agent"))
            .args(["--config", file.to_str().expect("ASCII"), "--check"])
            .output()
            .expect("run");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    assert_eq!(run("state_dir = \"DIR/state\"\n"), (Some(0), String::new()));
    assert!(!dir.path().join("state").exists(), "a check changes nothing");
    let (code, said) = run("state_dir = \"DIR/state\"\nshrads = 2\n");
    assert!(code == Some(2) && said.contains("config.toml:2") && said.contains("\"shards\""), "{said}");
    let (code, said) = run("state_dir = \"DIR/state\"\n[[disk]]\npath = \"DIR/none\"\n");
    assert!(code == Some(2) && said.contains("/none"), "{said}");
    std::fs::create_dir(dir.path().join("state")).expect("create");
    std::fs::write(dir.path().join("state/clock"), "junk").expect("write");
    let (code, said) = run("state_dir = \"DIR/state\"\n");
    assert!(code == Some(2) && said.contains("state/clock"), "{said}");
}

/// Goal: disks and volumes are spread over the shards, each volume with the disk that holds its journal, also after a restart.
#[tokio::test]
async fn two_shards_share_disks_and_volumes_and_find_them_again() {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
    let file = |name: &str| dir.path().join(name).to_str().expect("ASCII").to_owned();
    let config = format!(
        "state_dir = {:?}\nshards = 2\nlock_memory = false\n[grpc]\nunix = {:?}\n[nbd]\nunix = {:?}\n[metrics]\nlisten = \"off\"\n\
         [engine]\nreserve_capacity = \"200MiB\"\n",
        file("state"),
        file("agent.sock"),
        file("nbd.sock")
    );
    std::fs::write(file("config.toml"), config).expect("write");
    let mut names = None;
    for round in 0..2 {
        let mut child = Command::new(env!("CARGO_BIN_EXE_cdp-agent"))
            .args(["--config", &file("config.toml")])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("start the agent");
        let begun = Instant::now();
        let mut client = loop {
            let endpoint =
                tonic::transport::Endpoint::from_shared(format!("unix:{}", file("agent.sock"))).expect("a URI");
            match endpoint.connect().await {
                Ok(channel) => break CdpAgentClient::new(channel),
                Err(error) => assert!(begun.elapsed() < PATIENCE, "the agent does not come up: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        if round == 0 {
            for number in 0..2 {
                let disk = InitDiskRequest {
                    path: file(&format!("cdp{number}.img")),
                    size: 256 << 20,
                    segment_size: 0,
                    force: false,
                };
                client.init_disk(disk.clone()).await.expect("a disk");
                let again = client.init_disk(disk).await.expect_err("it is in use");
                assert_eq!(again.code(), tonic::Code::AlreadyExists, "{again}");
            }
            for number in 0..2 {
                let volume = AddVolumeRequest {
                    name: format!("v{number}"),
                    path: file(&format!("v{number}.img")),
                    size: 8 << 20,
                    create: true,
                    ..AddVolumeRequest::default()
                };
                client.add_volume(volume).await.expect("a volume");
                // The first takes most of one disk, so the second goes to the other one, on the other shard.
                let enabled =
                    client.enable(EnableRequest { volumes: vec![format!("v{number}")] }).await.expect("answers");
                let enabled = enabled.into_inner();
                assert_eq!((enabled.success, enabled.fail), (1, 0), "{enabled:?}");
            }
            let own_journal =
                AddVolumeRequest { name: "x".into(), path: file("cdp0.img"), ..AddVolumeRequest::default() };
            let refusal = client.add_volume(own_journal).await.expect_err("a CDP disk is no primary");
            assert!(
                refusal.code() == tonic::Code::InvalidArgument && refusal.message().contains("CDP disk"),
                "{refusal}"
            );
            std::os::unix::fs::symlink(file("v0.img"), file("alias")).expect("link");
            let twice = AddVolumeRequest { name: "y".into(), path: file("alias"), ..AddVolumeRequest::default() };
            let refusal = client.add_volume(twice).await.expect_err("the same file under another path");
            assert_eq!(refusal.code(), tonic::Code::AlreadyExists, "{refusal}");
        }
        let mark = MarkRequest {
            volumes: vec!["v0".into(), "v1".into()],
            name: format!("round{round}"),
            ..MarkRequest::default()
        };
        let marked = client.mark(mark).await.expect("answers").into_inner();
        assert_eq!((marked.success, marked.fail), (2, 0), "{marked:?}");
        let times: Vec<u64> =
            marked.results.iter().filter_map(|result| result.snap.as_ref()).map(|snap| snap.time).collect();
        assert!(times == [marked.time; 2], "one instant for both: {times:?}");
        let disks = client.list_disks(ListDisksRequest {}).await.expect("answers").into_inner().disks;
        assert!(disks.len() == 2 && disks.iter().all(|disk| disk.online && disk.reserved_bytes > 0), "{disks:?}");
        let list = client.list(ListRequest::default()).await.expect("answers").into_inner().list;
        let found: Vec<_> =
            list.into_iter().map(|volume| (volume.volume_name, volume.volume_uuid, volume.cdp_state)).collect();
        assert!(found.iter().all(|(_, _, state)| state == "on"), "{found:?}");
        assert_eq!(*names.get_or_insert(found.clone()), found, "the same volumes after the restart");
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).expect("signal");
        let ended = tokio::task::spawn_blocking(move || child.wait()).await.expect("waited").expect("ends");
        assert!(ended.success());
    }
}

/// Goal: a name that a group and a volume have is no word for several volumes: a forced revert of it would be of disks that nobody meant. Nobody's disk is kept from being
/// served for that. And within a call each volume is given once, whatever it is called by.
/// Method: one of the two is added and so on record, the other comes by the configuration: both ways.
#[tokio::test]
async fn a_name_of_a_group_and_of_a_volume_is_refused_where_it_would_be_taken_for_several() {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
    let file = |name: &str| dir.path().join(name).to_str().expect("ASCII").to_owned();
    let agent = |more: &str| {
        let config = format!(
            "state_dir = {:?}\nlock_memory = false\n[grpc]\nunix = {:?}\n[nbd]\nunix = {:?}\n[metrics]\nlisten = \"off\"\n{more}",
            file("state"),
            file("agent.sock"),
            file("nbd.sock")
        );
        std::fs::write(file("config.toml"), config).expect("write");
        let mut agent = Command::new(env!("CARGO_BIN_EXE_cdp-agent"));
        agent.args(["--config", &file("config.toml")]).stdin(Stdio::null()).stdout(Stdio::null());
        agent
    };
    let serve = async |more: &str| {
        let child = agent(more).stderr(Stdio::null()).spawn().expect("start the agent");
        let begun = Instant::now();
        loop {
            let endpoint = tonic::transport::Endpoint::from_shared(format!("unix:{}", file("agent.sock")));
            match endpoint.expect("a URI").connect().await {
                Ok(channel) => break (child, CdpAgentClient::new(channel)),
                Err(error) => assert!(begun.elapsed() < PATIENCE, "the agent does not come up: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let stop = async |mut child: std::process::Child| {
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).expect("signal");
        let ended = tokio::task::spawn_blocking(move || child.wait()).await.expect("waited").expect("ends");
        assert!(ended.success());
    };
    let (child, mut client) = serve("").await;
    let mut uuids = Vec::new();
    for name in ["db", "log"] {
        let volume = AddVolumeRequest {
            name: name.into(),
            path: file(&format!("{name}.img")),
            size: 8 << 20,
            create: true,
            ..AddVolumeRequest::default()
        };
        let added = client.add_volume(volume).await.expect("a volume").into_inner().volume.expect("it");
        uuids.push(added.volume_uuid);
    }
    let group = AddGroupRequest { name: "vm1".into(), volumes: vec!["db".into(), "log".into()] };
    client.add_group(group).await.expect("a group");
    for twice in [["db", "db"], ["db", &uuids[0]], ["vm1", "log"]] {
        let mark = MarkRequest { volumes: twice.map(str::to_owned).into(), ..MarkRequest::default() };
        let refusal = client.mark(mark).await.expect_err("one volume twice");
        assert!(refusal.code() == tonic::Code::InvalidArgument && refusal.message().contains("once"), "{refusal}");
    }
    stop(child).await;

    std::fs::write(file("vm1.img"), vec![0; 1 << 20]).expect("write");
    let volume = format!("[[volume]]\nname = \"vm1\"\npath = {:?}\n", file("vm1.img"));
    let group = "[[group]]\nname = \"db\"\nvolumes = [\"log\"]\n";
    for (name, more) in [("vm1", volume.as_str()), ("db", group)] {
        let (child, mut client) = serve(more).await;
        let mark = async |volume: &str, client: &mut CdpAgentClient<_>| {
            let mark = MarkRequest { volumes: vec![volume.to_owned()], ..MarkRequest::default() };
            client.mark(mark).await.map(|answer| answer.into_inner())
        };
        let refusal = mark(name, &mut client).await.expect_err("it is two things");
        assert!(refusal.code() == tonic::Code::InvalidArgument && refusal.message().contains("uuid"), "{refusal}");
        // What is meant is clear; that it has no history to be marked in is another thing.
        mark(&uuids[1], &mut client).await.expect("it is one volume");
        stop(child).await;
    }
}

/// Goal: the units are right. Method: systemd's own checks, where this host has them; otherwise only that they are there.
#[test]
fn systemd_finds_nothing_wrong_with_the_units() {
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("../systemd");
    let unit = std::fs::read_to_string(units.join("cdp-agent.service")).expect("the unit");
    assert!(unit.contains("Type=notify") && unit.contains("WatchdogSec=") && unit.contains("LimitMEMLOCK=infinity"));
    let dir = tempfile::tempdir().expect("a temporary directory");
    // The check wants the program to be there.
    let here = dir.path().join("cdp-agent.service");
    let unit = unit.replace("/usr/bin/cdp-agent", env!("CARGO_BIN_EXE_cdp-agent"));
    std::fs::write(&here, unit).expect("write");
    let said = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).env("SYSTEMD_LOG_LEVEL", "warning").output();
        match output {
            Ok(output) => (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => (true, String::new()),
            Err(error) => panic!("{program}: {error}"),
        }
    };
    let verify = said("systemd-analyze", &["verify", "--man=no", here.to_str().expect("ASCII")]);
    assert_eq!(verify, (true, String::new()));
    let sysusers = units.join("cdp-agent.sysusers").canonicalize().expect("it is there");
    let (right, words) = said("systemd-sysusers", &["--dry-run", sysusers.to_str().expect("ASCII")]);
    assert!(right, "{words}");
}
