//! What the command line may say.
// The doc comments are help texts for a terminal: `<disk>` is no HTML there.
#![allow(rustdoc::invalid_html_tags)]

use std::path::PathBuf;

use cdp_proto::parse::{self, Endpoint, InputError, When};
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum, ValueHint};
use clap_complete::Shell;

use crate::exit;

/// Looks at, edits and rewinds the volumes of a continuous data protection agent.
#[derive(Debug, Parser)]
#[command(name = "cdpctl", version, arg_required_else_help = true, after_help = ROOT_HELP, after_long_help = exit::help())]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

const ROOT_HELP: &str = "WHEN is nanoseconds since the epoch, RFC 3339 (2026-11-21T04:38:00Z), a marker's name, 'now', or relative ('5m ago').\n\
    flush-before:WHEN is the newest instant at or before it at which the guest had flushed and nothing was being written.\n\
    Sizes are bytes or 30GiB, durations seconds or 24h. Every command has examples: cdpctl COMMAND --help. Exit codes: cdpctl --help.";

/// Options that every command takes, before or after its name.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// The agent: unix:/path, http://host:port or https://host:port
    #[arg(long, global = true, env = "CDP_AGENT", value_name = "ENDPOINT", default_value = "unix:/run/cdp-agent/agent.sock", value_parser = endpoint)]
    pub agent: Endpoint,
    /// For people, or for programs (exact names and numbers)
    #[arg(long, short, global = true, value_name = "FORM", value_enum, default_value_t = Format::Table)]
    pub output: Format,
    /// Longest wait for an answer, such as 90s; 0: no limit [default: 60s; none for --follow and --wait]
    #[arg(long, global = true, value_name = "DURATION", value_parser = parse::duration_ns)]
    pub timeout: Option<u64>,
    /// https: certificates that may sign the agent's (PEM)
    #[arg(long, global = true, env = "CDP_TLS_CA", value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub tls_ca: Option<PathBuf>,
    /// https: this client's certificate (PEM)
    #[arg(long, global = true, env = "CDP_TLS_CERT", value_name = "FILE", value_hint = ValueHint::FilePath, requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// https: key of this client's certificate (PEM)
    #[arg(long, global = true, env = "CDP_TLS_KEY", value_name = "FILE", value_hint = ValueHint::FilePath, requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
}

