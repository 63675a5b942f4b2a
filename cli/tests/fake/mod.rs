//! An agent that has canned answers: the real service over a real socket, in the test's own process.

use std::{
    path::PathBuf,
    pin::Pin,
    process::{Command, Output},
    sync::{Arc, Mutex},
    time::Duration,
};

use cdp_proto::v1::{self, cdp_agent_server::CdpAgent};
use tokio_stream::{Stream, StreamExt};
use tonic::{Code, Request, Response, Status, transport::Server};

pub const NOW: u64 = 1_630_057_893_506_590_075;
pub const VOLUME: &str = "aae751ba-8b97-4259-9579-c40cbb806d9d";
pub const VIEW: &str = "7c1f0a52-5d0e-4a53-9d0c-0f0f5c3f4d11";
/// The volume "short", whose copying is never seen to its end.
pub const SHORT: &str = "0b5f5f0e-4c1e-4f0c-8a55-6d7a54a3b6c2";
pub const HOST: &str = "48459090-6ced-4476-a6b4-2880b1e21d5a";

/// A running fake agent.
pub struct Fake {
    pub directory: tempfile::TempDir,
    questions: Arc<Mutex<Vec<String>>>,
    _runtime: tokio::runtime::Runtime,
}

impl Fake {
    /// Serves on `agent.sock` in a directory of its own.
    pub fn start() -> Fake {
        let directory = tempfile::tempdir().expect("makes a directory");
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("starts tokio");
        let questions = Arc::<Mutex<Vec<String>>>::default();
        let service = v1::cdp_agent_server::CdpAgentServer::new(Agent { questions: questions.clone() });
        let listener = {
            let _inside = runtime.enter();
            tokio::net::UnixListener::bind(directory.path().join("agent.sock")).expect("listens")
        };
        let connections = tokio_stream::wrappers::UnixListenerStream::new(listener);
        runtime.spawn(Server::builder().add_service(service).serve_with_incoming(connections));
        Fake { directory, questions, _runtime: runtime }
    }

    /// A service of the same kind for another way to serve it.
    pub fn service(&self) -> v1::cdp_agent_server::CdpAgentServer<impl CdpAgent> {
        v1::cdp_agent_server::CdpAgentServer::new(Agent { questions: self.questions.clone() })
    }

    /// The runtime that serves.
    pub fn runtime(&self) -> &tokio::runtime::Runtime {
        &self._runtime
    }

    /// `cdpctl` with this agent as its agent.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cdpctl"));
        let socket: PathBuf = self.directory.path().join("agent.sock");
        command
            .env_clear()
            .current_dir(self.directory.path())
            .arg("--agent")
            .arg(format!("unix:{}", socket.display()))
            .args(args);
        command
    }

    /// Runs `cdpctl` to its end.
    pub fn run(&self, args: &[&str]) -> Ran {
        Ran::of(self.command(args).output().expect("runs cdpctl"))
    }

    /// Runs `cdpctl` without `--agent` before its arguments; `CDP_AGENT` names this agent.
    pub fn run_alone(&self, args: &[&str]) -> Ran {
        let agent = format!("unix:{}", self.directory.path().join("agent.sock").display());
        let mut command = Command::new(env!("CARGO_BIN_EXE_cdpctl"));
        command.env_clear().current_dir(self.directory.path());
        Ran::of(command.env("CDP_AGENT", agent).args(args).output().expect("runs cdpctl"))
    }

    /// Runs `cdpctl --output json`.
    pub fn json(&self, args: &[&str]) -> Ran {
        self.run(&[&["--output", "json"], args].concat())
    }

    /// What the agent was asked last, as the request's debug text, with `grpc-timeout` behind it.
    pub fn question(&self) -> String {
        self.questions.lock().expect("is not poisoned").last().cloned().unwrap_or_default()
    }
}

/// How a command ended.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ran {
    pub fn of(output: Output) -> Ran {
        Ran {
            code: output.status.code().expect("ends by itself"),
            out: String::from_utf8(output.stdout).expect("prints UTF-8"),
            err: String::from_utf8(output.stderr).expect("prints UTF-8"),
        }
    }

    pub fn value(&self) -> serde_json::Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

struct Agent {
    questions: Arc<Mutex<Vec<String>>>,
}

impl Agent {
    fn hear<Q: std::fmt::Debug>(&self, request: Request<Q>) -> Q {
        let timeout = request.metadata().get("grpc-timeout").map(|value| format!("{value:?}"));
        let question = request.into_inner();
        self.questions.lock().expect("is not poisoned").push(format!("{question:?} timeout={timeout:?}"));
        question
    }

