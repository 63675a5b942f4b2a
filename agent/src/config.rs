//! The configuration file: what can be set, its defaults and bounds, and errors that name file, line, key, value and bound.
//!
//! Every value is checked here, once; the rest of the agent takes a [`Config`] as it is. An unknown key is refused, and the
//! nearest known one is named: a setting that is silently ignored is worse than an agent that does not start.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::path::{Path, PathBuf};

use cdp_journal::EngineConfig;
use cdp_journal::info::{Priority, Settings};
use cdp_proto::parse;
use toml::Spanned;
use toml::de::{DeTable, DeValue};
use uuid::Uuid;

/// Where the configuration is looked for.
pub const CONFIG_PATH: &str = "/etc/cdp-agent/config.toml";

/// Most shards.
pub const SHARDS_MAX: u64 = 64;

/// Everything that can be configured.
#[derive(Clone, Debug)]
pub struct Config {
    /// Directory of the agent's own state.
    pub state_dir: PathBuf,
    /// Threads that move data; CDP disks, and the volumes on them, are spread over these.
    pub shards: usize,
    /// Lock memory, so that the agent never waits for a page that only it can write back.
    pub lock_memory: bool,
    /// Where gRPC is served.
    pub grpc: Listen,
    /// Where NBD is served.
    pub nbd: Listen,
    /// Most NBD connections at a time.
    pub nbd_connections_max: usize,
    /// Where volumes and views are local files.
    pub fuse: Fuse,
    /// How views become block devices when they are mounted.
    pub attach: Attach,
    /// Most open views, of all volumes together.
    pub views_max: usize,
    /// Most scratch that open writable views, of all volumes together, may take.
    pub views_scratch_bytes_max: u64,
    /// Where metrics are served; `None`: not at all.
    pub metrics: Option<SocketAddr>,
    /// CDP disks to open.
    pub disks: Vec<PathBuf>,
    /// Volumes that are part of the configuration.
    pub volumes: Vec<VolumeConfig>,
    /// Groups of volumes.
    pub groups: Vec<GroupConfig>,
    /// Bounds and defaults of the engine.
    pub engine: EngineConfig,
    /// What is logged, in the form of `tracing`'s filters: `info`, `info,cdp_journal=debug`.
    pub log_filter: String,
    /// How it is logged.
    pub log_format: LogFormat,
}

/// Where one of the two services listens.
#[derive(Clone, Debug, Default)]
pub struct Listen {
    /// The unix socket, unless switched off.
    pub unix: Option<UnixListen>,
    /// TCP, when configured.
    pub tcp: Option<TcpListen>,
}

/// Whether and where volumes and views are local files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fuse {
    /// Not at all.
    Off,
    /// Beside the gRPC socket.
    BesideSocket,
    /// In this directory.
    Dir(PathBuf),
}

/// How a view becomes a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attach {
    /// A loop device on its local file.
    Loop,
    /// The kernel's NBD client on the agent's NBD socket, or else a loop device.
    Nbd,
}

/// A unix socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnixListen {
    /// Its path.
    pub path: PathBuf,
    /// Its permissions.
    pub mode: u32,
    /// Its group; `None`: that of the process.
    pub group: Option<String>,
}

/// A TCP listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpListen {
    /// Address and port.
    pub address: SocketAddr,
    /// TLS with client certificates; `None` only where `insecure = true` says so.
    pub tls: Option<TlsFiles>,
}

/// The PEM files of a TLS listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate chain.
    pub cert: PathBuf,
    /// The server's key.
    pub key: PathBuf,
    /// The authority that signs clients' certificates.
    pub client_ca: PathBuf,
}

/// A volume that is part of the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeConfig {
    /// Its name.
    pub name: String,
    /// Path of the primary.
    pub path: PathBuf,
    /// Its uuid; `None`: the agent makes one and remembers it.
    pub uuid: Option<Uuid>,
    /// Bytes that the guest sees; 0: all of the primary.
    pub size: u64,
}

/// A group that is part of the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupConfig {
    /// Its name.
    pub name: String,
    /// Names or uuids of its volumes; each may be one that is added later.
    pub volumes: Vec<String>,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/cdp-agent".into(),
            shards: 1,
            lock_memory: true,
            grpc: Listen { unix: Some(UnixListen::at("/run/cdp-agent/agent.sock")), tcp: None },
            nbd: Listen { unix: Some(UnixListen::at("/run/cdp-agent/nbd.sock")), tcp: None },
            nbd_connections_max: 1024,
            fuse: Fuse::BesideSocket,
            attach: Attach::Loop,
            views_max: 256,
            views_scratch_bytes_max: 8 << 30,
            metrics: Some(SocketAddr::from(([127, 0, 0, 1], 9187))),
            disks: Vec::new(),
            volumes: Vec::new(),
            groups: Vec::new(),
            engine: EngineConfig::default(),
            log_filter: "info".to_owned(),
            log_format: LogFormat::Text,
        }
    }
}

impl UnixListen {
    /// A socket for the process's own user and group.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), mode: 0o660, group: None }
    }
}