/// How answers are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Aligned columns; times in RFC 3339, sizes in KiB, MiB...
    Table,
    /// One JSON document; times are nanoseconds, sizes bytes
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// CDP disks: where history is kept
    #[command(subcommand, arg_required_else_help = true)]
    Disk(Disk),
    /// Volumes: what is protected
    #[command(subcommand, arg_required_else_help = true)]
    Volume(Volume),
    /// Set how much history volumes keep
    #[command(after_help = "Examples:\n  \
        cdpctl edit vm1-root --reserve-capacity 30GiB --reserve-duration 24h --priority mid\n  \
        cdpctl edit vm1-root vm1-data --reserve-duration 7d\n\n\
        What is not given keeps its value. A volume that has no CDP settings gets them, in state off.")]
    Edit(Edit),
    /// Start keeping history
    #[command(after_help = "Examples:\n  cdpctl enable vm1-root\n  cdpctl enable vm1-root vm1-data\n\n\
        A volume that has no CDP settings gets the configured defaults.")]
    Enable(Volumes),
    /// Stop keeping history; what was kept stays until it ages out
    #[command(after_help = "Examples:\n  cdpctl disable vm1-root")]
    Disable(Volumes),
    /// List volumes with their settings and health
    #[command(after_help = "Examples:\n  cdpctl list\n  cdpctl list --filter vm1\n  cdpctl --output json list")]
    List(List),
    /// Show a volume's logs, markers and the intervals that can be viewed
    #[command(
        after_help = "Examples:\n  cdpctl info vm1-root\n  cdpctl info vm1-root --all\n  cdpctl info vm1-root --at '5m ago'\n  cdpctl --output json info vm1-root"
    )]
    Info(Info),
    /// Name the present instant, the same one for all volumes given
    #[command(
        after_help = "Examples:\n  cdpctl mark vm1-root --name before-upgrade\n  cdpctl mark db-data db-log --name nightly --kind application\n  \
        cdpctl mark vm1 --name nightly --quiesce qga:/var/lib/libvirt/qemu/channel/target/vm1.qga\n\n\
        With --quiesce the guest's file systems are frozen by its QEMU guest agent for as long as it takes to look at the clock, and thawed \
        in any case. When that fails nothing is marked."
    )]
    Mark(Mark),
    /// Groups: several volumes under one name
    #[command(subcommand, arg_required_else_help = true)]
    Group(Group),
    /// Views: volumes as they were at an instant
    #[command(subcommand, arg_required_else_help = true)]
    View(View),
    /// Take volumes back to an instant
    #[command(after_help = "Examples:\n  \
        cdpctl revert vm1-root --at '5m ago' --dry-run\n  \
        cdpctl revert vm1-root --at before-upgrade --wait\n  \
        cdpctl revert db-data db-log --at 2026-11-21T04:38:00Z --force\n  \
        cdpctl revert vm1-root --undo\n\n\
        Reads give the old state as soon as this returns; the copying goes on behind. A revert is history too: the answer has the \
        instant that undoes it. Several volumes go back together or not at all. After --force the export refuses clients until \
        `cdpctl release` (or --release), so that a guest with stale caches cannot write over the reverted state.")]
    Revert(Revert),
    /// Let clients connect again after a forced revert
    #[command(after_help = "Examples:\n  cdpctl release vm1-root")]
    Release(Volumes),
    /// Remove a volume's history and its settings, or exactly one log
    #[command(after_help = "Examples:\n  cdpctl clean vm1-root\n  cdpctl clean vm1-root --seq 17")]
    Clean(Clean),
    /// Show state changes
    #[command(
        after_help = "Examples:\n  cdpctl events\n  cdpctl events vm1-root --last 20\n  cdpctl --output json events --follow\n\n\
        With --follow, JSON is one document per line."
    )]
    Events(Events),
    /// Draw a volume's history: writes, flushes, coverage, logs, markers, reverts
    #[command(after_help = "Examples:\n  cdpctl timeline vm1-root\n  cdpctl timeline vm1-root --from '1h ago'\n  \
        cdpctl timeline vm1-root --from before-upgrade --to now --buckets 60\n  \
        cdpctl timeline vm1-root --around before-upgrade --span 2m --svg upgrade.svg")]
    Timeline(Timeline),
    /// Find the write that broke it, with a command that tells good from bad
    #[command(after_help = "Examples:\n  \
        cdpctl bisect vm1-root --from '1h ago' --to now -- ./check.sh\n  \
        cdpctl bisect vm1-root --from '1h ago' --to now --mount -- sh -c 'test -e \"$CDP_VIEW_MOUNT/etc/passwd\"'\n  \
        cdpctl bisect vm1-root --from good --to bad -- qemu-io -r -f raw -c 'read -P 0 0 512' nbd+unix:///x\n\n\
        The command is run on views between the two instants, at most log2 of the writes + 2 times. It ends with 0 where the volume is good, \
        with 1 to 124 where it is bad, with 125 or more where it cannot tell, which stops the search; the same command line goes on from there. \
        It finds the view by CDP_VIEW_NBD_URI, CDP_VIEW_FILE (where the agent serves files), CDP_VIEW_MOUNT (with --mount), CDP_VIEW_ID, CDP_VIEW_TIME and \
        CDP_VIEW_VOLUME in its environment.")]
    Bisect(Bisect),
    /// Copy an instant to a file, or only what changed up to it
    #[command(after_help = "Examples:\n  \
        cdpctl export vm1-root --at '1h ago' vm1.img\n  \
        cdpctl export vm1-root --at nightly-2 --since nightly-1 --format qcow2 --backing vm1.img vm1-2.qcow2\n\n\
        A raw file with --since is as long as the volume and has only what changed; FILE.blocks lists which bytes of it count. An export that \
        was interrupted goes on when it is asked for once more with the same words.")]
    Export(Export),
    /// Show the agent's version, clock, endpoints and totals
    #[command(
        after_help = "Examples:\n  cdpctl status\n  cdpctl --agent https://host7:7070 --tls-ca ca.pem --tls-cert me.pem --tls-key me.key status"
    )]
    Status,
    /// Write the manual pages
    #[command(hide = true, after_help = "Examples:\n  cdpctl man /usr/local/share/man/man1")]
    Man {
        /// Directory, made where there is none
        #[arg(value_hint = ValueHint::DirPath)]
        directory: PathBuf,
    },
    /// Print the completion script of a shell
    #[command(
        after_help = "Examples:\n  cdpctl completion bash > /etc/bash_completion.d/cdpctl\n  cdpctl completion zsh > ~/.zfunc/_cdpctl"
    )]
    Completion {
        /// Which shell
        shell: Shell,
    },
}