    fn batch<T>(
        &self,
        volumes: &[String],
        done: impl Fn(v1::VolumeResult) -> T,
        failed: impl Fn(v1::VolumeResult) -> T,
    ) -> (u32, u32, Vec<T>) {
        let (mut success, mut fail) = (0, 0);
        let results = volumes
            .iter()
            .map(|volume| match known(volume) {
                Ok(()) => {
                    success += 1;
                    done(v1::VolumeResult {
                        volume: volume.clone(),
                        volume_uuid: if volume == "short" { SHORT } else { VOLUME }.into(),
                        volume_name: volume.clone(),
                        ..Default::default()
                    })
                }
                Err(status) => {
                    fail += 1;
                    failed(v1::VolumeResult {
                        volume: volume.clone(),
                        code: status.code() as i32,
                        message: status.message().to_owned(),
                        ..Default::default()
                    })
                }
            })
            .collect();
        (success, fail, results)
    }
}

/// A volume whose name is a status code's number answers with that status.
fn known(volume: &str) -> Result<(), Status> {
    match volume.parse::<i32>() {
        Ok(code) => Err(Status::new(Code::from_i32(code), format!("volume {volume:?} answers {code}"))),
        Err(_) if volume == "gone" => Err(Status::not_found("volume \"gone\" not found")),
        Err(_) => Ok(()),
    }
}

fn settings() -> v1::Settings {
    v1::Settings { reserve_capacity: 32_212_254_720, reserve_duration: 86400, cdp_priority: "mid".into() }
}

fn entry(name: &str) -> v1::VolumeEntry {
    v1::VolumeEntry {
        volume_uuid: VOLUME.into(),
        volume_name: name.into(),
        reserve_duration: 86400,
        reserve_capacity: 32_212_254_720,
        cdp_create_time: 1_630_053_321,
        cdp_state: "on".into(),
        cdp_priority: "mid".into(),
        size: 1 << 30,
        path: "/dev/vg0/demo".into(),
        health: v1::Health::Offline as i32,
        health_reason: "CDP disk /dev/sdd: I/O error".into(),
        used_bytes: 38 << 20,
        backlog_bytes: 4096,
        clients: 1,
        held: true,
        nbd_uri: format!("nbd+unix:///{name}?socket=/run/cdp-agent/nbd.sock"),
        cdp_create_time_ns: 1_630_053_321_000_000_001,
    }
}

fn snap(name: &str, time: u64, auto: bool) -> v1::Snap {
    v1::Snap { name: name.into(), time, kind: v1::MarkerKind::Crash as i32, auto }
}

fn view(time: u64, snapshot_name: &str, writable: bool) -> v1::ViewInfo {
    v1::ViewInfo {
        id: VIEW.into(),
        volume_uuid: VOLUME.into(),
        volume_name: "demo".into(),
        time,
        snapshot_name: snapshot_name.into(),
        writable,
        scratch_bytes_max: 1 << 30,
        opened: NOW,
        nbd_uri: format!("nbd+unix:///{VIEW}?socket=/run/cdp-agent/nbd.sock"),
        size: 1 << 30,
        ..Default::default()
    }
}

fn log(seq: u64, start: u64, end: u64) -> v1::CdpInfo {
    v1::CdpInfo {
        snaps: vec![snap("CDP-auto-1630057893", start, true)],
        seq,
        start_time: start,
        r#use: 38 << 20,
        capacity: 10_737_418_240,
        io_start_time: start + 1,
        io_last_time: start + 2,
        online: true,
        usd_maddr: "10.30.12.237".into(),
        usd_path: "/dev/sdd".into(),
        end_time: end,
        recording: true,
        ..Default::default()
    }
}

fn progress(done: u64) -> v1::RevertProgress {
    v1::RevertProgress {
        volume_uuid: VOLUME.into(),
        volume_name: "demo".into(),
        time: NOW,
        target: NOW - 1000,
        blocks_total: 100,
        blocks_done: done,
        done: done == 100,
        blocks_per_s: 5,
        eta_s: 15,
    }
}

fn group(name: &str) -> v1::Group {
    v1::Group {
        name: name.into(),
        volumes: vec!["demo".into(), "other".into()],
        volume_uuids: vec![VOLUME.into(), HOST.into()],
        configured: false,
    }
}

