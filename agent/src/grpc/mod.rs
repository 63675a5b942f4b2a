//! The gRPC service `cdp.v1.CdpAgent`: each call is checked ([`request`]), sent to the shards ([`crate::control`]), and answered
//! ([`convert`]); errors become status codes in one place (`status`).
//!
//! A call's work runs in a task of its own: when the caller's deadline passes or its connection goes, the answer is dropped and
//! the work still ends whole, so nothing stays half done.

pub mod convert;
pub mod request;
pub mod status;
mod views;
mod when;

use std::collections::HashSet;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cdp_journal::info::{Marker, VolumeInfo};
use cdp_journal::{Error, InitOptions, Instant, Result, Volume};
use cdp_proto::v1::cdp_agent_server::{CdpAgent, CdpAgentServer};
use cdp_proto::{FILE_DESCRIPTOR_SET, v1};
use futures::future::join_all;
use futures::{FutureExt as _, StreamExt as _};
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status};
use uuid::Uuid;

use crate::control::{Control, NewVolume, Resolved, Terms, ViewStatus};
use crate::groups::Group;
use crate::listen::{Connection, Peer};
use crate::quiesce;
use crate::revert::Rewind;

use convert::Place;
use request::{At, Back, Edit, Mark, NewDisk};
use status::{code, status};

/// A per-volume answer that there is, or the error in its place.
type PerVolume<T> = (v1::VolumeResult, Option<T>);
type Answer<T> = std::result::Result<Response<T>, Status>;
type Streaming<T> = Pin<Box<dyn Stream<Item = std::result::Result<T, Status>> + Send>>;

/// Bounds of HTTP/2: large enough that one stream fills a fast link.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// A peer that does not answer to a ping for so long is gone.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// Requests of this interface are names and numbers; none is larger.
const REQUEST_BYTES_MAX: usize = 1 << 20;

/// What the service says of the agent as a whole.
#[derive(Clone, Debug)]
pub struct About {
    /// Where things are.
    pub place: Place,
    /// When the agent started, wall clock, nanoseconds.
    pub start_ns: u64,
    /// Where this service is reached.
    pub endpoints: Vec<String>,
    /// Path of the configuration; empty with `--dev`.
    pub config_path: String,
}

/// The service. Clones share everything.
#[derive(Clone)]
pub struct Service {
    control: Arc<Control>,
    about: Arc<About>,
    stopping: watch::Receiver<bool>,
}

impl Service {
    /// A service on a control plane; `stopping` turns true when the agent ends.
    pub fn new(control: Arc<Control>, about: About, stopping: watch::Receiver<bool>) -> Self {
        Self { control, about: Arc::new(about), stopping }
    }

    /// Serves calls, health and reflection on each of `listeners` until the agent stops and the calls under way have ended.
    ///
    /// # Errors
    /// When the transport fails.
    pub async fn serve(
        self,
        listeners: Vec<ReceiverStream<std::io::Result<Connection>>>,
    ) -> std::result::Result<(), tonic::transport::Error> {
        let (reporter, health) = tonic_health::server::health_reporter();
        reporter.set_serving::<CdpAgentServer<Self>>().await;
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()
            .expect("the descriptors were compiled into this program");
        let mut stopping = self.stopping.clone();
        let ended = async move {
            let _ = stopping.wait_for(|stopping| *stopping).await; // its sender is gone: the agent ends too
            reporter.set_not_serving::<CdpAgentServer<Self>>().await;
        };
        let service = CdpAgentServer::new(self).max_decoding_message_size(REQUEST_BYTES_MAX);
        Server::builder()
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE))
            .add_service(health)
            .add_service(reflection)
            .add_service(service)
            .serve_with_incoming_shutdown(futures::stream::select_all(listeners), ended)
            .await
    }

    /// Runs a call's work to its end, and answers within the caller's deadline.
    async fn run<T, F>(&self, metadata: &MetadataMap, work: F) -> Answer<T>
    where
        F: Future<Output = std::result::Result<T, Status>> + Send + 'static,
        T: Send + 'static,
    {
        finish(metadata, &self.stopping, work).await
    }

    fn resolve(&self, volume: &str) -> std::result::Result<Resolved, Status> {
        if volume.is_empty() {
            return Err(status(&Error::invalid("volume", "\"\"", "the uuid or name of a volume")));
        }
        self.control.resolve(volume).map_err(|error| status(&error))
    }

    /// Volumes of a batch, groups taken apart; two names for one volume are refused, an unknown one is answered in its place.
    fn resolve_all(&self, names: &[String]) -> std::result::Result<Vec<(String, Result<Resolved>)>, Status> {
        let names = request::volumes(names).map_err(|error| status(&error))?;
        let mut seen = HashSet::new();
        let mut volumes = Vec::new();
        let members = |name: &String| {
            let group = self.control.group_members(name).map_err(|error| status(&error))?;
            Ok(group.unwrap_or_else(|| vec![name.clone()]))
        };
        let names: std::result::Result<Vec<Vec<String>>, Status> = names.iter().map(members).collect();
        let names: Vec<String> = names?.into_iter().flatten().collect();
        for name in &names {
            let resolved = self.control.resolve(name);
            if let Ok(volume) = &resolved
                && !seen.insert(volume.uuid)
            {
                let twice = Error::invalid(
                    "volumes",
                    format!("{name:?}, which is given under its other name too"),
                    "each volume once (groups taken apart)",
                );
                return Err(status(&twice));
            }
            volumes.push((name.clone(), resolved));
        }
        Ok(volumes)
    }

    /// Runs work on each volume, all at once, and answers per volume.
    async fn batch<T, F, Fut>(&self, volumes: Vec<(String, Result<Resolved>)>, work: F) -> Vec<PerVolume<T>>
    where
        F: Fn(Resolved) -> Fut,
        Fut: Future<Output = Result<T>>,
    {
        let work = &work;
        join_all(volumes.into_iter().map(|(name, resolved)| async move {
            match resolved {
                Err(error) => (volume_result(name, None, Some(&error)), None),
                Ok(volume) => match work(volume.clone()).await {
                    Ok(done) => (volume_result(name, Some(&volume), None), Some(done)),
                    Err(error) => (volume_result(name, Some(&volume), Some(&error)), None),
                },
            }
        }))
        .await
    }

    async fn views_of(&self, volume: Uuid) -> Vec<ViewStatus> {
        self.control.views(Some(volume)).await
    }
}

