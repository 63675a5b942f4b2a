//! The calls about views: `View`, `UseView`, `CloseView`.
//!
//! What mounts is for root on this host alone: whoever may mount an image of his choice at a directory of his choice owns the host.

use cdp_journal::info::ViewInfo;
use cdp_journal::{Error, Result};
use cdp_proto::v1;
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status};

use super::request::{self, At};
use super::status::status;
use super::{Answer, Service, Streaming};
use crate::control::{MountWish, Terms, ViewStatus};
use crate::listen::Peer;

impl Service {
    pub(super) fn view_message(&self, view: &ViewStatus) -> v1::ViewInfo {
        let name = self.control.resolved(view.info.volume).map(|volume| volume.name).unwrap_or_default();
        super::convert::view(view, &name, &self.about.place)
    }

    pub(super) async fn view_call(&self, call: Request<v1::ViewRequest>) -> Answer<v1::ViewResponse> {
        let (metadata, extensions, wire) = call.into_parts();
        let peer = extensions.get::<Peer>().cloned().unwrap_or_default();
        let this = self.clone();
        self.run(&metadata, async move {
            let asked = request::View::try_from(&wire).map_err(|error| status(&error))?;
            if asked.mount.is_some() {
                peer.may_mount()?;
            }
            let view = match asked.off {
                true => this.view_off(&wire, asked).await?,
                false => Some(this.view_on(wire, asked, &peer).await?),
            };
            Ok(v1::ViewResponse {
                host_uuid: this.about.place.host_uuid.clone(),
                view: view.as_ref().map(|view| this.view_message(view)),
            })
        })
        .await
    }

    async fn view_on(
        &self,
        wire: v1::ViewRequest,
        asked: request::View,
        peer: &Peer,
    ) -> std::result::Result<ViewStatus, Status> {
        let volume = self.resolve(&wire.volume)?;
        let time = self.instant_of(&volume, &asked.at).await.map_err(|error| status(&error))?;
        let known: Vec<_> = self.control.views(Some(volume.uuid)).await.into_iter().map(|view| view.info.id).collect();
        let terms = Terms { owner: peer.owner(asked.owner), ttl: asked.ttl, temporary: false };
        let opened = self.control.open_view(volume.uuid, time, wire.snapshot_name, asked.writable, terms).await;
        let view = opened.map_err(|error| status(&error))?;
        let Some(dir) = asked.mount else { return Ok(view) };
        let wish = MountWish { dir: Some(dir), partition: asked.partition };
        let mounted = self.control.mount_view(view.info.id, wish).await;
        if mounted.is_err() && !known.contains(&view.info.id) {
            // Together or not at all.
            let _ = self.control.close_view(view.info.id, true).await; // the error that counts is the other one
        }
        mounted.map_err(|error| status(&error))
    }

    async fn view_off(
        &self,
        wire: &v1::ViewRequest,
        asked: request::View,
    ) -> std::result::Result<Option<ViewStatus>, Status> {
        let volume = self.resolve(&wire.volume)?;
        let views = self.control.views(Some(volume.uuid)).await;
        // A marker may have aged out since the view was opened: then the view is found by the marker's name.
        let time = match self.instant_of(&volume, &asked.at).await {
            Err(Error::NotFound { what: "marker", .. }) => None,
            found => Some(found.map_err(|error| status(&error))?),
        };
        let meant = |view: &ViewInfo| match time {
            Some(time) => view.time == time,
            None => view.snapshot_name == wire.snapshot_name,
        };
        let found = views
            .iter()
            .find(|view| view.info.writable == asked.writable && !view.record.temporary && meant(&view.info));
        let Some(view) = found else { return Ok(None) };
        match self.control.close_view(view.info.id, false).await {
            Err(Error::NotFound { .. }) => Ok(None), // somebody else closed it just now
            closed => closed.map(Some).map_err(|error| status(&error)),
        }
    }

    pub(super) async fn close_view_call(&self, call: Request<v1::CloseViewRequest>) -> Answer<v1::CloseViewResponse> {
        let (metadata, _, wire) = call.into_parts();
        let this = self.clone();
        self.run(&metadata, async move {
            let id = request::view_id(&wire.id).map_err(|error| status(&error))?;
            let closed = this.control.close_view(id, wire.force).await.map_err(|error| status(&error))?;
            Ok(v1::CloseViewResponse { view: Some(this.view_message(&closed)) })
        })
        .await
    }

    pub(super) async fn use_view_call(
        &self,
        call: Request<v1::UseViewRequest>,
    ) -> Answer<Streaming<v1::UseViewResponse>> {
        let peer = call.extensions().get::<Peer>().cloned().unwrap_or_default();
        let wire = call.into_inner();
        let mounts = !wire.unmounted;
        if mounts {
            peer.may_mount()?;
        }
        let at = At::try_from(&wire).map_err(|error| status(&error))?;
        let owner = peer.owner(request::owner(&wire.owner).map_err(|error| status(&error))?);
        let volume = self.resolve(&wire.volume)?;
        let time = self.instant_of(&volume, &at).await.map_err(|error| status(&error))?;
        let (told, stream) = mpsc::channel(1);
        let mut this = self.clone();
        // A task of its own: whoever goes, and whenever, it closes what it opened.
        tokio::spawn(async move {
            let terms = Terms { owner, ttl: None, temporary: true };
            // What is mounted is on scratch, so that the file system can bring itself in order.
            let opened = this.control.open_view(volume.uuid, time, wire.snapshot_name, mounts, terms).await;
            let view = match opened {
                Ok(view) => view,
                Err(error) => return drop(told.send(Err(error)).await),
            };
            let id = view.info.id;
            let ready: Result<ViewStatus> = match mounts {
                true => this.control.mount_view(id, MountWish { dir: None, partition: wire.partition }).await,
                false => Ok(view),
            };
            if told.send(ready).await.is_ok() {
                tokio::select! {
                    () = told.closed() => {}
                    _ = this.stopping.wait_for(|stopping| *stopping) => {}
                }
            }
            match this.control.close_view(id, true).await {
                Ok(_) | Err(Error::NotFound { .. }) => {}
                Err(error) => tracing::warn!(view = %id, %error, "a view of a call that ended cannot be closed"),
            }
        });
        let this = self.clone();
        let messages = ReceiverStream::new(stream).map(move |view| {
            view.map(|view| v1::UseViewResponse { view: Some(this.view_message(&view)) })
                .map_err(|error| status(&error))
        });
        let messages: Streaming<v1::UseViewResponse> = Box::pin(messages);
        Ok(tonic::Response::new(messages))
    }
}