/// What is wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The file.
    pub file: String,
    /// The line, from 1; 0: the file as a whole.
    pub line: usize,
    /// What is wrong: key, value and bound.
    pub message: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.file, self.message),
            line => write!(f, "{}:{line}: {}", self.file, self.message),
        }
    }
}

impl std::error::Error for ConfigError {}

impl Config {
    /// The directory below which volumes and views are files; `None`: they are not.
    pub fn fuse_dir(&self) -> Option<PathBuf> {
        match &self.fuse {
            Fuse::Off => None,
            Fuse::BesideSocket => self.grpc.unix.as_ref()?.path.parent().map(Path::to_owned),
            Fuse::Dir(dir) => Some(dir.clone()),
        }
    }

    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let file = path.display().to_string();
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&file, &text),
            Err(error) => Err(ConfigError { file, line: 0, message: format!("read the configuration: {error}") }),
        }
    }

    /// Checks a configuration's text; `file` is for messages.
    pub fn parse(file: &str, text: &str) -> Result<Self, ConfigError> {
        let source = Source { file, text };
        let document = DeTable::parse(text).map_err(|error| {
            let line = error.span().map_or(0, |span| source.line(span.start));
            ConfigError { file: file.to_owned(), line, message: error.message().trim().replace('\n', ", ") }
        })?;
        let mut root = Section { source: &source, place: String::new(), table: document.get_ref(), asked: Vec::new() };
        let mut config = Config::default();
        read_root(&mut root, &mut config)?;
        root.finish()?;
        check_paths(&source, document.get_ref(), &config)?;
        Ok(config)
    }
}

fn read_root(root: &mut Section<'_>, config: &mut Config) -> Result<(), ConfigError> {
    if let Some(path) = root.path("state_dir")? {
        config.state_dir = path;
    }
    if let Some(shards) = root.integer("shards", 1, SHARDS_MAX)? {
        config.shards = usize::try_from(shards).expect("at most 64");
    }
    if let Some(lock) = root.boolean("lock_memory")? {
        config.lock_memory = lock;
    }
    if let Some(mut section) = root.section("grpc")? {
        read_listen(&mut section, &mut config.grpc)?;
        section.finish()?;
    }
    if let Some(mut section) = root.section("nbd")? {
        read_listen(&mut section, &mut config.nbd)?;
        if let Some(max) = section.integer("connections_max", 1, 65536)? {
            config.nbd_connections_max = usize::try_from(max).expect("at most 65536");
        }
        section.finish()?;
    }
    if let Some(mut section) = root.section("fuse")? {
        if let Some(value) = section.string("dir")? {
            config.fuse = match value.text.as_str() {
                "off" => Fuse::Off,
                _ => section.path("dir")?.map_or(Fuse::BesideSocket, Fuse::Dir),
            };
        }
        section.finish()?;
    }
    if let Some(mut section) = root.section("views")? {
        if let Some(value) = section.string("attach")? {
            config.attach = match value.text.as_str() {
                "loop" => Attach::Loop,
                "nbd" if config.nbd.unix.is_none() => {
                    return Err(section.refuse("attach", &value, "\"loop\": [nbd] has no unix socket"));
                }
                "nbd" => Attach::Nbd,
                _ => return Err(section.refuse("attach", &value, "\"loop\" or \"nbd\"")),
            };
        }
        if let Some(max) = section.integer("max", 1, 65536)? {
            config.views_max = usize::try_from(max).expect("at most 65536");
        }
        if let Some(bytes) = section.size("scratch_total", 1 << 20, 1 << 50)? {
            config.views_scratch_bytes_max = bytes;
        }
        section.finish()?;
    }
    if let Some(mut section) = root.section("metrics")? {
        config.metrics = match section.string("listen")? {
            None => config.metrics,
            Some(value) if value.text == "off" => None,
            Some(value) => Some(section.address("listen", &value)?),
        };
        section.finish()?;
    }
    if let Some(mut section) = root.section("log")? {
        if let Some(value) = section.string("level")? {
            if value.text.parse::<tracing_subscriber::EnvFilter>().is_err() {
                return Err(section.refuse(
                    "level",
                    &value,
                    "error, warn, info, debug or trace, or a list such as info,cdp_journal=debug",
                ));
            }
            config.log_filter = value.text;
        }
        if let Some(value) = section.string("format")? {
            config.log_format = match value.text.as_str() {
                "text" => LogFormat::Text,
                "json" => LogFormat::Json,
                _ => return Err(section.refuse("format", &value, "text or json")),
            };
        }
        section.finish()?;
    }
    if let Some(mut section) = root.section("engine")? {
        read_engine(&mut section, &mut config.engine)?;
        section.finish()?;
    }
    for mut section in root.sections("disk")? {
        config.disks.push(section.required_path("path")?);
        section.finish()?;
    }
    for mut section in root.sections("volume")? {
        config.volumes.push(read_volume(&mut section)?);
        section.finish()?;
    }
    for mut section in root.sections("group")? {
        config.groups.push(read_group(&mut section)?);
        section.finish()?;
    }
    Ok(())
}

