//! Index pages in memory, bounded in bytes; the page that was longest not asked for goes first.

use std::collections::HashMap;
use std::rc::Rc;

use super::page::IndexPage;

/// (Index of the disk, segment, block).
type Place = (u32, u32, u32);

/// End of the list.
const NONE: usize = usize::MAX;
/// Bytes that an entry of the cache takes beside its page.
const OVERHEAD: usize = size_of::<Slot>() + 2 * size_of::<(Place, usize)>();

/// A bounded cache of index pages. Invariant: `slots` in use form one list from `newest` to `oldest`, and `bytes` is their sum.
#[derive(Debug)]
pub struct PageCache {
    places: HashMap<Place, usize>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    newest: usize,
    oldest: usize,
    bytes: usize,
    bytes_max: usize,
    hits: u64,
    misses: u64,
}

#[derive(Debug)]
struct Slot {
    place: Place,
    page: Option<Rc<IndexPage>>,
    newer: usize,
    older: usize,
}

impl PageCache {
    /// A cache of at most `bytes_max` bytes.
    pub fn new(bytes_max: usize) -> Self {
        Self {
            places: HashMap::new(),
            slots: Vec::new(),
            free: Vec::new(),
            newest: NONE,
            oldest: NONE,
            bytes: 0,
            bytes_max,
            hits: 0,
            misses: 0,
        }
    }

    /// The page at a place (disk, segment, block), if its checksum is `crc`: a segment that was given out again may hold
    /// another page there, and the one that is left of its last use goes.
    pub fn get(&mut self, place: (u32, u32, u32), crc: u32) -> Option<Rc<IndexPage>> {
        if let Some(&slot) = self.places.get(&place) {
            if let Some(page) = self.slots[slot].page.clone().filter(|page| page.crc() == crc) {
                self.unlink(slot);
                self.link_newest(slot);
                self.hits += 1;
                return Some(page);
            }
            self.remove(slot);
        }
        self.misses += 1;
        None
    }

    /// Keeps a page, in place of what was known of its place.
    pub fn insert(&mut self, place: (u32, u32, u32), page: Rc<IndexPage>) {
        if let Some(&slot) = self.places.get(&place) {
            self.remove(slot);
        }
        self.bytes += page.bytes() + OVERHEAD;
        let slot = self.free.pop().unwrap_or(self.slots.len());
        let content = Slot { place, page: Some(page), newer: NONE, older: NONE };
        match self.slots.get_mut(slot) {
            Some(free) => *free = content,
            None => self.slots.push(content),
        }
        self.places.insert(place, slot);
        self.link_newest(slot);
        while self.bytes > self.bytes_max && self.oldest != NONE {
            self.remove(self.oldest);
        }
    }

    /// Number of pages.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there is no page.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Memory in use, bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// How often [`get`](Self::get) had the page.
    pub fn hits(&self) -> u64 {
        self.hits
    }

    /// How often it had not.
    pub fn misses(&self) -> u64 {
        self.misses
    }

    fn remove(&mut self, slot: usize) {
        self.unlink(slot);
        let place = self.slots[slot].place;
        if let Some(page) = self.slots[slot].page.take() {
            self.bytes -= page.bytes() + OVERHEAD;
        }
        self.places.remove(&place);
        self.free.push(slot);
    }

    fn unlink(&mut self, slot: usize) {
        let Slot { newer, older, .. } = self.slots[slot];
        match newer {
            NONE => self.newest = older,
            newer => self.slots[newer].older = older,
        }
        match older {
            NONE => self.oldest = newer,
            older => self.slots[older].newer = newer,
        }
    }

    fn link_newest(&mut self, slot: usize) {
        self.slots[slot].newer = NONE;
        self.slots[slot].older = self.newest;
        match self.newest {
            NONE => self.oldest = slot,
            newest => self.slots[newest].newer = slot,
        }
        self.newest = slot;
    }
}
