//! Fuzz targets: every parser that takes bytes from outside (disks, clients, files, command lines), as a function over bytes that
//! must not panic, overflow, hang or take much memory.
//!
//! Two fuzzers use them: `fuzz/` (cargo-fuzz: libFuzzer, guided by coverage, nightly compiler) and [`mutate`] (seeded, stable). They
//! share the inputs in `fuzz/corpus/TARGET`; what once crashed a target lies there too.

mod heap;
mod watchdog;

use std::path::{Path, PathBuf};

pub use heap::largest_since;
pub use watchdog::Watchdog;

/// A target's name and its function, which answers whether the bytes were taken for what they claim to be.
pub type Target = (&'static str, fn(&[u8]) -> bool);

/// All targets.
pub const TARGETS: &[Target] = &[
    ("superblock", cdp_journal::fuzzing::superblock),
    ("table", cdp_journal::fuzzing::table),
    ("segment", cdp_journal::fuzzing::segment),
    ("frame", cdp_journal::fuzzing::frame),
    ("index", cdp_journal::fuzzing::index),
    ("run", cdp_journal::fuzzing::run),
    #[cfg(feature = "proto")]
    ("words", words),
    #[cfg(feature = "agent")]
    ("config", cdp_agent::fuzzing::config),
    #[cfg(feature = "agent")]
    ("nbd_handshake", cdp_agent::fuzzing::handshake),
    #[cfg(feature = "agent")]
    ("nbd_requests", cdp_agent::fuzzing::requests),
    #[cfg(feature = "agent")]
    ("nbd_stream", cdp_agent::fuzzing::stream),
];

/// The function of a target.
///
/// # Panics
/// When there is no target of that name.
pub fn target(name: &str) -> fn(&[u8]) -> bool {
    TARGETS.iter().find(|(known, _)| *known == name).unwrap_or_else(|| panic!("no target {name}")).1
}

/// Sizes, durations, instants, endpoints and names.
#[cfg(feature = "proto")]
fn words(data: &[u8]) -> bool {
    use cdp_proto::parse;
    let Ok(text) = std::str::from_utf8(data) else { return false };
    if let Ok(bytes) = parse::size(text) {
        // For people, so it is rounded.
        assert!(!parse::size_text(bytes).is_empty());
    }
    let _ = parse::size_between(text, 4096, 1 << 40);
    let _ = parse::duration_ns(text);
    // Plain seconds go beyond what a text with units can say; nobody keeps history for 584 years.
    if let Ok(seconds) = parse::duration_s(text)
        && seconds <= u64::MAX / 1_000_000_000
    {
        assert_eq!(
            parse::duration_s(&parse::duration_text(seconds)),
            Ok(seconds),
            "a duration is written as it is read"
        );
    }
    let when = text.parse::<parse::When>();
    if let Ok(when) = &when {
        let again = when.to_string();
        let _ = again.parse::<parse::When>().unwrap_or_else(|e| panic!("{when:?} is written as {again:?}: {e}"));
    }
    let _ = text.parse::<parse::Endpoint>();
    let _ = parse::volume_name(text);
    let _ = parse::marker_name(text);
    let _ = parse::priority(text);
    when.is_ok()
}

/// The folder with a target's inputs.
pub fn corpus(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(name)
}

/// A target's inputs, sorted by name.
///
/// # Panics
/// When they cannot be read.
pub fn inputs(name: &str) -> Vec<(String, Vec<u8>)> {
    let folder = corpus(name);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut inputs: Vec<_> = entries
        .map(|entry| {
            let path = entry.expect("an entry of the folder").path();
            let data = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            (path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(), data)
        })
        .collect();
    inputs.sort();
    inputs
}

/// Input number `number` of a seed: one of the corpus, changed in a few places, or two of them spliced.
pub fn mutate(corpus: &[(String, Vec<u8>)], seed: u64, number: u64) -> Vec<u8> {
    let mut rng = Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ number.wrapping_mul(0xD134_2543_DE82_EF95));
    let pick = |rng: &mut Rng| corpus.get(rng.below(corpus.len())).map(|(_, data)| data.clone()).unwrap_or_default();
    let mut data = pick(&mut rng);
    if rng.below(8) == 0 {
        let other = pick(&mut rng);
        let (head, tail) = (rng.below(data.len() + 1), rng.below(other.len() + 1));
        data.truncate(head);
        data.extend_from_slice(&other[tail..]);
    }
    const NUMBERS: [u64; 12] =
        [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFF_FFFF, 0xFFFF_FFFF, 1 << 63, u64::MAX - 1, u64::MAX];
    for _ in 0..=rng.below(6) {
        // Most of what matters is at the front: headers.
        let reach = if rng.below(2) == 0 { data.len().min(256) } else { data.len() };
        let at = rng.below(reach.max(1));
        match rng.below(8) {
            0 | 1 => {
                if let Some(byte) = data.get_mut(at) {
                    *byte ^= 1 << rng.below(8);
                }
            }
            2 => {
                if let Some(byte) = data.get_mut(at) {
                    *byte = rng.number().to_le_bytes()[0];
                }
            }
            3 | 4 => {
                let number = NUMBERS[rng.below(NUMBERS.len())].to_le_bytes();
                let len = [1, 2, 4, 8][rng.below(4)];
                let at = if rng.below(4) == 0 { at } else { at & !(len - 1) };
                if let Some(place) = data.get_mut(at..at + len) {
                    place.copy_from_slice(&number[..len]);
                }
            }
            5 => data.truncate(at),
            6 => {
                let byte = rng.number().to_le_bytes()[0];
                data.insert(at.min(data.len()), byte);
            }
            _ => {
                let len = rng.below(16).min(data.len() - at.min(data.len()));
                let piece = data[at.min(data.len())..][..len].to_vec();
                let to = rng.below(data.len() + 1);
                data.splice(to..to, piece);
            }
        }
    }
    data
}

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.number() % bound.max(1) as u64).expect("below a usize")
    }
}
