//! Pages of a run: how they are written, and the checks between a disk and the first use of what it gave.

use std::rc::Rc;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::entry::Key;
use crate::buf::IoBuf;
use crate::error::{Error, Result};
use crate::format::{ChildEntry, IndexEntry, IndexPageHeader, StreamKind, crc};
use crate::host::LocalFuture;
use crate::types::BLOCK;

/// Bytes before the entries of a page.
const HEAD: usize = size_of::<IndexPageHeader>();
/// Bytes of an entry, whatever its kind.
const ENTRY: usize = size_of::<IndexEntry>();
const _: () = assert!(ENTRY == size_of::<ChildEntry>());
const _: () = assert!(HEAD + IndexPageHeader::ENTRIES * ENTRY == BLOCK as usize);

/// Where index pages come from: a CDP disk behind a cache.
pub trait PageReader {
    /// The page at a place whose `crc` field is `crc`; [`Error::Damaged`] when something else is there.
    fn page(&self, segment: u32, block: u32, crc: u32) -> LocalFuture<'_, Result<Rc<IndexPage>>>;
    /// Pages that lie one after the other from `block` on and whose `crc` fields are `crcs`, read at once and past the cache: for scans, each of which
    /// needs a page once. At least one of them and at most all: what is behind a damaged page is left out. [`Error::Damaged`] when the first is.
    fn pages(&self, segment: u32, block: u32, crcs: Vec<u32>) -> LocalFuture<'_, Result<Vec<Rc<IndexPage>>>>;
    /// What [`page`](Self::page) would answer, when no I/O is needed.
    fn cached(&self, segment: u32, block: u32, crc: u32) -> Option<Rc<IndexPage>>;
}

/// Where index pages go: the log.
pub trait PageSink {
    /// Appends pages of 4 KiB and answers the place (segment, block) of each, in order.
    fn append(&mut self, pages: Vec<IoBuf>) -> LocalFuture<'_, Result<Vec<(u32, u32)>>>;
}

/// A page that was checked: checksum, kinds, levels, counts and order are right.
#[derive(Debug)]
pub struct IndexPage {
    /// Head and used entries; what is behind them is not kept.
    bytes: Box<[u8]>,
    log_id: u64,
    crc: u32,
    height: u8,
    kind: StreamKind,
}

impl IndexPage {
    /// Checks the 4 KiB of a page; `log_id` is the log that it has to belong to. The place in the [`Error::Damaged`] is empty: the
    /// caller knows it.
    pub fn parse(bytes: &[u8], log_id: Option<u64>) -> Result<Self> {
        let damaged = |what| Err(Error::Damaged { what, place: String::new() });
        if bytes.len() != BLOCK as usize {
            return damaged("index page (length)");
        }
        let Ok((head, _)) = IndexPageHeader::read_from_prefix(bytes) else { return damaged("index page (length)") };
        if head.magic != IndexPageHeader::MAGIC {
            return damaged("index page (magic)");
        }
        if head.crc != crc(&bytes[8..]) {
            return damaged("index page (checksum)");
        }
        if log_id.is_some_and(|log_id| head.log_id != log_id) {
            return damaged("index page (of another log)");
        }
        let Some(kind) = StreamKind::from_byte(head.kind) else { return damaged("index page (kind)") };
        let count = usize::from(head.count.get());
        if count == 0 || count > IndexPageHeader::ENTRIES {
            return damaged("index page (count)");
        }
        let page = Self {
            bytes: bytes[..HEAD + count * ENTRY].into(),
            log_id: head.log_id.get(),
            crc: head.crc.get(),
            height: head.height,
            kind,
        };
        if let Some(what) = page.entries().iter().find_map(|entry| entry.check().err()) {
            return damaged(what);
        }
        let sorted = page.entries().is_sorted_by(|a, b| a.key() < b.key())
            && page.children().is_sorted_by(|a, b| a.key() < b.key());
        if !sorted {
            return damaged("index page (order)");
        }
        Ok(page)
    }

    /// Entries of a leaf; none on an inner page.
    pub fn entries(&self) -> &[IndexEntry] {
        let bytes = if self.height == 0 { &self.bytes[HEAD..] } else { &[] };
        // The length is a multiple of an entry's, and any address is aligned for it.
        <[IndexEntry]>::ref_from_bytes(bytes).unwrap_or_default()
    }

    /// Children of an inner page; none on a leaf.
    pub fn children(&self) -> &[ChildEntry] {
        let bytes = if self.height > 0 { &self.bytes[HEAD..] } else { &[] };
        <[ChildEntry]>::ref_from_bytes(bytes).unwrap_or_default()
    }

    /// Id of the log that it belongs to.
    pub fn log_id(&self) -> u64 {
        self.log_id
    }

    /// CRC-32 of the page.
    pub fn crc(&self) -> u32 {
        self.crc
    }

    /// 0: leaf.
    pub fn height(&self) -> u8 {
        self.height
    }

    /// Kind of the segments that it indexes.
    pub fn kind(&self) -> StreamKind {
        self.kind
    }

    /// The first key at or below it.
    pub fn first_key(&self) -> Key {
        let leaf = self.entries().first().map(IndexEntry::key);
        leaf.or_else(|| self.children().first().map(ChildEntry::key)).unwrap_or_default()
    }

    /// Memory in use, bytes.
    pub fn bytes(&self) -> usize {
        self.bytes.len() + size_of::<Self>() + 16
    }

    /// How many entries of a leaf, or children, have a (first) key at or before `key`.
    pub(super) fn count_upto(&self, key: Key) -> usize {
        if self.height == 0 {
            self.entries().partition_point(|entry| entry.key() <= key)
        } else {
            self.children().partition_point(|child| child.key() <= key)
        }
    }

    /// How many entries of a leaf have a key before `key`.
    pub(super) fn count_before(&self, key: Key) -> usize {
        self.entries().partition_point(|entry| entry.key() < key)
    }
}

/// The bytes of a page and its checksum. `items` are at most [`IndexPageHeader::ENTRIES`] entries or children.
pub(super) fn encode<T: IntoBytes + Immutable>(log_id: u64, kind: StreamKind, height: u8, items: &[T]) -> (IoBuf, u32) {
    let mut page = IoBuf::zeroed(BLOCK as usize);
    let mut head = IndexPageHeader {
        magic: IndexPageHeader::MAGIC.into(),
        crc: 0.into(),
        log_id: log_id.into(),
        count: (items.len() as u16).into(),
        height,
        kind: kind as u8,
        reserved: [0; 12],
    };
    page[HEAD..HEAD + size_of_val(items)].copy_from_slice(items.as_bytes());
    page[..HEAD].copy_from_slice(head.as_bytes());
    head.crc = crc(&page[8..]).into();
    page[..HEAD].copy_from_slice(head.as_bytes());
    (page, head.crc.get())
}
