//! `volume add`, `volume remove`, `volume resize`, `volume xml`, `volume override`.

use cdp_proto::{
    parse::size_text,
    v1::{self, Health},
};
use serde_json::json;

use super::{info, list::health, missing, path_for};
use crate::{
    args::{Override, VolumeAdd, VolumeAttach, VolumeOverride, VolumeRemove, VolumeResize, VolumeXml, XmlForm},
    connect::Agent,
    failure::Failure,
    nbd::Export,
    output::Answer,
    shape,
};

pub async fn add(agent: &Agent, args: VolumeAdd) -> Result<Answer, Failure> {
    let path = path_for(agent, "--path", &args.path)?;
    let what = format!("volume add {}", args.name);
    let question = v1::AddVolumeRequest {
        name: args.name,
        path,
        uuid: args.uuid.unwrap_or_default(),
        size: args.size.unwrap_or_default(),
        create: args.create,
    };
    let answer = agent
        .call(what.clone(), question, |mut client, question| async move { client.add_volume(question).await })
        .await?;
    let volume = answer.volume.ok_or_else(|| missing(&what))?;
    let text = format!(
        "{}: {} of {} at {}; start keeping history with: cdpctl enable {}\n",
        volume.volume_name,
        size_text(volume.size),
        volume.path,
        volume.nbd_uri,
        volume.volume_name
    );
    Ok(Answer::done(shape::volume(&volume), text))
}

pub async fn remove(agent: &Agent, args: VolumeRemove) -> Result<Answer, Failure> {
    let what = format!("volume remove {}", args.volume);
    let question = v1::RemoveVolumeRequest { volume: args.volume, force: args.force, clean: args.clean };
    let answer = agent
        .call(what.clone(), question, |mut client, question| async move { client.remove_volume(question).await })
        .await?;
    let volume = answer.volume.ok_or_else(|| missing(&what))?;
    let history = if args.clean { "its history is gone" } else { "its history stays on the CDP disk" };
    let text = format!("{}: no longer served; its data stays on {}, {history}\n", volume.volume_name, volume.path);
    Ok(Answer::done(shape::volume(&volume), text))
}

pub async fn resize(agent: &Agent, args: VolumeResize) -> Result<Answer, Failure> {
    let VolumeResize { volume, size } = args;
    let question = v1::ResizeVolumeRequest { volume: volume.clone(), size };
    let what = format!("volume resize {volume}");
    let answer =
        agent.call(what, question, |mut client, question| async move { client.resize_volume(question).await }).await?;
    let text = if answer.old_size == answer.size {
        format!("{volume}: stays at {} ({} bytes)\n", size_text(answer.size), answer.size)
    } else {
        format!("{volume}: from {} to {} ({} bytes)\n", size_text(answer.old_size), size_text(answer.size), answer.size)
    };
    let json = json!({ "volume": volume, "old_size": answer.old_size, "size": answer.size, "primary_size": answer.primary_size });
    Ok(Answer::done(json, text))
}

pub async fn xml(agent: &Agent, args: VolumeXml) -> Result<Answer, Failure> {
    let what = format!("volume xml {}", args.volume);
    let info = info::fetch(agent, &args.volume, false).await?;
    let volume = info.volume.ok_or_else(|| missing(&what))?;
    let export: Export = volume.nbd_uri.parse().map_err(|why| {
        Failure::call(&what, tonic::Status::failed_precondition(format!("nbd_uri {:?}: {why}", volume.nbd_uri)))
    })?;
    let libvirt = export.libvirt(&args.target, &volume.volume_uuid);
    let (blockdev, drive) = (export.qemu_blockdev(&volume.volume_uuid), export.qemu_drive());
    let json = json!({ "nbd_uri": volume.nbd_uri, "xml": libvirt, "qemu_blockdev": blockdev, "qemu_drive": drive });
    let text = match args.only {
        Some(XmlForm::Libvirt) => libvirt,
        Some(XmlForm::Blockdev) => shell_line(&blockdev),
        Some(XmlForm::Drive) => shell_line(&drive),
        None => {
            let (blockdev, drive) = (shell_line(&blockdev), shell_line(&drive));
            format!("<!-- libvirt -->\n{libvirt}\n<!-- qemu, either\n{blockdev}or\n{drive}-->\n")
        }
    };
    Ok(Answer::done(json, text))
}

pub async fn override_health(agent: &Agent, args: VolumeOverride) -> Result<Answer, Failure> {
    let state = match args.accept {
        Override::NeedsJournal => Health::NeedsJournal,
        Override::PrimaryChanged => Health::PrimaryChanged,
        Override::RevertIncomplete => Health::RevertIncomplete,
    };
    let what = format!("volume override {}", args.volume);
    let question = v1::OverrideVolumeRequest { volume: args.volume, health: state as i32 };
    let answer = agent
        .call(what.clone(), question, |mut client, question| async move { client.override_volume(question).await })
        .await?;
    let volume = answer.volume.ok_or_else(|| missing(&what))?;
    let text =
        format!("{}: goes on with {} as it is; health is {}\n", volume.volume_name, volume.path, health(&volume));
    Ok(Answer::done(shape::volume(&volume), text))
}

pub async fn attach(agent: &Agent, args: VolumeAttach) -> Result<Answer, Failure> {
    let what = format!("volume attach {}", args.volume);
    let question = v1::AttachVolumeRequest { volume: args.volume };
    let answer = agent
        .call(what.clone(), question, |mut client, question| async move { client.attach_volume(question).await })
        .await?;
    let volume = answer.volume.ok_or_else(|| missing(&what))?;
    let text = format!("{}: its history was taken over; health is {}\n", volume.volume_name, health(&volume));
    Ok(Answer::done(shape::volume(&volume), text))
}

/// Arguments as one shell command line would have them.
fn shell_line(args: &[String]) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_./=,:+%@".contains(&b);
    let quote =
        |arg: &String| if arg.bytes().all(plain) { arg.clone() } else { format!("'{}'", arg.replace('\'', r"'\''")) };
    args.iter().map(quote).collect::<Vec<_>>().join(" ") + "\n"
}