/// Runs work to its end, whoever waits for it, and answers within the caller's deadline.
async fn finish<T, F>(metadata: &MetadataMap, stopping: &watch::Receiver<bool>, work: F) -> Answer<T>
where
    F: Future<Output = std::result::Result<T, Status>> + Send + 'static,
    T: Send + 'static,
{
    let task = tokio::spawn(work);
    let ended = match deadline(metadata) {
        None => task.await,
        Some(deadline) => match tokio::time::timeout(deadline, task).await {
            Ok(ended) => ended,
            Err(_) => {
                return Err(Status::deadline_exceeded("the deadline passed; what the call began goes on to its end"));
            }
        },
    };
    match ended {
        Ok(Err(refusal)) if refusal.code() == Code::Aborted && *stopping.borrow() => {
            Err(Status::unavailable(refusal.message().to_owned()))
        }
        Ok(answer) => answer.map(Response::new),
        Err(_) => Err(Status::internal("the call failed inside the agent; its log says why")),
    }
}

/// What the caller gave, less a little, so that this answer comes before the transport's own.
fn deadline(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: u64 = number.parse().ok().filter(|_| number.len() <= 8)?;
    let given = match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    };
    Some(given.saturating_sub((given / 20).min(Duration::from_millis(20))))
}

fn volume_result(asked: String, volume: Option<&Resolved>, error: Option<&Error>) -> v1::VolumeResult {
    v1::VolumeResult {
        volume: asked,
        volume_uuid: volume.map(|volume| volume.uuid.to_string()).unwrap_or_default(),
        volume_name: volume.map(|volume| volume.name.clone()).unwrap_or_default(),
        code: error.map_or(Code::Ok, code) as i32,
        message: error.map(Error::to_string).unwrap_or_default(),
    }
}

/// Volumes done and failed.
fn tally<'a>(results: impl Iterator<Item = &'a v1::VolumeResult>) -> (u32, u32) {
    results.fold((0, 0), |(done, failed), result| match result.code {
        0 => (done + 1, failed),
        _ => (done, failed + 1),
    })
}

/// First instant of the stretch of history that goes on now.
fn recording_since(info: &VolumeInfo) -> u64 {
    info.coverage.last().filter(|interval| interval.end.is_none()).map_or(0, |interval| interval.start.0)
}

async fn edit_one(volume: Rc<Volume>, edit: Edit, default: cdp_journal::info::Settings) -> Result<VolumeInfo> {
    volume.edit(move |settings| edit.apply(settings.unwrap_or(default))).await?;
    Ok(volume.info())
}

#[tonic::async_trait]
impl CdpAgent for Service {
    async fn edit(&self, call: Request<v1::EditRequest>) -> Answer<v1::EditResponse> {
        let (metadata, _, wire) = call.into_parts();
        let this = self.clone();
        self.run(&metadata, async move {
            let edit = Edit::try_from(&wire).map_err(|error| status(&error))?;
            let volumes = this.resolve_all(&wire.volumes)?;
            let default = this.control.engine_config().default_settings;
            let done = this
                .batch(volumes, |volume| {
                    this.control.on_volume(volume.uuid, move |volume| edit_one(volume, edit, default))
                })
                .await;
            let (success, fail) = tally(done.iter().map(|(result, _)| result));
            let results = done.into_iter().map(|(result, info)| v1::EditResult {
                result: Some(result),
                settings: info.as_ref().and_then(|info| info.settings.as_ref()).map(convert::settings),
                cdp_state: info.map(|info| convert::state_word(info.state).to_owned()).unwrap_or_default(),
            });
            Ok(v1::EditResponse { success, fail, results: results.collect() })
        })
        .await
    }

    async fn enable(&self, call: Request<v1::EnableRequest>) -> Answer<v1::EnableResponse> {
        let (metadata, _, wire) = call.into_parts();
        let this = self.clone();
        self.run(&metadata, async move {
            let volumes = this.resolve_all(&wire.volumes)?;
            let done = this
                .batch(volumes, |volume| {
                    this.control.on_volume(volume.uuid, |volume| async move {
                        volume.enable().await?;
                        Ok(volume.info())
                    })
                })
                .await;
            let (success, fail) = tally(done.iter().map(|(result, _)| result));
            let results = done.into_iter().map(|(result, info)| v1::EnableResult {
                result: Some(result),
                settings: info.as_ref().and_then(|info| info.settings.as_ref()).map(convert::settings),
                time: info.as_ref().map_or(0, recording_since),
            });
            Ok(v1::EnableResponse { success, fail, results: results.collect() })
        })
        .await
    }