fn read_listen(section: &mut Section<'_>, listen: &mut Listen) -> Result<(), ConfigError> {
    if let Some(value) = section.string("unix")? {
        listen.unix = match value.text.as_str() {
            "off" => None,
            _ => Some(UnixListen::at(section.socket_path("unix", &value)?)),
        };
    }
    if let Some(value) = section.string("unix_mode")? {
        let mode = u32::from_str_radix(value.text.trim_start_matches("0o"), 8).ok().filter(|mode| *mode <= 0o777);
        let mode =
            mode.ok_or_else(|| section.refuse("unix_mode", &value, "permissions in octal, \"0000\" to \"0777\""))?;
        if let Some(unix) = &mut listen.unix {
            unix.mode = mode;
        }
    }
    if let Some(value) = section.string("unix_group")? {
        match nix::unistd::Group::from_name(&value.text) {
            Ok(Some(_)) => {}
            Ok(None) => return Err(section.refuse("unix_group", &value, "a group of this host")),
            Err(error) => return Err(section.refuse("unix_group", &value, &format!("a group of this host ({error})"))),
        }
        if let Some(unix) = &mut listen.unix {
            unix.group = Some(value.text);
        }
    }
    let tcp = section.string("tcp")?;
    let cert = section.path("tls_cert")?;
    let key = section.path("tls_key")?;
    let client_ca = section.path("tls_client_ca")?;
    let insecure = section.boolean("insecure")?.unwrap_or(false);
    let Some(tcp) = tcp else {
        if listen.unix.is_none() {
            return Err(section.fault("unix is \"off\" and tcp is not given: nothing to listen on"));
        }
        return Ok(());
    };
    let address = section.address("tcp", &tcp)?;
    let tls = match (cert, key, client_ca, insecure) {
        (Some(cert), Some(key), Some(client_ca), false) => Some(TlsFiles { cert, key, client_ca }),
        (None, None, None, true) => None,
        (_, _, _, true) => {
            return Err(section.refuse("tcp", &tcp, "either insecure = true or the three tls_ files, not both"));
        }
        (_, _, _, false) => {
            let bound = "TCP wants tls_cert, tls_key and tls_client_ca (or insecure = true, which lets anybody in)";
            return Err(section.refuse("tcp", &tcp, bound));
        }
    };
    listen.tcp = Some(TcpListen { address, tls });
    Ok(())
}

fn read_engine(section: &mut Section<'_>, engine: &mut EngineConfig) -> Result<(), ConfigError> {
    const MIB: u64 = 1 << 20;
    if let Some(bytes) = section.size("backlog", MIB, 1 << 40)? {
        engine.backlog_bytes_max = bytes;
    }
    if let Some(ns) = section.duration_ns("stall_max", 100_000_000, 600_000_000_000)? {
        engine.stall_max_ns = ns;
    }
    if let Some(ns) = section.duration_ns("marker_interval", 1_000_000_000, 86_400_000_000_000)? {
        engine.marker_interval_s = ns / 1_000_000_000;
    }
    if let Some(bytes) = section.size("reserve_capacity", MIB, 1 << 60)? {
        engine.default_settings.reserve_capacity = bytes;
    }
    if let Some(value) = section.string_or_number("reserve_duration")? {
        let seconds =
            parse::duration_s(&value.text).map_err(|error| section.refuse("reserve_duration", &value, &error.bound))?;
        if !(1..=parse::RESERVE_DURATION_S_MAX).contains(&seconds) {
            return Err(section.refuse("reserve_duration", &value, "1s to 3153600000s (100 years)"));
        }
        engine.default_settings.reserve_duration_s = seconds;
    }
    if let Some(value) = section.string("priority")? {
        engine.default_settings.priority =
            priority(&value.text).ok_or_else(|| section.refuse("priority", &value, "low, mid or high"))?;
    }
    if let Some(overcommit) = section.boolean("overcommit")? {
        engine.overcommit = overcommit;
    }
    if let Some(value) = section.string("durability")? {
        engine.flush_primary = match value.text.as_str() {
            "journal" => false,
            "both" => true,
            _ => return Err(section.refuse("durability", &value, "journal or both")),
        };
    }
    if let Some(bytes) = section.size("index_cache", MIB, 1 << 40)? {
        engine.index_cache_bytes = bytes;
    }
    if let Some(bytes) = section.size("touched_sets", MIB, 1 << 40)? {
        engine.touched_bytes_max = bytes;
    }
    if let Some(bytes) = section.size("scratch", MIB, 1 << 40)? {
        engine.scratch_bytes_max = bytes;
    }
    if let Some(max) = section.integer("views_max", 1, 4096)? {
        engine.views_max = usize::try_from(max).expect("at most 4096");
    }
    Ok(())
}