#[derive(Debug, Subcommand)]
pub enum Disk {
    /// Make a CDP disk of a block device or file, and take it into use
    #[command(
        after_help = "Examples:\n  cdpctl disk init /dev/nvme1n1\n  cdpctl disk init /var/lib/cdp/cdp.img --size 200GiB\n\n\
        A disk that is in use is refused. One that holds a journal, a file system or a partition table wants --force,\n\
        and so does one with anything but zeroes in its first or last MiB."
    )]
    Init(DiskInit),
    /// List the CDP disks
    #[command(after_help = "Examples:\n  cdpctl disk list")]
    List,
    /// Read a CDP disk without an agent, and verify every checksum on it
    #[command(
        after_help = "Examples:\n  cdpctl disk check /dev/nvme1n1\n  cdpctl --output json disk check /var/lib/cdp/cdp.img\n\n\
        It reads only. The agent that uses the disk must be stopped: what is being written at that moment looks like damage.\n\
        Exit code 10 says that something is damaged."
    )]
    Check {
        /// Block device or file
        #[arg(value_hint = ValueHint::FilePath)]
        path: PathBuf,
    },
}

#[derive(Debug, Args)]
pub struct DiskInit {
    /// Block device or file
    #[arg(value_hint = ValueHint::FilePath)]
    pub path: PathBuf,
    /// Bytes; a file that is not there is created with that size [default: the size it has]
    #[arg(long, value_parser = parse::size)]
    pub size: Option<u64>,
    /// Bytes of a segment: a power of two, 1MiB to 256MiB [default: chosen by the disk's size]
    #[arg(long, value_parser = segment_size)]
    pub segment_size: Option<u64>,
    /// Overwrite what is there
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Subcommand)]
pub enum Volume {
    /// Serve a block device or file as a volume
    #[command(
        after_help = "Examples:\n  cdpctl volume add vm1-root --path /dev/vg0/vm1-root\n  cdpctl volume add scratch --path /srv/scratch.img --size 20GiB --create"
    )]
    Add(VolumeAdd),
    /// List volumes with their paths and where they are served
    #[command(after_help = "Examples:\n  cdpctl volume list\n  cdpctl volume list --filter vm1")]
    List(List),
    /// Stop serving a volume; its data stays on its device
    #[command(
        after_help = "Examples:\n  cdpctl volume remove vm1-root\n  cdpctl volume remove vm1-root --force --clean"
    )]
    Remove(VolumeRemove),
    /// Offer the grown device to the guest
    #[command(after_help = "Examples:\n  cdpctl volume resize vm1-root\n  cdpctl volume resize vm1-root --size 60GiB")]
    Resize(VolumeResize),
    /// Print the libvirt <disk> element and the qemu arguments of a volume
    #[command(
        after_help = "Examples:\n  cdpctl volume xml vm1-root\n  cdpctl volume xml vm1-root --target vdb > disk.xml\n  cdpctl volume xml vm1-root --only libvirt > disk.xml"
    )]
    Xml(VolumeXml),
    /// Take over a history that this host does not know, or no longer knows, to be the volume's
    #[command(
        after_help = "Examples:\n  cdpctl volume add vm1-root --path /dev/vg0/vm1-root --uuid 0d9a…\n  cdpctl volume attach vm1-root\n\n\
        For a volume that was added with the uuid that it had, after its CDP disk was moved here or the agent's state\n\
        directory was lost; or for one in state primary_changed whose primary is the same, and only known by another name (a restored\n\
        or moved file, a device that says something else of itself since an upgrade). Nothing acked is lost. You vouch that the\n\
        primary is the one that the history belongs to, with what the agent left on it, and that no other host serves it."
    )]
    Attach(VolumeAttach),
    /// Go on with the primary as it is, where the agent refuses to decide
    #[command(after_help = "Examples:\n  cdpctl volume override vm1-root --accept needs_journal\n\n\
        The state must be named, and be the one that the volume is in:\n  \
        needs_journal      the CDP disk is missing: its newest acked writes are LOST\n  \
        primary_changed    somebody wrote past the agent: the old history is lost\n  \
        revert_incomplete  the CDP disk was lost during a revert: blocks not yet copied show the bytes from before the revert")]
    Override(VolumeOverride),
}