    async fn disable(&self, call: Request<v1::DisableRequest>) -> Answer<v1::DisableResponse> {
        let (metadata, _, wire) = call.into_parts();
        let this = self.clone();
        self.run(&metadata, async move {
            let volumes = this.resolve_all(&wire.volumes)?;
            let done = this
                .batch(volumes, |volume| {
                    this.control.on_volume(volume.uuid, |volume| async move {
                        volume.disable().await?;
                        Ok(volume.info())
                    })
                })
                .await;
            let (success, fail) = tally(done.iter().map(|(result, _)| result));
            let results = done.into_iter().map(|(result, info)| v1::DisableResult {
                result: Some(result),
                time: info
                    .and_then(|info| info.coverage.last().map(|last| last.end.unwrap_or(info.now).0))
                    .unwrap_or(0),
            });
            Ok(v1::DisableResponse { success, fail, results: results.collect() })
        })
        .await
    }

    async fn list(&self, call: Request<v1::ListRequest>) -> Answer<v1::ListResponse> {
        let (metadata, _, wire) = call.into_parts();
        let this = self.clone();
        self.run(&metadata, async move {
            let volumes = this.control.volumes().await;
            let matching: Vec<_> =
                volumes.iter().filter(|volume| volume.record.name.contains(&wire.filter_name)).collect();
            let (page, size) = (wire.page_num as usize, wire.page_size as usize);
            let shown = match size {
                0 => &matching[..],
                size => matching.chunks(size).nth(page).unwrap_or_default(),
            };
            Ok(v1::ListResponse {
                total_count: u32::try_from(matching.len()).unwrap_or(u32::MAX),
                list: shown.iter().map(|volume| convert::volume(volume, &this.about.place)).collect(),
            })
        })
        .await
    }

    async fn info(&self, call: Request<v1::InfoRequest>) -> Answer<v1::InfoResponse> {
        let (metadata, _, wire) = call.into_parts();
        let this = self.clone();
        self.run(&metadata, async move {
            let volume = this.resolve(&wire.volume)?;
            let state = this.control.volume(volume.uuid).await.map_err(|error| status(&error))?;
            match &state.info {
                Ok(info) => {
                    let views = this.views_of(volume.uuid).await;
                    let mut message = convert::info(info, &views, wire.all, &this.about.place);
                    if let (Some(told), Some(revert)) = (&mut message.revert, &info.revert) {
                        (told.blocks_per_s, told.eta_s) = this.control.copying.forecast(volume.uuid, revert);
                    }
                    // What cannot be read now is left out: the rest of the answer is wanted all the same.
                    let now = info.now;
                    let asked = this.control.on_volume(volume.uuid, move |volume| async move {
                        Ok((volume.reverts().await, volume.flush_near(now).await))
                    });
                    if let Ok((reverts, near)) = asked.await {
                        message.reverts = reverts.iter().flatten().map(convert::revert_point).collect();
                        message.flush_clean = near.ok().and_then(|near| near.before).map_or(0, |instant| instant.0);
                    }
                    Ok(message)
                }
                Err(_) => Ok(v1::InfoResponse {
                    host_uuid: this.about.place.host_uuid.clone(),
                    volume: Some(convert::volume(&state, &this.about.place)),
                    ..v1::InfoResponse::default()
                }),
            }
        })
        .await
    }

    async fn mark(&self, call: Request<v1::MarkRequest>) -> Answer<v1::MarkResponse> {
        let (metadata, _, wire) = call.into_parts();
        let this = self.clone();
        self.run(&metadata, async move {
            let mark = Mark::try_from(&wire).map_err(|error| status(&error))?;
            let volumes = this.resolve_all(&wire.volumes)?;
            let ticked = this.control.instant();
            let (instant, frozen) = match mark.quiesce.is_empty() {
                true => (ticked.await.map_err(|error| status(&error))?, Duration::ZERO),
                false => {
                    // No guest is frozen for what can be seen to fail.
                    this.can_mark(&volumes, &mark.name).await.map_err(|error| status(&error))?;
                    let (quiesces, events, state) =
                        (&this.control.quiesces, this.control.events(), this.control.state());
                    quiesce::while_frozen(&mark.quiesce, mark.frozen_max, quiesces, events, state, ticked)
                        .await
                        .map_err(|error| status(&error))?
                }
            };
            let done = this.mark_all(volumes, &mark, instant).await;
            let (success, fail) = tally(done.iter().map(|(result, _)| result));
            let first = done.iter().find_map(|(_, marker)| marker.clone());
            let results = done.into_iter().map(|(result, marker)| v1::MarkResult {
                result: Some(result),
                snap: marker.as_ref().map(convert::snap),
            });
            Ok(v1::MarkResponse {
                success,
                fail,
                results: results.collect(),
                name: first.as_ref().map(|marker| marker.name.clone()).unwrap_or_default(),
                time: first.map_or(0, |marker| marker.time.0),
                frozen_ns: u64::try_from(frozen.as_nanos()).unwrap_or(u64::MAX),
            })
        })
        .await
    }

    async fn view(&self, call: Request<v1::ViewRequest>) -> Answer<v1::ViewResponse> {
        self.view_call(call).await
    }

    type UseViewStream = Streaming<v1::UseViewResponse>;

    async fn use_view(&self, call: Request<v1::UseViewRequest>) -> Answer<Self::UseViewStream> {
        self.use_view_call(call).await
    }