fn read_volume(section: &mut Section<'_>) -> Result<VolumeConfig, ConfigError> {
    let name = section.required_string("name")?;
    parse::volume_name(&name.text).map_err(|error| section.refuse("name", &name, &error.bound))?;
    let path = section.required_path("path")?;
    let uuid = match section.string("uuid")? {
        Some(value) => Some(Uuid::parse_str(&value.text).ok().filter(|id| !id.is_nil()).ok_or_else(|| {
            section.refuse(
                "uuid",
                &value,
                "32 hexadecimal digits in groups, not all zero: \"6f1c1e0a-3d5b-4d62-9d1e-6f3f1d0f7b11\"",
            )
        })?),
        None => None,
    };
    let size = section.size("size", 512, 1 << 60)?.unwrap_or(0);
    if !size.is_multiple_of(512) {
        return Err(section.fault(&format!("{}: {size} is not valid: a multiple of 512 bytes", section.key("size"))));
    }
    Ok(VolumeConfig { name: name.text, path, uuid, size })
}

fn read_group(section: &mut Section<'_>) -> Result<GroupConfig, ConfigError> {
    let name = section.required_string("name")?;
    parse::volume_name(&name.text).map_err(|error| section.refuse("name", &name, &error.bound))?;
    let members = section.strings("volumes")?;
    let mut volumes: Vec<String> = Vec::new();
    for member in members {
        let valid = parse::volume_name(&member.text).is_ok() || Uuid::parse_str(&member.text).is_ok();
        if !valid || volumes.contains(&member.text) {
            return Err(section.refuse("volumes", &member, "names or uuids of volumes, each once"));
        }
        volumes.push(member.text);
    }
    if volumes.is_empty() {
        return Err(section.fault(&format!("{} is missing or empty", section.key("volumes"))));
    }
    Ok(GroupConfig { name: name.text, volumes })
}

/// What only shows when the parts are looked at together.
fn check_paths(source: &Source<'_>, root: &DeTable<'_>, config: &Config) -> Result<(), ConfigError> {
    let fault = |kind: &str, index: usize, message: String| {
        let spanned = root.get(kind).and_then(|value| value.get_ref().get(index));
        let line = spanned.map_or(0, |value| source.line(value.span().start));
        Err(ConfigError { file: source.file.to_owned(), line, message })
    };
    for (index, path) in config.disks.iter().enumerate() {
        if config.disks[..index].contains(path) {
            return fault("disk", index, format!("disk[{index}].path: {path:?} is given twice"));
        }
    }
    for (index, group) in config.groups.iter().enumerate() {
        if config.groups[..index].iter().any(|other| other.name == group.name) {
            return fault("group", index, format!("group[{index}].name: {:?} is given twice", group.name));
        }
        if config.volumes.iter().any(|volume| volume.name == group.name) {
            let message = format!("group[{index}].name: {:?} is the name of a volume", group.name);
            return fault("group", index, message);
        }
    }
    for (index, volume) in config.volumes.iter().enumerate() {
        let earlier = &config.volumes[..index];
        if earlier.iter().any(|other| other.name == volume.name) {
            return fault("volume", index, format!("volume[{index}].name: {:?} is given twice", volume.name));
        }
        if earlier.iter().any(|other| other.path == volume.path) {
            return fault("volume", index, format!("volume[{index}].path: {:?} is given twice", volume.path));
        }
        if volume.uuid.is_some_and(|id| earlier.iter().any(|other| other.uuid == Some(id))) {
            return fault("volume", index, format!("volume[{index}].uuid is given twice"));
        }
        if config.disks.contains(&volume.path) {
            let message = format!(
                "volume[{index}].path: {:?} is a CDP disk too: a volume cannot be its own journal",
                volume.path
            );
            return fault("volume", index, message);
        }
    }
    Ok(())
}

/// `cdp_priority` in words.
pub fn priority(word: &str) -> Option<Priority> {
    match word {
        "low" => Some(Priority::Low),
        "mid" => Some(Priority::Mid),
        "high" => Some(Priority::High),
        _ => None,
    }
}

/// The word of a priority.
pub fn priority_word(priority: Priority) -> &'static str {
    match priority {
        Priority::Low => "low",
        Priority::Mid => "mid",
        Priority::High => "high",
    }
}

/// Checks settings as a user gives them; the least capacity depends on the disk, so the engine checks that.
pub fn check_settings(settings: &Settings) -> Result<(), cdp_journal::Error> {
    if !(1..=parse::RESERVE_DURATION_S_MAX).contains(&settings.reserve_duration_s) {
        let bound = format!("1 to {} seconds", parse::RESERVE_DURATION_S_MAX);
        return Err(cdp_journal::Error::invalid("reserve_duration", settings.reserve_duration_s, bound));
    }
    if settings.reserve_capacity == 0 || settings.reserve_capacity > 1 << 60 {
        return Err(cdp_journal::Error::invalid("reserve_capacity", settings.reserve_capacity, "1 to 2^60 bytes"));
    }
    Ok(())
}

/// The file, to tell lines by.
struct Source<'a> {
    file: &'a str,
    text: &'a str,
}

impl Source<'_> {
    fn line(&self, offset: usize) -> usize {
        let line = 1 + self.text.as_bytes().iter().take(offset).filter(|byte| **byte == b'\n').count();
        line.min(self.text.lines().count().max(1)) // what is missing at the end is missing in the last line
    }
}