#[derive(Debug, Args)]
pub struct VolumeAdd {
    /// Name
    #[arg(value_parser = volume_name)]
    pub name: String,
    /// Its device or file (the primary)
    #[arg(long, value_hint = ValueHint::FilePath)]
    pub path: PathBuf,
    /// Its uuid [default: a new one]
    #[arg(long)]
    pub uuid: Option<String>,
    /// Bytes that the guest sees [default: all of the primary]
    #[arg(long, value_parser = parse::size)]
    pub size: Option<u64>,
    /// Create the file, sparse, where there is none
    #[arg(long, requires = "size")]
    pub create: bool,
}

#[derive(Debug, Args)]
pub struct VolumeRemove {
    /// Volume, by uuid or name
    pub volume: String,
    /// Disconnect clients and close views
    #[arg(long)]
    pub force: bool,
    /// Remove its history and settings too
    #[arg(long)]
    pub clean: bool,
}

#[derive(Debug, Args)]
pub struct VolumeResize {
    /// Volume, by uuid or name
    pub volume: String,
    /// Bytes that the guest is to see [default: all of the primary]
    #[arg(long, value_parser = parse::size)]
    pub size: Option<u64>,
}

#[derive(Debug, Args)]
pub struct VolumeXml {
    /// Volume, by uuid or name
    pub volume: String,
    /// Name of the device in the guest
    #[arg(long, default_value = "vda", value_parser = device_name)]
    pub target: String,
    /// Print only one form
    #[arg(long, value_enum)]
    pub only: Option<XmlForm>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum XmlForm {
    /// The <disk> element
    Libvirt,
    /// -blockdev and -device
    Blockdev,
    /// -drive
    Drive,
}

#[derive(Debug, Args)]
pub struct VolumeAttach {
    /// Volume, by uuid or name
    pub volume: String,
}

#[derive(Debug, Args)]
pub struct VolumeOverride {
    /// Volume, by uuid or name
    pub volume: String,
    /// The state to leave
    #[arg(long, value_enum)]
    pub accept: Override,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Override {
    NeedsJournal,
    PrimaryChanged,
    RevertIncomplete,
}

#[derive(Debug, Args)]
pub struct Volumes {
    /// Volumes, by uuid or name
    #[arg(required = true, value_name = "VOLUME")]
    pub volumes: Vec<String>,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("what").required(true).multiple(true).args(["reserve_capacity", "reserve_duration", "priority"]))]
pub struct Edit {
    /// Volumes, by uuid or name
    #[arg(required = true, value_name = "VOLUME")]
    pub volumes: Vec<String>,
    /// Bytes of CDP disk that each volume may occupy
    #[arg(long, value_name = "SIZE", value_parser = parse::size)]
    pub reserve_capacity: Option<u64>,
    /// How much history to keep
    #[arg(long, value_name = "DURATION", value_parser = reserve_duration)]
    pub reserve_duration: Option<u64>,
    /// Order at recovery, weight on a shared CDP disk
    #[arg(long, value_enum)]
    pub priority: Option<Priority>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Priority {
    Low,
    Mid,
    High,
}

#[derive(Debug, Args)]
pub struct List {
    /// Only volumes whose name contains this
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub filter: String,
}

#[derive(Debug, Args)]
pub struct Info {
    /// Volume, by uuid or name
    pub volume: String,
    /// Thin logs and those of disabled spans too, and all markers
    #[arg(long)]
    pub all: bool,
    /// Tell what lies next to this instant: markers, and flush-clean instants on each side
    #[arg(long, value_name = "WHEN", value_parser = when)]
    pub at: Option<When>,
}

#[derive(Debug, Args)]
pub struct Mark {
    /// Volumes, by uuid or name
    #[arg(required = true, value_name = "VOLUME")]
    pub volumes: Vec<String>,
    /// Name of the marker [default: CDP-auto-<unix seconds>]
    #[arg(long, value_parser = marker_name)]
    pub name: Option<String>,
    /// What you know of the guest's state
    #[arg(long, value_enum, default_value_t = Kind::Crash, conflicts_with = "quiesce")]
    pub kind: Kind,
    /// Freeze this guest's file systems meanwhile; may be given several times
    #[arg(long, value_name = "qga:SOCKET", value_parser = guest)]
    pub quiesce: Vec<String>,
    /// Longest time that they stay frozen, 100ms to 60s
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = frozen_ms, requires = "quiesce")]
    pub quiesce_max: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// As after pulling the plug
    Crash,
    /// The guest is quiesced
    Application,
}

