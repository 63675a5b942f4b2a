//! `cdpctl`: looks at, edits and rewinds the volumes of an agent.
//!
//! * [`args`]: what the command line may say
//! * [`connect`]: the way to the agent, deadlines; [`progress`]: what a terminal shows meanwhile
//! * [`commands`]: one file per group of commands: call, and turn the answer into text and JSON
//! * [`shape`]: the JSON of each message; [`output`]: tables and printing; [`draw`], [`svg`]: the timeline's pictures
//! * [`nbd`]: export addresses; [`nbd_client`], [`qcow2`]: what `export` reads from and writes to; [`files_differ`]: what a dry run compares
//! * [`failure`], [`exit`]: what went wrong, and the exit codes

mod args;
mod commands;
mod connect;
mod disk_check;
mod draw;
mod exit;
mod failure;
mod files_differ;
mod nbd;
mod nbd_client;
mod output;
mod progress;
mod qcow2;
mod shape;
mod svg;

use std::process::ExitCode;

use clap::Parser;

use crate::{
    args::{Cli, Format},
    exit::Exit,
    failure::Failure,
};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let format = cli.global.output;
    let ended = match commands::run(cli).await {
        Ok(answer) => output::print(&answer, format).map(|()| answer.exit),
        Err(failure) => Err(failure),
    };
    ExitCode::from(match ended {
        Ok(exit) => exit as u8,
        Err(failure) if failure.is_closed_pipe() => Exit::Ok as u8,
        Err(failure) => complain(&failure, format),
    })
}

fn complain(failure: &Failure, format: Format) -> u8 {
    match format {
        Format::Table => eprintln!("cdpctl: {failure}"),
        Format::Json => eprintln!("{}", failure.json()),
    }
    failure.exit() as u8
}