/// A value as text, with its line.
struct Value {
    text: String,
    line: usize,
}

/// A table of the file; remembers which keys were asked for, so that the others are the unknown ones.
struct Section<'a> {
    source: &'a Source<'a>,
    /// `grpc`, `disk[1]`; empty: the file's top.
    place: String,
    table: &'a DeTable<'a>,
    asked: Vec<&'static str>,
}

impl<'a> Section<'a> {
    fn key(&self, key: &str) -> String {
        if self.place.is_empty() { key.to_owned() } else { format!("{}.{key}", self.place) }
    }

    fn error(&self, line: usize, message: String) -> ConfigError {
        ConfigError { file: self.source.file.to_owned(), line, message }
    }

    fn refuse(&self, key: &str, value: &Value, bound: &str) -> ConfigError {
        self.error(value.line, format!("{}: {:?} is not valid: {bound}", self.key(key), value.text))
    }

    /// An error about the section as a whole.
    fn fault(&self, message: &str) -> ConfigError {
        let line = self.table.keys().map(|key| self.source.line(key.span().start)).min().unwrap_or(0);
        let place = if self.place.is_empty() { String::new() } else { format!("[{}] ", self.place) };
        self.error(line, format!("{place}{message}"))
    }

    fn get(&mut self, key: &'static str) -> Option<&'a Spanned<DeValue<'a>>> {
        self.asked.push(key);
        self.table.get(key)
    }

    fn wrong_type(&self, key: &str, value: &Spanned<DeValue<'_>>, wanted: &str) -> ConfigError {
        let found = value.get_ref().type_str();
        self.error(self.source.line(value.span().start), format!("{}: wants {wanted}, not a {found}", self.key(key)))
    }

    fn string(&mut self, key: &'static str) -> Result<Option<Value>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.get_ref() {
            DeValue::String(text) => {
                Ok(Some(Value { text: text.to_string(), line: self.source.line(value.span().start) }))
            }
            _ => Err(self.wrong_type(key, value, "a text in quotes")),
        }
    }

    /// A list of texts; an empty one where the key is missing.
    fn strings(&mut self, key: &'static str) -> Result<Vec<Value>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let DeValue::Array(items) = value.get_ref() else {
            return Err(self.wrong_type(key, value, "a list of texts in quotes"));
        };
        let text = |item: &Spanned<DeValue<'_>>| match item.get_ref() {
            DeValue::String(text) => Ok(Value { text: text.to_string(), line: self.source.line(item.span().start) }),
            _ => Err(self.wrong_type(key, item, "a list of texts in quotes")),
        };
        items.iter().map(text).collect()
    }

    /// Sizes and durations: `"64MiB"`, or a plain number of bytes or seconds.
    fn string_or_number(&mut self, key: &'static str) -> Result<Option<Value>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let line = self.source.line(value.span().start);
        match value.get_ref() {
            DeValue::String(text) => Ok(Some(Value { text: text.to_string(), line })),
            DeValue::Integer(number) if number.radix() == 10 => {
                Ok(Some(Value { text: number.as_str().to_owned(), line }))
            }
            _ => Err(self.wrong_type(key, value, "a text with a unit, such as \"64MiB\" or \"24h\"")),
        }
    }

    fn required_string(&mut self, key: &'static str) -> Result<Value, ConfigError> {
        self.string(key)?.ok_or_else(|| self.fault(&format!("{key} is missing")))
    }

    fn boolean(&mut self, key: &'static str) -> Result<Option<bool>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.get_ref() {
            DeValue::Boolean(yes) => Ok(Some(*yes)),
            _ => Err(self.wrong_type(key, value, "true or false")),
        }
    }

    fn integer(&mut self, key: &'static str, min: u64, max: u64) -> Result<Option<u64>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let DeValue::Integer(number) = value.get_ref() else {
            return Err(self.wrong_type(key, value, "a whole number"));
        };
        let text = Value { text: number.as_str().to_owned(), line: self.source.line(value.span().start) };
        match u64::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) if (min..=max).contains(&number) => Ok(Some(number)),
            _ => Err(self.refuse(key, &text, &format!("{min} to {max}"))),
        }
    }

    fn size(&mut self, key: &'static str, min: u64, max: u64) -> Result<Option<u64>, ConfigError> {
        let Some(value) = self.string_or_number(key)? else { return Ok(None) };
        let bytes = parse::size_between(&value.text, min, max);
        bytes.map(Some).map_err(|error| self.refuse(key, &value, &error.bound))
    }

    fn duration_ns(&mut self, key: &'static str, min: u64, max: u64) -> Result<Option<u64>, ConfigError> {
        let Some(value) = self.string_or_number(key)? else { return Ok(None) };
        let ns = parse::duration_ns(&value.text).map_err(|error| self.refuse(key, &value, &error.bound))?;
        if !(min..=max).contains(&ns) {
            let seconds = |ns: u64| format!("{}s", ns as f64 / 1e9);
            return Err(self.refuse(key, &value, &format!("{} to {}", seconds(min), seconds(max))));
        }
        Ok(Some(ns))
    }

    fn path(&mut self, key: &'static str) -> Result<Option<PathBuf>, ConfigError> {
        let Some(value) = self.string(key)? else { return Ok(None) };
        if !value.text.starts_with('/') || value.text.contains('\0') || value.text.len() > 4095 {
            return Err(self.refuse(key, &value, "an absolute path of at most 4095 bytes"));
        }
        Ok(Some(PathBuf::from(value.text)))
    }

    fn required_path(&mut self, key: &'static str) -> Result<PathBuf, ConfigError> {
        self.path(key)?.ok_or_else(|| self.fault(&format!("{key} is missing")))
    }

    fn socket_path(&self, key: &str, value: &Value) -> Result<PathBuf, ConfigError> {
        if !value.text.starts_with('/') || value.text.contains('\0') || value.text.len() > 107 {
            return Err(self.refuse(key, value, "\"off\" or an absolute path of at most 107 bytes"));
        }
        Ok(PathBuf::from(&value.text))
    }

    fn address(&self, key: &str, value: &Value) -> Result<SocketAddr, ConfigError> {
        if let Ok(address) = value.text.parse() {
            return Ok(address);
        }
        let resolved = value.text.to_socket_addrs().ok().and_then(|mut addresses| addresses.next());
        resolved
            .ok_or_else(|| self.refuse(key, value, "address and port, such as \"127.0.0.1:9187\" or \"[::1]:9187\""))
    }

    fn section(&mut self, key: &'static str) -> Result<Option<Section<'a>>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.get_ref() {
            DeValue::Table(table) => {
                Ok(Some(Section { source: self.source, place: key.to_owned(), table, asked: Vec::new() }))
            }
            _ => Err(self.wrong_type(key, value, &format!("a section: [{key}]"))),
        }
    }

    fn sections(&mut self, key: &'static str) -> Result<Vec<Section<'a>>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let wanted = format!("sections: [[{key}]]");
        let DeValue::Array(items) = value.get_ref() else { return Err(self.wrong_type(key, value, &wanted)) };
        let mut sections = Vec::new();
        for (index, item) in items.iter().enumerate() {
            let DeValue::Table(table) = item.get_ref() else { return Err(self.wrong_type(key, item, &wanted)) };
            sections.push(Section { source: self.source, place: format!("{key}[{index}]"), table, asked: Vec::new() });
        }
        Ok(sections)
    }

    /// Refuses keys that nobody asked for.
    fn finish(self) -> Result<(), ConfigError> {
        for key in self.table.keys() {
            let name: &str = key.get_ref();
            if self.asked.contains(&name) {
                continue;
            }
            let nearest = self.asked.iter().map(|known| (edit_distance(name, known), *known)).min();
            let hint = match nearest {
                Some((distance, known)) if distance <= (known.len() / 2).max(2) => {
                    format!("; did you mean {:?}?", self.key(known))
                }
                _ => format!("; known here: {}", self.asked.join(", ")),
            };
            let line = self.source.line(key.span().start);
            return Err(self.error(line, format!("unknown key {:?}{hint}", self.key(name))));
        }
        Ok(())
    }
}

