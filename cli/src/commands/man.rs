//! `man`: the manual pages, made from the command line's own help.

use std::{fs, path::Path};

use clap::CommandFactory;

use crate::{args::Cli, failure::Failure, output::Answer};

/// Writes a page for the program and one for each command.
pub fn write(directory: &Path) -> Result<Answer, Failure> {
    let failed = |source| Failure::io(format!("write manual pages to {}", directory.display()), source);
    fs::create_dir_all(directory).map_err(failed)?;
    let mut command = Cli::command();
    command.build();
    let mut pages = 0;
    page(&command, "cdpctl", directory, &mut pages).map_err(failed)?;
    let json = serde_json::json!({ "directory": directory.display().to_string(), "pages": pages });
    Ok(Answer::done(json, format!("{pages} pages in {}\n", directory.display())))
}

fn page(command: &clap::Command, name: &str, directory: &Path, pages: &mut u32) -> std::io::Result<()> {
    let mut text = Vec::new();
    clap_mangen::Man::new(command.clone()).title(name.to_uppercase()).source("cdp").render(&mut text)?;
    fs::write(directory.join(format!("{name}.1")), text)?;
    *pages += 1;
    for inner in command.get_subcommands().filter(|inner| !inner.is_hide_set() && inner.get_name() != "help") {
        page(inner, &format!("{name}-{}", inner.get_name()), directory, pages)?;
    }
    Ok(())
}