#[derive(Debug, Subcommand)]
pub enum Group {
    /// Name several volumes as one
    #[command(after_help = "Examples:\n  cdpctl group add vm1 vm1-root vm1-data\n\n\
        mark, view open, revert and every other command on several volumes take the group's name then.")]
    Add {
        /// Name of the group
        #[arg(value_parser = volume_name)]
        name: String,
        /// Volumes, by uuid or name
        #[arg(required = true, value_name = "VOLUME")]
        volumes: Vec<String>,
    },
    /// List the groups
    #[command(after_help = "Examples:\n  cdpctl group list")]
    List,
    /// Forget a group; its volumes stay as they are
    #[command(after_help = "Examples:\n  cdpctl group remove vm1")]
    Remove {
        /// Name of the group
        name: String,
    },
}

#[derive(Debug, Subcommand)]
pub enum View {
    /// Open a volume as it was; prints where to read it
    #[command(
        after_help = "Examples:\n  cdpctl view open vm1-root --at '5m ago'\n  cdpctl view open vm1-root --at before-upgrade --writable\n  \
        cdpctl view open vm1-root --at '2h ago' --mount /mnt/old --ttl 8h\n  \
        cdpctl view open vm1-root --at now --writable --mount /mnt/try --partition 2\n  \
        nbdcopy \"$(cdpctl --output json view open vm1-root --at now | jq -r .nbd_uri)\" copy.img\n\n\
        Opening the same instant again answers the same view. --mount wants root on the agent's host. Without --writable the file \
        system is mounted as a crash would have left it, nothing is replayed; with it, it brings itself in order on scratch."
    )]
    Open(ViewOpen),
    /// List open views
    #[command(after_help = "Examples:\n  cdpctl view list\n  cdpctl view list vm1-root")]
    List {
        /// Only views of this volume, by uuid or name
        volume: Option<String>,
    },
    /// Close a view: it is unmounted, its loop device goes, clients that have it open are disconnected
    #[command(after_help = "Examples:\n  cdpctl view close 7c1f0a52-5d0e-4a53-9d0c-0f0f5c3f4d11")]
    Close {
        /// Id of the view
        id: String,
        /// Also when programs use its mount; they get errors
        #[arg(long)]
        force: bool,
    },
    /// List a directory of a file system in a volume as it was
    #[command(after_help = "Examples:\n  cdpctl view ls vm1-root --at '1h ago' /etc\n  \
        cdpctl view ls vm1-disk --at before-upgrade --partition 2 /home\n\n\
        Opens a view of its own, mounts it, and takes both away again. Wants root on the agent's host.")]
    Ls(ViewLs),
    /// Copy a file or directory out of a file system in a volume as it was
    #[command(after_help = "Examples:\n  cdpctl view cp vm1-root --at '1h ago' /etc/fstab fstab.old\n  \
        cdpctl view cp vm1-root --at before-upgrade /home/anna /srv/restored\n\n\
        Owners, permissions, times, links and holes are kept, as by `cp -a`. Wants root on the agent's host.")]
    Cp(ViewCp),
}