/// Least number of inserted, removed, replaced or swapped neighbouring characters that make `b` of `a`.
fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().take(64).collect(), b.chars().take(64).collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            if i == 0 || j == 0 {
                rows[i][j] = i + j;
                continue;
            }
            let replace = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replace.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = best;
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = include_str!("../../systemd/config.toml");

    #[test]
    fn an_empty_file_is_the_defaults() {
        let config = Config::parse("c", "").expect("valid");
        assert_eq!(config.shards, 1);
        assert_eq!(config.grpc.unix, Some(UnixListen::at("/run/cdp-agent/agent.sock")));
        assert_eq!(config.metrics, Some(SocketAddr::from(([127, 0, 0, 1], 9187))));
        assert!(config.grpc.tcp.is_none() && config.disks.is_empty());
    }

    #[test]
    fn everything_can_be_set() {
        let text = r#"
            state_dir = "/s"
            shards = 4
            lock_memory = false
            [grpc]
            unix = "/g.sock"
            unix_mode = "0600"
            unix_group = "root"
            tcp = "127.0.0.1:7443"
            tls_cert = "/c"
            tls_key = "/k"
            tls_client_ca = "/a"
            [nbd]
            unix = "off"
            tcp = "[::1]:10809"
            insecure = true
            connections_max = 12
            [metrics]
            listen = "off"
            [log]
            level = "warn,cdp_journal=debug"
            format = "json"
            [engine]
            backlog = "128MiB"
            stall_max = "250ms"
            marker_interval = "10s"
            reserve_capacity = "50GiB"
            reserve_duration = "48h"
            priority = "high"
            overcommit = true
            durability = "both"
            index_cache = 1048576
            touched_sets = "3MiB"
            scratch = "2GiB"
            views_max = 7
            [[disk]]
            path = "/dev/a"
            [[disk]]
            path = "/dev/b"
            [[volume]]
            name = "one"
            path = "/dev/c"
            uuid = "6F1C1E0A-3d5b-4d62-9d1e-6f3f1d0f7b11"
            size = "10GiB"
        "#;
        let config = Config::parse("c", text).expect("valid");
        assert_eq!((config.shards, config.lock_memory, config.nbd_connections_max), (4, false, 12));
        let unix = UnixListen { path: "/g.sock".into(), mode: 0o600, group: Some("root".into()) };
        assert_eq!(config.grpc.unix, Some(unix));
        assert!(config.grpc.tcp.is_some_and(|tcp| tcp.tls.is_some_and(|tls| tls.client_ca == Path::new("/a"))));
        assert!(config.nbd.unix.is_none() && config.nbd.tcp.is_some_and(|tcp| tcp.tls.is_none()));
        assert_eq!((config.metrics, config.log_format), (None, LogFormat::Json));
        let engine = config.engine;
        assert_eq!(
            (engine.backlog_bytes_max, engine.stall_max_ns, engine.marker_interval_s),
            (128 << 20, 250_000_000, 10)
        );
        let settings = Settings { reserve_capacity: 50 << 30, reserve_duration_s: 172_800, priority: Priority::High };
        assert_eq!(engine.default_settings, settings);
        assert!(engine.overcommit && engine.flush_primary);
        assert_eq!((engine.index_cache_bytes, engine.touched_bytes_max), (1 << 20, 3 << 20));
        assert_eq!((engine.index_cache_bytes, engine.scratch_bytes_max, engine.views_max), (1 << 20, 2 << 30, 7));
        assert_eq!(config.disks, [PathBuf::from("/dev/a"), PathBuf::from("/dev/b")]);
        assert_eq!((config.volumes[0].size, config.volumes[0].uuid.is_some()), (10 << 30, true));
    }

    /// Goal: each kind of bad input is refused with its line, its key and what would be right.
    #[test]
    fn bad_input_is_refused_by_line_key_and_bound() {
        let table: &[(&str, usize, &[&str])] = &[
            ("sharts = 2", 1, &["unknown key \"sharts\"", "\"shards\""]),
            ("\n[grcp]\nunix = \"/a\"", 2, &["unknown key \"grcp\"", "\"grpc\""]),
            ("[engine]\nbacklog = \"64MiB\"\nmarker_intervall = \"5s\"", 3, &["\"engine.marker_interval\""]),
            ("[engine]\nzzzzzzzzzzzzzzz = 1", 2, &["known here:", "backlog"]),
            ("[[disk]]\npath = \"/a\"\nsize = 1", 3, &["disk[0].size"]),
            ("shards = 0", 1, &["shards", "\"0\"", "1 to 64"]),
            ("shards = -3", 1, &["-3", "1 to 64"]),
            ("shards = 99999999999999999999", 1, &["1 to 64"]),
            ("shards = \"two\"", 1, &["shards", "whole number", "string"]),
            ("shards = ", 1, &[""]),
            ("shards = 1\nshards = 2", 2, &["duplicate"]),
            ("state_dir = \"relative\"", 1, &["state_dir", "relative", "absolute"]),
            ("lock_memory = 1", 1, &["true or false"]),
            ("grpc = 1", 1, &["[grpc]"]),
            ("[grpc]\nunix_mode = \"0888\"", 2, &["grpc.unix_mode", "0888", "octal"]),
            ("[grpc]\nunix_group = \"no-such-group-here\"", 2, &["no-such-group-here", "group of this host"]),
            ("[grpc]\nunix = \"off\"", 2, &["nothing to listen on"]),
            ("[grpc]\ntcp = \"0.0.0.0:1\"", 2, &["tls_client_ca", "insecure"]),
            ("[grpc]\ntcp = \"0.0.0.0:1\"\ntls_cert = \"/c\"", 2, &["tls_client_ca"]),
            ("[nbd]\ntcp = \"0.0.0.0:1\"\ntls_cert = \"/c\"\ninsecure = true", 2, &["not both"]),
            ("[nbd]\ntcp = \"here\"\ninsecure = true", 2, &["nbd.tcp", "\"here\"", "address and port"]),
            ("[nbd]\nconnections_max = 0", 2, &["1 to 65536"]),
            ("[metrics]\nlisten = \"9187\"", 2, &["metrics.listen", "9187"]),
            ("[log]\nformat = \"xml\"", 2, &["log.format", "text or json"]),
            ("[log]\nlevel = \"a=b=c\"", 2, &["log.level"]),
            ("[engine]\nbacklog = \"1KiB\"", 2, &["engine.backlog", "1KiB"]),
            ("[engine]\nbacklog = \"a lot\"", 2, &["engine.backlog", "a lot"]),
            ("[engine]\nbacklog = 1.5", 2, &["engine.backlog", "unit"]),
            ("[engine]\nstall_max = \"1h\"", 2, &["engine.stall_max", "0.1s to 600s"]),
            ("[engine]\nreserve_duration = \"500ms\"", 2, &["reserve_duration"]),
            ("[engine]\nreserve_duration = \"0s\"", 2, &["reserve_duration", "1s to"]),
            ("[engine]\npriority = \"urgent\"", 2, &["engine.priority", "urgent", "low, mid or high"]),
            ("[engine]\ndurability = \"none\"", 2, &["journal or both"]),
            ("[engine]\nviews_max = 5000", 2, &["1 to 4096"]),
            ("[[disk]]\n", 0, &["disk[0]", "path is missing"]),
            ("disk = 5", 1, &["[[disk]]"]),
            ("[[disk]]\npath = \"/a\"\n[[disk]]\npath = \"/a\"", 3, &["twice"]),
            ("shards = 2\n[[\"\"\n", 2, &["unclosed"]),
            ("[views]\nattach = \"ublk\"", 2, &["views.attach", "ublk", "\"loop\" or \"nbd\""]),
            (
                "[nbd]\nunix = \"off\"\ntcp = \"127.0.0.1:9\"\ninsecure = true\n[views]\nattach = \"nbd\"",
                6,
                &["views.attach", "unix socket"],
            ),
            ("[[volume]]\npath = \"/a\"", 2, &["volume[0]", "name is missing"]),
            ("[[volume]]\nname = \"a b\"\npath = \"/a\"", 2, &["volume[0].name", "a b"]),
            ("[[volume]]\nname = \"a\"\npath = \"/a\"\nuuid = \"1\"", 4, &["volume[0].uuid"]),
            ("[[volume]]\nname = \"a\"\npath = \"/a\"\nsize = 1000", 2, &["multiple of 512"]),
            ("[[volume]]\nname=\"a\"\npath=\"/a\"\n[[volume]]\nname=\"a\"\npath=\"/b\"", 4, &["\"a\" is given twice"]),
            ("[[volume]]\nname=\"a\"\npath=\"/a\"\n[[volume]]\nname=\"b\"\npath=\"/a\"", 4, &["\"/a\" is given twice"]),
            ("[[group]]\nname = \"a\"", 2, &["volumes is missing"]),
            ("[[group]]\nname = \"a b\"\nvolumes = [\"x\"]", 2, &["group[0].name", "a b"]),
            ("[[group]]\nname = \"a\"\nvolumes = [\"x\", \"x\"]", 3, &["group[0].volumes", "each once"]),
            ("[[group]]\nname = \"a\"\nvolumes = \"x\"", 3, &["group[0].volumes", "a list"]),
            (
                "[[group]]\nname=\"a\"\nvolumes=[\"a\"]\n[[volume]]\nname=\"a\"\npath=\"/a\"",
                1,
                &["the name of a volume"],
            ),
            ("[[disk]]\npath=\"/a\"\n[[volume]]\nname=\"b\"\npath=\"/a\"", 3, &["its own journal"]),
        ];
        for (text, line, parts) in table {
            let error = Config::parse("file.toml", text).expect_err(text);
            let shown = error.to_string();
            assert_eq!(error.line, *line, "{text:?}: {shown}");
            assert!(shown.starts_with("file.toml:"), "{shown}");
            for part in *parts {
                assert!(shown.contains(part), "{text:?}: {shown:?} lacks {part:?}");
            }
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Config::load(Path::new("/nonexistent/config.toml")).expect_err("there is none");
        assert!(error.to_string().starts_with("/nonexistent/config.toml: read the configuration:"), "{error}");
    }

    #[test]
    fn edit_distance_counts_single_slips() {
        for (a, b, distance) in
            [("", "abc", 3), ("unix", "unix", 0), ("uinx", "unix", 1), ("unx", "unix", 1), ("kitten", "sitting", 3)]
        {
            assert_eq!(edit_distance(a, b), distance, "{a} {b}");
        }
    }

    /// Goal: the sample that is shipped is right, says every default as it is, and shows every key.
    #[test]
    fn the_sample_is_valid_as_it_is_and_with_every_key_uncommented() {
        Config::parse("sample", SAMPLE).expect("the sample as shipped");
        let uncommented: String = SAMPLE
            .lines()
            .map(|line| line.strip_prefix('#').filter(|rest| !rest.starts_with([' ', '#'])).unwrap_or(line))
            .fold(String::new(), |text, line| text + line + "\n");
        // Groups that this host need not have; and not the same one: who may open a VM's disk is not to be root.
        let here = ["cdp-admin", "cdp"].iter().fold(uncommented, |text, group| {
            assert_eq!(text.matches(&format!("unix_group = \"{group}\"")).count(), 1, "{group}");
            text.replace(&format!("unix_group = \"{group}\""), "unix_group = \"root\"")
        });
        let config = Config::parse("sample", &here).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!((config.disks.len(), config.volumes.len()), (1, 1));
        let (default, engine) = (EngineConfig::default(), config.engine);
        assert_eq!(format!("{default:?}"), format!("{engine:?}"), "the sample shows the defaults");
        assert_eq!(config.metrics, Config::default().metrics);
        assert_eq!(config.state_dir, Config::default().state_dir);
        assert_eq!(config.nbd_connections_max, Config::default().nbd_connections_max);
    }
}
