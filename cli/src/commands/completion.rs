//! `completion`.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::{
    args::Cli,
    failure::Failure,
    output::{self, Answer},
};

pub fn print(shell: Shell) -> Result<Answer, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "cdpctl", &mut script);
    output::write(&String::from_utf8_lossy(&script))?;
    Ok(Answer::printed())
}