/// Which file system of which instant.
#[derive(Debug, Args)]
pub struct ViewFiles {
    /// Volume, by uuid or name
    pub volume: String,
    /// The instant
    #[arg(long, value_name = "WHEN", value_parser = when)]
    pub at: When,
    /// Number of the partition, 0 for the whole disk; not needed where there is one file system only
    #[arg(long, value_name = "N")]
    pub partition: Option<u32>,
}

#[derive(Debug, Args)]
pub struct ViewLs {
    #[command(flatten)]
    pub files: ViewFiles,
    /// Directory or file inside of the file system
    #[arg(default_value = "/")]
    pub path: PathBuf,
}

#[derive(Debug, Args)]
pub struct ViewCp {
    #[command(flatten)]
    pub files: ViewFiles,
    /// Directory or file inside of the file system
    pub path: PathBuf,
    /// Where to: a new name, or a directory that is there
    pub dest: PathBuf,
}

#[derive(Debug, Args)]
pub struct ViewOpen {
    /// Volumes or groups, by uuid or name; several are opened at one instant, all or none
    #[arg(required = true, value_name = "VOLUME")]
    pub volumes: Vec<String>,
    /// The instant
    #[arg(long, value_name = "WHEN", value_parser = when)]
    pub at: When,
    /// Take writes, onto a scratch overlay that vanishes with the view
    #[arg(long)]
    pub writable: bool,
    /// Mount its file system at this directory, through a loop device; `view close` undoes it
    #[arg(long, value_name = "DIR")]
    pub mount: Option<PathBuf>,
    /// With --mount: number of the partition, 0 for the whole disk; not needed where there is one file system only
    #[arg(long, value_name = "N", requires = "mount")]
    pub partition: Option<u32>,
    /// Close it by itself after so long
    #[arg(long, value_name = "DURATION", value_parser = ttl)]
    pub ttl: Option<u64>,
    /// Whose it is, in words; without it, your user's name
    #[arg(long, value_name = "WORDS")]
    pub owner: Option<String>,
}

#[derive(Debug, Args)]
pub struct Revert {
    /// Volumes or groups, by uuid or name
    #[arg(required = true, value_name = "VOLUME")]
    pub volumes: Vec<String>,
    /// The instant
    #[arg(long, value_name = "WHEN", value_parser = when, required_unless_present = "undo")]
    pub at: Option<When>,
    /// Undo the newest revert: back to just before it
    #[arg(long, conflicts_with = "at")]
    pub undo: bool,
    /// Change nothing; say how many blocks and bytes would change
    #[arg(long, conflicts_with = "wait")]
    pub dry_run: bool,
    /// Disconnect clients that write, and refuse new ones until `release`
    #[arg(long)]
    pub force: bool,
    /// Let clients connect again at once
    #[arg(long)]
    pub release: bool,
    /// Return when the copying is done, with a progress bar
    #[arg(long)]
    pub wait: bool,
}

#[derive(Debug, Args)]
pub struct Clean {
    /// Volume, by uuid or name
    pub volume: String,
    /// Only the log of this number [default: all history, and the settings]
    #[arg(long, value_name = "N")]
    pub seq: Option<u64>,
}

#[derive(Debug, Args)]
pub struct Events {
    /// Only events about these volumes, by uuid or name
    #[arg(value_name = "VOLUME")]
    pub volumes: Vec<String>,
    /// Go on with events as they happen
    #[arg(long, short)]
    pub follow: bool,
    /// Begin with at most this many recent events [default: 100; with --follow 10]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1024))]
    pub last: Option<u32>,
}