    async fn list_views(&self, call: Request<v1::ListViewsRequest>) -> Answer<v1::ListViewsResponse> {
        let (metadata, _, wire) = call.into_parts();
        let this = self.clone();
        self.run(&metadata, async move {
            let of = match wire.volume.as_str() {
                "" => None,
                volume => Some(this.resolve(volume)?.uuid),
            };
            let views = this.control.views(of).await;
            Ok(v1::ListViewsResponse { views: views.iter().map(|view| this.view_message(view)).collect() })
        })
        .await
    }

    async fn close_view(&self, call: Request<v1::CloseViewRequest>) -> Answer<v1::CloseViewResponse> {
        self.close_view_call(call).await
    }

    async fn revert(&self, call: Request<v1::RevertRequest>) -> Answer<v1::RevertResponse> {
        let (metadata, _, wire) = call.into_parts();
        let this = self.clone();
        self.run(&metadata, async move {
            let back = Back::try_from(&wire).map_err(|error| status(&error))?;
            let volumes = this.resolve_all(&wire.volumes)?;
            let how = Rewind { force: wire.force, release: wire.release, dry_run: wire.dry_run };
            let results = this.revert_all(volumes, &back, how).await;
            let (success, fail) = tally(results.iter().filter_map(|result| result.result.as_ref()));
            Ok(v1::RevertResponse { success, fail, results, dry_run: wire.dry_run })
        })
        .await
    }

    type WaitRevertStream = Streaming<v1::RevertProgress>;

    async fn wait_revert(&self, call: Request<v1::WaitRevertRequest>) -> Answer<Self::WaitRevertStream> {
        let wire = call.into_inner();
        let interval = request::wait_interval(wire.interval_ms).map_err(|error| status(&error))?;
        let mut waiting = Vec::new();
        for (_, volume) in self.resolve_all(&wire.volumes)? {
            waiting.push(volume.map_err(|error| status(&error))?);
        }
        let (progress, received) = mpsc::channel(16);
        let this = self.clone();
        tokio::spawn(async move { this.tell_progress(waiting, interval, progress).await });
        let stream: Self::WaitRevertStream = Box::pin(ReceiverStream::new(received));
        Ok(Response::new(stream))
    }

    async fn release(&self, call: Request<v1::ReleaseRequest>) -> Answer<v1::ReleaseResponse> {
        let (metadata, _, wire) = call.into_parts();
        let this = self.clone();
        self.run(&metadata, async move {
            let volumes = this.resolve_all(&wire.volumes)?;
            let done = this
                .batch(volumes, |volume| {
                    this.control.on_volume(volume.uuid, |volume| async move { volume.release().await })
                })
                .await;
            let (success, fail) = tally(done.iter().map(|(result, _)| result));
            Ok(v1::ReleaseResponse { success, fail, results: done.into_iter().map(|(result, _)| result).collect() })
        })
        .await
    }

    async fn clean(&self, call: Request<v1::CleanRequest>) -> Answer<v1::CleanResponse> {
        let (metadata, _, wire) = call.into_parts();
        let this = self.clone();
        self.run(&metadata, async move {
            let volume = this.resolve(&wire.volume)?;
            let seq = wire.usd_seq;
            let cleaned = this
                .control
                .on_volume(volume.uuid, move |volume| async move {
                    let before = volume.info().used_bytes;
                    volume.clean(seq).await?;
                    let after = volume.info();
                    let thinned = seq.is_some_and(|seq| after.logs.iter().any(|log| log.seq == seq));
                    Ok(v1::CleanResponse { freed_bytes: before.saturating_sub(after.used_bytes), thinned })
                })
                .await;
            cleaned.map_err(|error| status(&error))
        })
        .await
    }

    async fn add_volume(&self, call: Request<v1::AddVolumeRequest>) -> Answer<v1::AddVolumeResponse> {
        let (metadata, _, wire) = call.into_parts();
        let this = self.clone();
        self.run(&metadata, async move {
            let new = NewVolume::try_from(wire).map_err(|error| status(&error))?;
            let uuid = this.control.add_volume(new).await.map_err(|error| status(&error))?;
            let added = this.control.volume(uuid).await.map_err(|error| status(&error))?;
            Ok(v1::AddVolumeResponse { volume: Some(convert::volume(&added, &this.about.place)) })
        })
        .await
    }

    async fn remove_volume(&self, call: Request<v1::RemoveVolumeRequest>) -> Answer<v1::RemoveVolumeResponse> {
        let (metadata, _, wire) = call.into_parts();
        let this = self.clone();
        self.run(&metadata, async move {
            let volume = this.resolve(&wire.volume)?;
            let removed = this.control.remove_volume(volume.uuid, wire.force, wire.clean).await;
            let removed = removed.map_err(|error| status(&error))?;
            Ok(v1::RemoveVolumeResponse { volume: Some(convert::volume(&removed, &this.about.place)) })
        })
        .await
    }

    async fn resize_volume(&self, call: Request<v1::ResizeVolumeRequest>) -> Answer<v1::ResizeVolumeResponse> {
        let (metadata, _, wire) = call.into_parts();
        let this = self.clone();
        self.run(&metadata, async move {
            if let Some(size) = wire.size.filter(|size| *size == 0 || !size.is_multiple_of(512)) {
                return Err(status(&Error::invalid("size", size, "a multiple of 512 bytes, more than 0")));
            }
            let volume = this.resolve(&wire.volume)?;
            let resized = this.control.resize_volume(volume.uuid, wire.size).await;
            let (old_size, info) = resized.map_err(|error| status(&error))?;
            Ok(v1::ResizeVolumeResponse { old_size, size: info.size, primary_size: info.primary_size })
        })
        .await
    }