fn disk(path: &str) -> v1::DiskInfo {
    v1::DiskInfo {
        id: HOST.into(),
        path: path.into(),
        size: 100 << 30,
        segment_size: 16 << 20,
        segments: 6400,
        segments_free: 6000,
        online: true,
        ..Default::default()
    }
}

type Answer<T> = Result<Response<T>, Status>;
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn ok<T>(answer: T) -> Answer<T> {
    Ok(Response::new(answer))
}

#[tonic::async_trait]
impl CdpAgent for Agent {
    type WaitRevertStream = Answers<v1::RevertProgress>;
    type UseViewStream = Answers<v1::UseViewResponse>;
    type WatchEventsStream = Answers<v1::Event>;

    async fn edit(&self, request: Request<v1::EditRequest>) -> Answer<v1::EditResponse> {
        let question = self.hear(request);
        let done =
            |result| v1::EditResult { result: Some(result), settings: Some(settings()), cdp_state: "off".into() };
        let failed = |result| v1::EditResult { result: Some(result), ..Default::default() };
        let (success, fail, results) = self.batch(&question.volumes, done, failed);
        ok(v1::EditResponse { success, fail, results })
    }

    async fn enable(&self, request: Request<v1::EnableRequest>) -> Answer<v1::EnableResponse> {
        let question = self.hear(request);
        let done = |result| v1::EnableResult { result: Some(result), settings: Some(settings()), time: NOW };
        let failed = |result| v1::EnableResult { result: Some(result), ..Default::default() };
        let (success, fail, results) = self.batch(&question.volumes, done, failed);
        ok(v1::EnableResponse { success, fail, results })
    }

    async fn disable(&self, request: Request<v1::DisableRequest>) -> Answer<v1::DisableResponse> {
        let question = self.hear(request);
        let answer = |result| v1::DisableResult { result: Some(result), time: NOW };
        let (success, fail, results) = self.batch(&question.volumes, answer, answer);
        ok(v1::DisableResponse { success, fail, results })
    }

    async fn list(&self, request: Request<v1::ListRequest>) -> Answer<v1::ListResponse> {
        let question = self.hear(request);
        // One volume per page whatever was asked for: the client must go on until it has all.
        let list = ["demo", "other"].iter().skip(question.page_num as usize).take(1).map(|name| entry(name)).collect();
        ok(v1::ListResponse { total_count: 2, list })
    }

    async fn info(&self, request: Request<v1::InfoRequest>) -> Answer<v1::InfoResponse> {
        let question = self.hear(request);
        if question.volume == "slow" {
            std::future::pending::<()>().await;
        }
        known(&question.volume)?;
        ok(v1::InfoResponse {
            cdp_info: vec![log(0, NOW - 10_000_000_000, NOW - 5_000_000_000), log(1, NOW - 5_000_000_000, 0)],
            host_uuid: HOST.into(),
            snaps: vec![snap("CDP-auto-1630057893", NOW - 10_000_000_000, true), snap("halfway", NOW - 3, false)],
            volume: Some(entry("demo")),
            coverage: vec![
                v1::Interval {
                    start: NOW - 10_000_000_000,
                    end: NOW - 5_000_000_000,
                    end_reason: "CDP was disabled".into(),
                },
                v1::Interval { start: NOW - 4_000_000_000, end: 0, end_reason: String::new() },
            ],
            revert: Some(progress(25)),
            primary_size: 2 << 30,
            window_forecast_s: 3600,
            now: NOW,
            views: vec![view(NOW - 3, "halfway", false)],
            reverts: vec![v1::RevertPoint { time: NOW - 2, target: NOW - 8 }],
            flush_clean: NOW - 1,
        })
    }

    async fn mark(&self, request: Request<v1::MarkRequest>) -> Answer<v1::MarkResponse> {
        let question = self.hear(request);
        let done = |result| v1::MarkResult { result: Some(result), snap: Some(snap(&question.name, NOW, false)) };
        let failed = |result| v1::MarkResult { result: Some(result), snap: None };
        let (success, fail, results) = self.batch(&question.volumes, done, failed);
        let (name, time) = if success > 0 { (question.name.clone(), NOW) } else { Default::default() };
        let frozen_ns = if question.quiesce.is_empty() { 0 } else { 12_000_000 };
        ok(v1::MarkResponse { success, fail, results, name, time, frozen_ns })
    }

