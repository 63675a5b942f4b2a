//! One file per group of commands. Each makes its call and turns the answer into text and JSON.

mod batch;
mod bisect;
mod clean;
mod completion;
mod disk;
mod events;
mod export;
mod files;
mod group;
mod info;
mod list;
mod man;
mod mark;
mod own_view;
mod revert;
mod settings;
mod status;
mod timeline;
mod view;
mod volume;
mod when;

use std::path::Path;

use crate::{
    args::{Cli, Command, Disk, Group, View, Volume},
    connect::Agent,
    failure::Failure,
    output::Answer,
};

/// Runs the command of a parsed command line.
pub async fn run(cli: Cli) -> Result<Answer, Failure> {
    let format = cli.global.output;
    if let Command::Completion { shell } = cli.command {
        return completion::print(shell);
    }
    if let Command::Man { directory } = &cli.command {
        return man::write(directory);
    }
    if let Command::Disk(Disk::Check { path }) = cli.command {
        return disk::check(&path);
    }
    let agent = Agent::connect(&cli.global).await?;
    let agent = &agent;
    match cli.command {
        Command::Disk(Disk::Init(args)) => disk::init(agent, args).await,
        Command::Disk(Disk::List) => disk::list(agent).await,
        Command::Disk(Disk::Check { path }) => disk::check(&path),
        Command::Volume(Volume::Add(args)) => volume::add(agent, args).await,
        Command::Volume(Volume::List(args)) => list::volumes(agent, args).await,
        Command::Volume(Volume::Remove(args)) => volume::remove(agent, args).await,
        Command::Volume(Volume::Resize(args)) => volume::resize(agent, args).await,
        Command::Volume(Volume::Xml(args)) => volume::xml(agent, args).await,
        Command::Volume(Volume::Attach(args)) => volume::attach(agent, args).await,
        Command::Volume(Volume::Override(args)) => volume::override_health(agent, args).await,
        Command::Edit(args) => settings::edit(agent, args).await,
        Command::Enable(args) => settings::enable(agent, args).await,
        Command::Disable(args) => settings::disable(agent, args).await,
        Command::List(args) => list::settings(agent, args).await,
        Command::Info(args) => info::show(agent, args).await,
        Command::Mark(args) => mark::mark(agent, args).await,
        Command::View(View::Open(args)) => view::open(agent, args).await,
        Command::View(View::List { volume }) => view::list(agent, volume).await,
        Command::View(View::Close { id, force }) => view::close(agent, id, force).await,
        Command::View(View::Ls(args)) => files::list(agent, args).await,
        Command::View(View::Cp(args)) => files::copy(agent, args).await,
        Command::Revert(args) => revert::revert(agent, args, format).await,
        Command::Release(args) => revert::release(agent, args).await,
        Command::Clean(args) => clean::clean(agent, args).await,
        Command::Events(args) => events::show(agent, args, format).await,
        Command::Timeline(args) => timeline::show(agent, args, format).await,
        Command::Bisect(args) => bisect::bisect(agent, args).await,
        Command::Export(args) => export::export(agent, args).await,
        Command::Group(Group::Add { name, volumes }) => group::add(agent, name, volumes).await,
        Command::Group(Group::List) => group::list(agent).await,
        Command::Group(Group::Remove { name }) => group::remove(agent, name).await,
        Command::Status => status::show(agent).await,
        Command::Man { directory } => man::write(&directory),
        Command::Completion { shell } => completion::print(shell),
    }
}

/// A path as the agent must see it: it runs in another directory, perhaps on another host.
fn path_for(agent: &Agent, option: &str, path: &Path) -> Result<String, Failure> {
    let absolute = if agent.is_local() {
        std::path::absolute(path).map_err(|source| Failure::io(format!("{option} {}", path.display()), source))?
    } else if path.is_absolute() {
        path.to_owned()
    } else {
        let text = format!(
            "{option} {:?} is not valid: must be absolute, for an agent on another host",
            path.display().to_string()
        );
        return Err(Failure::Usage(text));
    };
    match absolute.into_os_string().into_string() {
        Ok(path) => Ok(path),
        Err(path) => Err(Failure::Usage(format!("{option} {path:?} is not valid: must be UTF-8"))),
    }
}

/// `volume demo` of answers that lack what they should have: an agent of another version.
fn missing(what: &str) -> Failure {
    Failure::call(what, tonic::Status::internal("the agent's answer is incomplete; is it of another version?"))
}