    async fn override_volume(&self, call: Request<v1::OverrideVolumeRequest>) -> Answer<v1::OverrideVolumeResponse> {
        let (metadata, _, wire) = call.into_parts();
        let this = self.clone();
        self.run(&metadata, async move {
            let health = request::override_health(wire.health).map_err(|error| status(&error))?;
            let volume = this.resolve(&wire.volume)?;
            let after = this.control.override_volume(volume.uuid, health).await.map_err(|error| status(&error))?;
            Ok(v1::OverrideVolumeResponse { volume: Some(convert::volume(&after, &this.about.place)) })
        })
        .await
    }

    async fn attach_volume(&self, call: Request<v1::AttachVolumeRequest>) -> Answer<v1::AttachVolumeResponse> {
        let (metadata, _, wire) = call.into_parts();
        let this = self.clone();
        self.run(&metadata, async move {
            let volume = this.resolve(&wire.volume)?;
            let after = this.control.attach_volume(volume.uuid).await.map_err(|error| status(&error))?;
            Ok(v1::AttachVolumeResponse { volume: Some(convert::volume(&after, &this.about.place)) })
        })
        .await
    }

    async fn init_disk(&self, call: Request<v1::InitDiskRequest>) -> Answer<v1::InitDiskResponse> {
        let (metadata, _, wire) = call.into_parts();
        let this = self.clone();
        self.run(&metadata, async move {
            let NewDisk { path, size, segment_size, force } =
                NewDisk::try_from(wire).map_err(|error| status(&error))?;
            let disk = this.control.init_disk(path, size, InitOptions { segment_size, force }).await;
            Ok(v1::InitDiskResponse { disk: Some(convert::disk(&disk.map_err(|error| status(&error))?)) })
        })
        .await
    }

    async fn list_disks(&self, call: Request<v1::ListDisksRequest>) -> Answer<v1::ListDisksResponse> {
        let (metadata, _, _) = call.into_parts();
        let this = self.clone();
        self.run(&metadata, async move {
            Ok(v1::ListDisksResponse { disks: this.control.disks().await.iter().map(convert::disk).collect() })
        })
        .await
    }

    async fn timeline(&self, call: Request<v1::TimelineRequest>) -> Answer<v1::TimelineResponse> {
        let (metadata, _, wire) = call.into_parts();
        let this = self.clone();
        self.run(&metadata, async move {
            let buckets = request::buckets(wire.buckets).map_err(|error| status(&error))?;
            let volume = this.resolve(&wire.volume)?;
            this.timeline_of(&volume, wire.from, wire.to, buckets).await.map_err(|error| status(&error))
        })
        .await
    }

    async fn view_group(&self, call: Request<v1::ViewGroupRequest>) -> Answer<v1::ViewGroupResponse> {
        let (metadata, extensions, wire) = call.into_parts();
        let peer = extensions.get::<Peer>().cloned().unwrap_or_default();
        let this = self.clone();
        self.run(&metadata, async move {
            let mut asked = request::View::try_from(&wire).map_err(|error| status(&error))?;
            asked.owner = peer.owner(asked.owner);
            let volumes = this.resolve_all(&wire.volumes)?;
            let volumes = volumes.into_iter().map(|(_, volume)| volume).collect::<Result<Vec<_>>>();
            let volumes = volumes.map_err(|error| status(&error))?;
            this.view_all(&volumes, &asked, &wire.snapshot_name).await.map_err(|error| status(&error))
        })
        .await
    }

    async fn locate(&self, call: Request<v1::LocateRequest>) -> Answer<v1::LocateResponse> {
        let (metadata, _, wire) = call.into_parts();
        let this = self.clone();
        self.run(&metadata, async move {
            let at = At::try_from(&wire).map_err(|error| status(&error))?;
            let volumes = this.resolve_all(&wire.volumes)?;
            this.locate_all(volumes, &at).await.map_err(|error| status(&error))
        })
        .await
    }

    async fn changes(&self, call: Request<v1::ChangesRequest>) -> Answer<v1::ChangesResponse> {
        let (metadata, _, wire) = call.into_parts();
        let this = self.clone();
        self.run(&metadata, async move {
            let asked = request::Changes::try_from(&wire).map_err(|error| status(&error))?;
            let volume = this.resolve(&wire.volume)?;
            let to = match asked.to {
                0 => this.control.instant().await.map_err(|error| status(&error))?,
                to => Instant(to),
            };
            let listed = this.control.on_volume(volume.uuid, move |volume| async move {
                volume.changes(Instant(asked.from), to, asked.skip, asked.limit).await
            });
            let list = listed.await.map_err(|error| status(&error))?;
            let changes = list.changes.iter().map(convert::change).collect();
            Ok(v1::ChangesResponse { total: list.total, changes, to: to.0 })
        })
        .await
    }

    async fn add_group(&self, call: Request<v1::AddGroupRequest>) -> Answer<v1::AddGroupResponse> {
        let (metadata, _, wire) = call.into_parts();
        let this = self.clone();
        self.run(&metadata, async move {
            let name = request::group_name(&wire.name).map_err(|error| status(&error))?;
            let volumes = this.resolve_all(&wire.volumes)?;
            let volumes = volumes.into_iter().map(|(_, volume)| volume).collect::<Result<Vec<_>>>();
            let volumes = volumes.map_err(|error| status(&error))?;
            let group = this.control.add_group(name, &volumes).await.map_err(|error| status(&error))?;
            Ok(v1::AddGroupResponse { group: Some(this.group_message(&group)) })
        })
        .await
    }