    async fn view(&self, request: Request<v1::ViewRequest>) -> Answer<v1::ViewResponse> {
        let question = self.hear(request);
        known(&question.volume)?;
        let time = if question.timestamp > 0 { question.timestamp } else { NOW - question.ago_ns.unwrap_or(3) };
        ok(v1::ViewResponse {
            host_uuid: HOST.into(),
            view: Some(view(time, &question.snapshot_name, question.writable)),
        })
    }

    async fn view_group(&self, request: Request<v1::ViewGroupRequest>) -> Answer<v1::ViewGroupResponse> {
        let question = self.hear(request);
        let views = question.volumes.iter().map(|_| view(NOW, &question.snapshot_name, question.writable)).collect();
        ok(v1::ViewGroupResponse { time: NOW, views })
    }

    async fn locate(&self, request: Request<v1::LocateRequest>) -> Answer<v1::LocateResponse> {
        let question = self.hear(request);
        let time = match (question.snapshot_name.as_str(), question.ago_ns) {
            ("", Some(ago)) => NOW - ago,
            ("", None) => question.timestamp,
            ("halfway", _) => NOW - 3,
            (name, _) => return Err(Status::not_found(format!("marker {name:?} not found"))),
        };
        let found = |result| v1::Located {
            result: Some(result),
            viewable: true,
            flush_before: time - 7,
            flush_after: 0,
            snap_before: Some(snap("halfway", time - 1, false)),
            snap_after: None,
        };
        let (_, _, results) = self.batch(&question.volumes, found, found);
        ok(v1::LocateResponse { time, results })
    }

    async fn changes(&self, request: Request<v1::ChangesRequest>) -> Answer<v1::ChangesResponse> {
        self.hear(request);
        ok(v1::ChangesResponse { total: 0, changes: vec![], to: NOW })
    }

    async fn add_group(&self, request: Request<v1::AddGroupRequest>) -> Answer<v1::AddGroupResponse> {
        let question = self.hear(request);
        ok(v1::AddGroupResponse { group: Some(group(&question.name)) })
    }

    async fn list_groups(&self, request: Request<v1::ListGroupsRequest>) -> Answer<v1::ListGroupsResponse> {
        self.hear(request);
        ok(v1::ListGroupsResponse { groups: vec![group("vm1")] })
    }

    async fn remove_group(&self, request: Request<v1::RemoveGroupRequest>) -> Answer<v1::RemoveGroupResponse> {
        let question = self.hear(request);
        ok(v1::RemoveGroupResponse { group: Some(group(&question.name)) })
    }

    async fn list_views(&self, request: Request<v1::ListViewsRequest>) -> Answer<v1::ListViewsResponse> {
        self.hear(request);
        ok(v1::ListViewsResponse { views: vec![view(NOW, "", true)] })
    }

    async fn use_view(&self, _: Request<v1::UseViewRequest>) -> Answer<Self::UseViewStream> {
        Err(Status::permission_denied("this agent mounts nothing"))
    }

    async fn close_view(&self, request: Request<v1::CloseViewRequest>) -> Answer<v1::CloseViewResponse> {
        let question = self.hear(request);
        if question.id != VIEW {
            return Err(Status::not_found(format!("view {:?} not found", question.id)));
        }
        ok(v1::CloseViewResponse { view: Some(view(NOW, "", false)) })
    }

    async fn revert(&self, request: Request<v1::RevertRequest>) -> Answer<v1::RevertResponse> {
        let question = self.hear(request);
        let done = |result| v1::RevertResult {
            result: Some(result),
            time: NOW,
            target: NOW - 1000,
            blocks: 25,
            bytes: 25 * 4096,
            needed_bytes: 1 << 20,
            available_bytes: 1 << 30,
            undo_time: if question.dry_run { 0 } else { NOW - 1 },
            held: question.force && !question.release,
        };
        let failed = |result| v1::RevertResult { result: Some(result), ..Default::default() };
        let (success, fail, results) = self.batch(&question.volumes, done, failed);
        ok(v1::RevertResponse { success, fail, results, dry_run: question.dry_run })
    }