#[derive(Debug, Args)]
pub struct Timeline {
    /// Volume, by uuid or name
    pub volume: String,
    /// An instant to look at: the picture is centred on it, and what lies next to it is told
    #[arg(long, value_name = "WHEN", value_parser = when, conflicts_with_all = ["from", "to"])]
    pub around: Option<When>,
    /// How much to show around it
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = parse::duration_ns, requires = "around")]
    pub span: u64,
    /// Write the picture to this file too, as SVG
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub svg: Option<PathBuf>,
    /// First instant [default: start of the history]
    #[arg(long, value_name = "WHEN", value_parser = when)]
    pub from: Option<When>,
    /// Last instant [default: now]
    #[arg(long, value_name = "WHEN", value_parser = when)]
    pub to: Option<When>,
    /// Pieces to cut the span into [default: as wide as the terminal; JSON: 100]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10000))]
    pub buckets: Option<u32>,
}

#[derive(Debug, Args)]
pub struct Bisect {
    /// Volume, by uuid or name
    pub volume: String,
    /// An instant at which it was good
    #[arg(long, value_name = "WHEN", value_parser = when)]
    pub from: When,
    /// A later instant at which it was bad
    #[arg(long, value_name = "WHEN", value_parser = when, default_value = "now")]
    pub to: When,
    /// Where the search is remembered [default: cdpctl/bisect-UUID.json in $XDG_STATE_HOME or ~/.local/state]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub state: Option<PathBuf>,
    /// Where runs and the command's output are logged [default: beside the state, .log]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub log: Option<PathBuf>,
    /// Mount each view for the command, which finds it by CDP_VIEW_MOUNT (as root, on the agent's host)
    #[arg(long)]
    pub mount: bool,
    /// With --mount: number of the partition, 0 for the whole disk; not needed where there is one file system only
    #[arg(long, value_name = "N", requires = "mount")]
    pub partition: Option<u32>,
    /// Forget a search that was interrupted
    #[arg(long)]
    pub restart: bool,
    /// The command, with its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Export {
    /// Volume, by uuid or name
    pub volume: String,
    /// The instant
    #[arg(long, value_name = "WHEN", value_parser = when)]
    pub at: When,
    /// The file to write
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub target: PathBuf,
    /// Only what changed since this instant
    #[arg(long, value_name = "WHEN", value_parser = when)]
    pub since: Option<When>,
    /// What the file is to be
    #[arg(long, value_enum, default_value_t = ExportFormat::Raw)]
    pub format: ExportFormat,
    /// qcow2: a raw file with the state at --since, as the new file is to name it
    #[arg(long, value_name = "FILE", requires = "since", value_parser = backing)]
    pub backing: Option<String>,
    /// Forget an export to this file that was interrupted, and what it has written; any other file stays
    #[arg(long)]
    pub restart: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ExportFormat {
    /// The bytes of the volume, with holes
    Raw,
    /// Of QEMU, version 3
    Qcow2,
}

impl ExportFormat {
    /// As it is given.
    pub fn word(self) -> &'static str {
        match self {
            ExportFormat::Raw => "raw",
            ExportFormat::Qcow2 => "qcow2",
        }
    }
}

fn backing(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > crate::qcow2::BACKING_MAX {
        return Err(format!("backing file {text:?} is not valid: 1 to {} bytes", crate::qcow2::BACKING_MAX));
    }
    Ok(text.to_owned())
}

fn guest(text: &str) -> Result<String, String> {
    match text.strip_prefix("qga:") {
        Some(path) if path.starts_with('/') => Ok(text.to_owned()),
        _ => Err(format!("guest {text:?} is not valid: must be qga: and the absolute path of its agent's socket")),
    }
}

fn frozen_ms(text: &str) -> Result<u32, String> {
    let ns = parse::duration_ns(text).map_err(|error| error.to_string())?;
    u32::try_from(ns / 1_000_000)
        .ok()
        .filter(|ms| (100..=60_000).contains(ms))
        .ok_or_else(|| format!("{text:?} is not valid: must be from 100ms to 60s"))
}

fn endpoint(text: &str) -> Result<Endpoint, InputError> {
    text.parse()
}

fn volume_name(text: &str) -> Result<String, InputError> {
    parse::volume_name(text).map(str::to_owned)
}

fn marker_name(text: &str) -> Result<String, InputError> {
    parse::marker_name(text).map(str::to_owned)
}