    async fn list_groups(&self, call: Request<v1::ListGroupsRequest>) -> Answer<v1::ListGroupsResponse> {
        let (metadata, _, _) = call.into_parts();
        let this = self.clone();
        self.run(&metadata, async move {
            let groups = this.control.groups();
            Ok(v1::ListGroupsResponse { groups: groups.iter().map(|group| this.group_message(group)).collect() })
        })
        .await
    }

    async fn remove_group(&self, call: Request<v1::RemoveGroupRequest>) -> Answer<v1::RemoveGroupResponse> {
        let (metadata, _, wire) = call.into_parts();
        let this = self.clone();
        self.run(&metadata, async move {
            let group = this.control.remove_group(&wire.name).await.map_err(|error| status(&error))?;
            Ok(v1::RemoveGroupResponse { group: Some(this.group_message(&group)) })
        })
        .await
    }

    type WatchEventsStream = Streaming<v1::Event>;

    async fn watch_events(&self, call: Request<v1::WatchEventsRequest>) -> Answer<Self::WatchEventsStream> {
        let wire = call.into_inner();
        let replay = request::replay(wire.replay).map_err(|error| status(&error))?;
        let mut volumes = Vec::new();
        if !wire.volumes.is_empty() {
            for (_, volume) in self.resolve_all(&wire.volumes)? {
                volumes.push(volume.map_err(|error| status(&error))?.uuid);
            }
        }
        let mut stopping = self.stopping.clone();
        let stopped = async move {
            let _ = stopping.wait_for(|stopping| *stopping).await; // its sender is gone: the agent ends too
        };
        let events = self.control.events().watch(volumes, replay, wire.follow);
        let stream: Self::WatchEventsStream = Box::pin(events.map(Ok).take_until(stopped.boxed()));
        Ok(Response::new(stream))
    }

    async fn status(&self, call: Request<v1::StatusRequest>) -> Answer<v1::StatusResponse> {
        let (metadata, _, _) = call.into_parts();
        let this = self.clone();
        self.run(&metadata, async move {
            let volumes = this.control.volumes().await;
            let (disks, views) = (this.control.disks().await, this.control.views(None).await);
            let now = this.control.instant_or_newest().await.map_err(|error| status(&error))?;
            let served = || volumes.iter().filter_map(|volume| volume.info.as_ref().ok());
            let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
            let healthy = served().filter(|info| info.health == cdp_journal::info::Health::Ok).count();
            Ok(v1::StatusResponse {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                format_version: u32::from(cdp_journal::format::VERSION),
                host_uuid: this.about.place.host_uuid.clone(),
                host_name: this.about.place.host_name.clone(),
                start_time: this.about.start_ns,
                now: now.0,
                clock_lead_ns: this.control.clock_lead_ns(),
                shards: count(this.control.shards().len()),
                nbd_uris: this.about.place.nbd.iter().map(|uri| uri.replace("{}", "")).collect(),
                grpc_endpoints: this.about.endpoints.clone(),
                config_path: this.about.config_path.clone(),
                state_dir: this.control.state().path().display().to_string(),
                volumes: count(volumes.len()),
                volumes_unhealthy: count(volumes.len() - healthy),
                views: count(views.len()),
                disks: count(disks.len()),
                disks_offline: count(disks.iter().filter(|disk| !disk.info.online).count()),
                backlog_bytes: served().map(|info| info.backlog_bytes).sum(),
                backlog_bytes_max: 0,
                used_bytes: served().map(|info| info.used_bytes).sum(),
            })
        })
        .await
    }
}

impl Service {
    /// Whether each volume is there and none has a marker of this name (empty: one that is made).
    async fn can_mark(&self, volumes: &[(String, Result<Resolved>)], name: &str) -> Result<()> {
        for (_, volume) in volumes {
            let volume = volume.as_ref().map_err(Clone::clone)?;
            let info = self.control.info(volume.uuid).await?;
            if info.markers.iter().any(|marker| marker.name == name) {
                return Err(Error::Exists { what: "marker", name: format!("{name} in {}", volume.name) });
            }
        }
        Ok(())
    }

    /// Adds one marker to each volume; one without a name is called alike in all of them.
    async fn mark_all(
        &self,
        volumes: Vec<(String, Result<Resolved>)>,
        mark: &Mark,
        instant: Instant,
    ) -> Vec<PerVolume<Marker>> {
        let (names, auto) = match mark.name.as_str() {
            "" => (cdp_journal::auto_names(instant).to_vec(), true),
            name => (vec![name.to_owned()], false),
        };
        let mut done = Vec::new();
        for name in names {
            done = self
                .batch(volumes.clone(), |volume| {
                    let (name, kind) = (name.clone(), mark.kind);
                    self.control.on_volume(volume.uuid, move |volume| async move {
                        volume.mark_as(&name, kind, instant, auto).await
                    })
                })
                .await;
            // Taken in one of them: they all get the next name.
            if !done.iter().any(|(result, _)| result.code == Code::AlreadyExists as i32) {
                break;
            }
        }
        done
    }

