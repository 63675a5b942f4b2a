//! `cdp-agent`: the daemon's command line.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use cdp_agent::config::{CONFIG_PATH, Config, LogFormat};
use cdp_agent::daemon::{self, Dev};
use cdp_agent::state::StateError;
use cdp_proto::parse;
use clap::Parser;
use tracing_subscriber::EnvFilter;

/// The backlog is many blocks of 4 KiB, aligned to as much. The system's allocator took 136 MiB where this one takes 84 (docs/performance.md).
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// System calls that are under way at the end get so long: on a disk that hangs they never return.
const SYSTEM_CALLS_GRACE: Duration = Duration::from_secs(5);

/// Continuous data protection of VM disks: serves volumes over NBD, keeps every write, shows and restores any instant.
///
/// Exit status: 0 after an orderly stop, 1 when it failed while starting or running, 2 when the command line or the configuration
/// is wrong or a file of the state is damaged, so that starting again would not help.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Configuration file.
    #[arg(long, value_name = "FILE", default_value = CONFIG_PATH, conflicts_with = "dev")]
    config: PathBuf,
    /// Check the configuration, the state directory and the TLS files, and end.
    #[arg(long, conflicts_with = "dev")]
    check: bool,
    /// Run with everything under DIR: a file-backed volume "demo", enabled, its CDP disk, sockets and state. Goes on with
    /// what is there.
    #[arg(long, value_name = "DIR")]
    dev: Option<PathBuf>,
    /// Size of the demo volume, when it is made.
    #[arg(long, requires = "dev", default_value = "1GiB", value_parser = size)]
    size: u64,
    /// Size of the CDP disk, when it is made.
    #[arg(long, requires = "dev", default_value = "4GiB", value_parser = cdp_size)]
    cdp_size: u64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let (config, dev) = match configure(&args) {
        Ok(configured) => configured,
        Err(error) => {
            eprintln!("cdp-agent: {error:#}");
            return ExitCode::from(2);
        }
    };
    if args.check {
        return match daemon::check(&config) {
            Ok(()) => {
                println!("{}: ok", args.config.display());
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("cdp-agent: {error:#}");
                ExitCode::from(2)
            }
        };
    }
    start_log(&config);
    if config.lock_memory {
        daemon::lock_memory();
    }
    let config_path = dev.is_none().then_some(args.config.as_path());
    match run(config, config_path, dev) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::from(exit_status(&error))
        }
    }
}

/// 2, after which the unit leaves it at that, only for what no further start mends: a state directory that a predecessor has not let go of yet, or that
/// cannot be read just now, may be had at the next one.
fn exit_status(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<StateError>() {
        Some(StateError::Damaged { .. }) => 2,
        _ => 1,
    }
}

fn configure(args: &Args) -> Result<(Config, Option<Dev>)> {
    match &args.dev {
        None => Ok((Config::load(&args.config)?, None)),
        Some(dir) => {
            let mut dev = Dev { dir: dir.clone(), size: args.size, cdp_size: args.cdp_size };
            Ok((dev.prepare()?, Some(dev)))
        }
    }
}

fn run(config: Config, config_path: Option<&Path>, dev: Option<Dev>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(16)
        .thread_name("cdp-control")
        .enable_all()
        .build()
        .context("start the control plane's threads")?;
    let ended = runtime.block_on(daemon::run(config, config_path, dev));
    runtime.shutdown_timeout(SYSTEM_CALLS_GRACE);
    ended
}

/// Log lines go to standard error; `RUST_LOG` goes before the configuration.
fn start_log(config: &Config) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(&config.log_filter));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match config.log_format {
        LogFormat::Text => log.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
}

fn size(text: &str) -> Result<u64, String> {
    let bytes = parse::size_between(text, 1 << 20, 1 << 60).map_err(|error| error.to_string())?;
    if !bytes.is_multiple_of(512) {
        return Err(format!("size {text:?} is not valid: a multiple of 512 bytes"));
    }
    Ok(bytes)
}

fn cdp_size(text: &str) -> Result<u64, String> {
    let bytes = parse::size_between(text, 16 << 20, 1 << 60).map_err(|error| error.to_string())?;
    if !bytes.is_multiple_of(4096) {
        return Err(format!("size {text:?} is not valid: a multiple of 4096 bytes"));
    }
    Ok(bytes)
}