/// The interface says "none given" with 0, so the epoch itself cannot be asked for.
fn when(text: &str) -> Result<When, String> {
    match text.parse::<When>() {
        Ok(When::FlushBefore(other)) if *other == When::At(0) => Err("instant 0 is not valid".into()),
        Ok(When::At(0)) => Err("instant 0 is not valid: must be at least 1 nanosecond after the epoch".into()),
        Ok(when) => Ok(when),
        Err(error) => Err(error.to_string()),
    }
}

fn ttl(text: &str) -> Result<u64, String> {
    const TTL_S_MAX: u64 = 10 * 365 * 86400;
    match parse::duration_s(text).map_err(|error| error.to_string())? {
        seconds @ 1..=TTL_S_MAX => Ok(seconds),
        _ => Err(format!("ttl {text:?} is not valid: must be from 1s to {TTL_S_MAX}s")),
    }
}

fn reserve_duration(text: &str) -> Result<u64, String> {
    match parse::duration_s(text).map_err(|error| error.to_string())? {
        seconds @ 1..=parse::RESERVE_DURATION_S_MAX => Ok(seconds),
        _ => Err(format!(
            "reserve_duration {text:?} is not valid: must be from 1s to {}s",
            parse::RESERVE_DURATION_S_MAX
        )),
    }
}

fn segment_size(text: &str) -> Result<u64, String> {
    let bytes = parse::size_between(text, 1 << 20, 256 << 20).map_err(|error| error.to_string())?;
    if bytes.is_power_of_two() {
        Ok(bytes)
    } else {
        Err(format!("segment size {text:?} is not valid: must be a power of two"))
    }
}

fn device_name(text: &str) -> Result<String, String> {
    let letters = |rest: &str| !rest.is_empty() && rest.len() <= 4 && rest.bytes().all(|b| b.is_ascii_lowercase());
    let known = ["vd", "sd", "hd", "xvd"].iter().any(|prefix| text.strip_prefix(prefix).is_some_and(letters));
    if known {
        Ok(text.to_owned())
    } else {
        Err(format!("target {text:?} is not valid: must be like vda, sda, hda or xvda"))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound_and_every_command_has_examples() {
        fn walk(command: &clap::Command, path: &str) {
            let path = format!("{path} {}", command.get_name());
            assert!(command.get_about().is_some(), "{path} says what it does");
            if !command.has_subcommands() {
                let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
                assert!(help.contains("Examples:\n ") && help.contains(path.trim()), "{path} has examples: {help}");
            }
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{path} {argument} says what it is");
            }
            command.get_subcommands().for_each(|command| walk(command, &path));
        }
        Cli::command().debug_assert();
        walk(&Cli::command(), "");
    }

    #[test]
    fn global_options_go_before_and_after_the_command() {
        for line in ["cdpctl --output json --agent unix:/a info demo", "cdpctl info demo --output json --agent unix:/a"]
        {
            let cli = Cli::try_parse_from(line.split(' ')).expect(line);
            assert_eq!((cli.global.output, cli.global.agent), (Format::Json, Endpoint::Unix("/a".into())));
        }
    }

    #[test]
    fn examples_in_the_help_are_valid() {
        fn walk(command: &clap::Command, lines: &mut Vec<String>) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            lines.extend(help.lines().filter_map(|line| Some(line.strip_prefix("  cdpctl ")?.to_owned())));
            command.get_subcommands().for_each(|command| walk(command, lines));
        }
        let mut lines = Vec::new();
        walk(&Cli::command(), &mut lines);
        assert!(lines.len() > 40, "{} examples", lines.len());
        for line in lines {
            // As a shell would cut it: quotes around what has spaces, nothing after a redirection.
            let words = line.split(" > ").next().unwrap_or(&line).split('\'').enumerate();
            let words = words.flat_map(|(at, piece)| match at % 2 {
                0 => piece.split_whitespace().map(str::to_owned).collect::<Vec<_>>(),
                _ => vec![piece.to_owned()],
            });
            let parsed = Cli::try_parse_from(std::iter::once("cdpctl".to_owned()).chain(words));
            assert!(parsed.is_ok(), "{line}: {}", parsed.err().map(|error| error.to_string()).unwrap_or_default());
        }
    }
}