    async fn view_all(
        &self,
        volumes: &[Resolved],
        asked: &request::View,
        snapshot_name: &str,
    ) -> Result<v1::ViewGroupResponse> {
        let time = self.group_instant(volumes, &asked.at).await?;
        let mut views = Vec::new();
        if asked.off {
            for volume in volumes {
                let open = self.views_of(volume.uuid).await;
                let meant = open.iter().find(|view| {
                    view.info.writable == asked.writable && view.info.time == time && !view.record.temporary
                });
                match meant {
                    Some(view) => match self.control.close_view(view.info.id, false).await {
                        Err(Error::NotFound { .. }) => {} // somebody else closed it just now
                        closed => views.push(closed?),
                    },
                    None => continue,
                }
            }
        } else {
            let terms = Terms { owner: asked.owner.clone(), ttl: asked.ttl, temporary: false };
            views = self.control.open_views(volumes, time, snapshot_name, asked.writable, &terms).await?;
        }
        Ok(v1::ViewGroupResponse { time: time.0, views: views.iter().map(|view| self.view_message(view)).collect() })
    }

    fn group_message(&self, group: &Group) -> v1::Group {
        let members: Vec<_> = group.members.iter().map(|member| (member, self.control.resolve(member).ok())).collect();
        // A member of the configuration that is not there (yet) is told as it was written.
        let name = |(member, volume): &(&String, Option<Resolved>)| {
            volume.as_ref().map_or_else(|| (*member).clone(), |volume| volume.name.clone())
        };
        let uuid = |(_, volume): &(&String, Option<Resolved>)| {
            volume.as_ref().map(|volume| volume.uuid.to_string()).unwrap_or_default()
        };
        v1::Group {
            name: group.name.clone(),
            volumes: members.iter().map(name).collect(),
            volume_uuids: members.iter().map(uuid).collect(),
            configured: group.configured,
        }
    }

    /// Where each volume of a revert goes.
    async fn targets(&self, volumes: &[Resolved], back: &Back) -> Result<Vec<(Uuid, Instant)>> {
        match back {
            Back::To(at) => {
                let target = self.group_instant(volumes, at).await?;
                Ok(volumes.iter().map(|volume| (volume.uuid, target)).collect())
            }
            Back::Undo => {
                let mut targets = Vec::new();
                for volume in volumes {
                    targets.push((volume.uuid, self.before_last_revert(volume).await?));
                }
                // The members of one revert have one instant.
                if targets.iter().any(|(_, target)| *target != targets[0].1) {
                    let each = volumes.iter().zip(&targets);
                    let each = each.map(|(volume, (_, target))| format!("{} at {}", volume.name, target.0 + 1));
                    return Err(Error::State(format!(
                        "the newest reverts of these volumes are not of one call ({}): undo each by itself, or give an instant",
                        each.collect::<Vec<_>>().join(", ")
                    )));
                }
                Ok(targets)
            }
        }
    }

    async fn revert_all(
        &self,
        volumes: Vec<(String, Result<Resolved>)>,
        back: &Back,
        how: Rewind,
    ) -> Vec<v1::RevertResult> {
        // Together or not at all: one unknown volume stops the others.
        let known: Vec<Resolved> = volumes.iter().filter_map(|(_, volume)| volume.as_ref().ok().cloned()).collect();
        let refused = match known.len() == volumes.len() {
            false => Some(Error::Gone("not done: another volume of the call was not found".to_owned())),
            true => None,
        };
        let targets = match refused {
            Some(error) => Err(error),
            None => self.targets(&known, back).await,
        };
        let reports = match targets {
            Err(error) => known.iter().map(|_| Err(error.clone())).collect(),
            Ok(targets) => self.control.revert(targets, how).await,
        };
        let mut reports = known.iter().zip(reports);
        let mut results = Vec::new();
        for (name, resolved) in volumes {
            let report = match &resolved {
                Ok(_) => reports.next().map_or_else(|| Err(Error::Gone("not done".to_owned())), |(_, report)| report),
                Err(error) => Err(error.clone()),
            };
            let held = match &resolved {
                Ok(volume) => self.control.info(volume.uuid).await.is_ok_and(|info| info.held),
                Err(_) => false,
            };
            let mut result = v1::RevertResult {
                result: Some(volume_result(name, resolved.as_ref().ok(), report.as_ref().err())),
                held,
                ..v1::RevertResult::default()
            };
            if let Ok(report) = report {
                result = v1::RevertResult {
                    time: report.instant.0,
                    target: report.target.0,
                    blocks: report.blocks,
                    bytes: report.bytes,
                    needed_bytes: report.needed_bytes,
                    available_bytes: report.available_bytes,
                    undo_time: if how.dry_run { 0 } else { report.instant.before().0 },
                    ..result
                };
            }
            results.push(result);
        }
        results
    }

    /// Tells how far each pending revert is until there is none; ends early when nobody listens or the agent stops.
    async fn tell_progress(
        mut self,
        mut waiting: Vec<Resolved>,
        interval: Duration,
        progress: mpsc::Sender<std::result::Result<v1::RevertProgress, Status>>,
    ) {
        while !waiting.is_empty() && !*self.stopping.borrow() {
            let mut pending = Vec::new();
            for volume in waiting {
                let message = match self.control.info(volume.uuid).await {
                    Ok(info) => {
                        let mut told = convert::progress(volume.uuid, &volume.name, info.revert.as_ref());
                        if let Some(revert) = &info.revert {
                            (told.blocks_per_s, told.eta_s) = self.control.copying.forecast(volume.uuid, revert);
                        }
                        Ok(told)
                    }
                    Err(error) => Err(status(&error)),
                };
                let (done, failed) = (message.as_ref().is_ok_and(|message| message.done), message.is_err());
                if progress.send(message).await.is_err() || failed {
                    return;
                }
                if !done {
                    pending.push(volume);
                }
            }
            waiting = pending;
            if !waiting.is_empty() {
                tokio::select! {
                    () = tokio::time::sleep(interval) => {}
                    () = progress.closed() => return,
                    _ = self.stopping.wait_for(|stopping| *stopping) => {}
                }
            }
        }
        if !waiting.is_empty() {
            let _ = progress
                .send(Err(Status::unavailable("the agent is stopping; the copying goes on after its start")))
                .await;
        }
    }