    async fn wait_revert(&self, request: Request<v1::WaitRevertRequest>) -> Answer<Self::WaitRevertStream> {
        let question = self.hear(request);
        let last = match question.volumes.iter().any(|volume| volume == SHORT) {
            true => Err(Status::aborted("the agent is stopping")),
            false => Ok(progress(100)),
        };
        ok(Box::pin(tokio_stream::iter([Ok(progress(0)), Ok(progress(50)), last])))
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Answer<v1::ReleaseResponse> {
        let question = self.hear(request);
        let (success, fail, results) = self.batch(&question.volumes, |result| result, |result| result);
        ok(v1::ReleaseResponse { success, fail, results })
    }

    async fn clean(&self, request: Request<v1::CleanRequest>) -> Answer<v1::CleanResponse> {
        let question = self.hear(request);
        known(&question.volume)?;
        ok(v1::CleanResponse { freed_bytes: 16 << 20, thinned: question.usd_seq == Some(1) })
    }

    async fn add_volume(&self, request: Request<v1::AddVolumeRequest>) -> Answer<v1::AddVolumeResponse> {
        let question = self.hear(request);
        ok(v1::AddVolumeResponse { volume: Some(entry(&question.name)) })
    }

    async fn remove_volume(&self, request: Request<v1::RemoveVolumeRequest>) -> Answer<v1::RemoveVolumeResponse> {
        let question = self.hear(request);
        known(&question.volume)?;
        ok(v1::RemoveVolumeResponse { volume: Some(entry(&question.volume)) })
    }

    async fn resize_volume(&self, request: Request<v1::ResizeVolumeRequest>) -> Answer<v1::ResizeVolumeResponse> {
        let question = self.hear(request);
        ok(v1::ResizeVolumeResponse {
            old_size: 1 << 30,
            size: question.size.unwrap_or(2 << 30),
            primary_size: 2 << 30,
        })
    }

    async fn override_volume(&self, request: Request<v1::OverrideVolumeRequest>) -> Answer<v1::OverrideVolumeResponse> {
        let question = self.hear(request);
        ok(v1::OverrideVolumeResponse { volume: Some(entry(&question.volume)) })
    }

    async fn attach_volume(&self, request: Request<v1::AttachVolumeRequest>) -> Answer<v1::AttachVolumeResponse> {
        let question = self.hear(request);
        ok(v1::AttachVolumeResponse { volume: Some(entry(&question.volume)) })
    }

    async fn init_disk(&self, request: Request<v1::InitDiskRequest>) -> Answer<v1::InitDiskResponse> {
        let question = self.hear(request);
        ok(v1::InitDiskResponse { disk: Some(disk(&question.path)) })
    }

    async fn list_disks(&self, request: Request<v1::ListDisksRequest>) -> Answer<v1::ListDisksResponse> {
        self.hear(request);
        ok(v1::ListDisksResponse { disks: vec![disk("/dev/sdd")] })
    }

    async fn timeline(&self, request: Request<v1::TimelineRequest>) -> Answer<v1::TimelineResponse> {
        let question = self.hear(request);
        let bucket = |at: u64| v1::TimelineBucket {
            start: NOW - 10 + at,
            blocks: at,
            bytes: at * 512,
            flushes: 1,
            flushes_clean: 1,
        };
        ok(v1::TimelineResponse {
            from: NOW - 10,
            to: NOW,
            buckets: (0..u64::from(question.buckets.min(10))).map(bucket).collect(),
            snaps: vec![snap("halfway", NOW - 3, false)],
            reverts: vec![v1::RevertPoint { time: NOW - 2, target: NOW - 8 }],
            cdp_info: vec![log(1, NOW - 10, 0)],
            coverage: vec![v1::Interval { start: NOW - 10, end: 0, end_reason: String::new() }],
        })
    }

    async fn watch_events(&self, request: Request<v1::WatchEventsRequest>) -> Answer<Self::WatchEventsStream> {
        let question = self.hear(request);
        let event = |at: u64| {
            Ok(v1::Event {
                time: NOW + at,
                volume_uuid: VOLUME.into(),
                volume_name: "demo".into(),
                disk: String::new(),
                kind: v1::EventKind::ViewLost as i32,
                message: format!("event {at}"),
            })
        };
        if question.follow {
            // Without end: it is the client's to stop.
            return ok(Box::pin(tokio_stream::iter(0..).map(event).throttle(Duration::from_millis(1))));
        }
        ok(Box::pin(tokio_stream::iter((0..u64::from(question.replay.min(2))).map(event).collect::<Vec<_>>())))
    }

    async fn status(&self, request: Request<v1::StatusRequest>) -> Answer<v1::StatusResponse> {
        self.hear(request);
        ok(v1::StatusResponse {
            version: "0.1.0".into(),
            format_version: 1,
            host_uuid: HOST.into(),
            host_name: "host7".into(),
            start_time: NOW - 90_000_000_000,
            now: NOW,
            shards: 2,
            volumes: 3,
            volumes_unhealthy: 1,
            ..Default::default()
        })
    }
}