    async fn timeline_of(&self, volume: &Resolved, from: u64, to: u64, buckets: u32) -> Result<v1::TimelineResponse> {
        let info = self.control.info(volume.uuid).await?;
        let now = self.control.instant().await?;
        let to = if to == 0 { now } else { Instant(to) };
        let oldest = info.logs.first().map_or(to.before(), |log| log.start);
        let from = if from == 0 { oldest.min(to.before()) } else { Instant(from) };
        if from >= to {
            return Err(Error::invalid("from", from, format!("before to, which is {to}")));
        }
        let (pieces, reverts) = match info.logs.is_empty() {
            true => (Vec::new(), Vec::new()),
            false => {
                self.control
                    .on_volume(volume.uuid, move |volume| async move {
                        Ok((volume.timeline(from, to, buckets).await?, volume.reverts().await?))
                    })
                    .await?
            }
        };
        let inside = |time: Instant| from <= time && time <= to;
        let overlaps = |start: Instant, end: Option<Instant>| start <= to && end.is_none_or(|end| end >= from);
        Ok(v1::TimelineResponse {
            from: from.0,
            to: to.0,
            buckets: pieces
                .iter()
                .map(|piece| v1::TimelineBucket {
                    start: piece.start.0,
                    blocks: piece.blocks,
                    bytes: piece.bytes,
                    flushes: piece.flushes,
                    flushes_clean: piece.flushes_clean,
                })
                .collect(),
            snaps: info.markers.iter().filter(|marker| inside(marker.time)).map(convert::snap).collect(),
            reverts: reverts.iter().filter(|revert| inside(revert.instant)).map(convert::revert_point).collect(),
            cdp_info: info
                .logs
                .iter()
                .filter(|log| overlaps(log.start, log.end))
                .map(|log| convert::log(log, &[], &self.about.place))
                .collect(),
            coverage: info
                .coverage
                .iter()
                .filter(|interval| overlaps(interval.start, interval.end))
                .map(convert::interval)
                .collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_are_read_in_every_unit_and_end_a_little_early() {
        let of = |text: &str| deadline(&metadata(text));
        assert_eq!(of("2H"), Some(Duration::from_secs(7200) - Duration::from_millis(20)));
        assert_eq!(of("1M"), Some(Duration::from_secs(60) - Duration::from_millis(20)));
        assert_eq!(of("100m"), Some(Duration::from_millis(95)));
        assert_eq!(of("200u"), Some(Duration::from_micros(190)));
        assert_eq!(of("20n"), Some(Duration::from_nanos(19)));
        assert_eq!(
            (of("0S"), of("5"), of("S"), of("5x"), of("999999999S")),
            (Some(Duration::ZERO), None, None, None, None)
        );
        assert_eq!(deadline(&MetadataMap::new()), None);
    }

    fn metadata(timeout: &str) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        metadata.insert("grpc-timeout", timeout.parse().expect("a header"));
        metadata
    }

    /// Goal: a caller's deadline ends the waiting and not the work.
    #[tokio::test]
    async fn a_deadline_answers_and_the_work_still_ends() {
        let (_stop, stopping) = watch::channel(false);
        let (go, wait) = tokio::sync::oneshot::channel::<()>();
        let (done, ended) = tokio::sync::oneshot::channel::<u32>();
        let work = async move {
            wait.await.map_err(|_| Status::internal("nobody let it go on"))?;
            done.send(7).map_err(|_| Status::internal("nobody waits"))
        };
        let answer = finish(&metadata("1m"), &stopping, work).await;
        assert_eq!(answer.expect_err("it cannot be done yet").code(), Code::DeadlineExceeded);
        go.send(()).expect("the work goes on");
        assert_eq!(ended.await, Ok(7));
    }

    #[tokio::test]
    async fn what_goes_away_while_the_agent_stops_is_unavailable() {
        let (stop, stopping) = watch::channel(false);
        let gone = || async { Err::<(), _>(status(&Error::Gone("the shard has stopped".into()))) };
        let answer = finish(&MetadataMap::new(), &stopping, gone()).await;
        assert_eq!(answer.expect_err("gone").code(), Code::Aborted);
        stop.send_replace(true);
        let answer = finish(&MetadataMap::new(), &stopping, gone()).await.expect_err("gone");
        assert_eq!((answer.code(), answer.message()), (Code::Unavailable, "the shard has stopped"));
    }

    #[test]
    fn a_batch_is_tallied_by_code() {
        let volume = Resolved { uuid: Uuid::from_u128(1), name: "a".into() };
        let done = volume_result("a".into(), Some(&volume), None);
        let lost = volume_result("b".into(), None, Some(&Error::NotFound { what: "volume", name: "b".into() }));
        assert_eq!((done.code, done.volume_name.as_str(), lost.code), (0, "a", 5));
        assert!(lost.message.contains("\"b\"") && lost.volume_uuid.is_empty());
        assert_eq!(tally([&done, &lost, &lost].into_iter()), (1, 2));
    }
}
