//! The frame of a qcow2 file (version 3) whose data clusters are known beforehand: header, tables and reference counts, written once; the data
//! follows in order. So an export that was interrupted goes on at any cluster.

use std::io;

/// Bytes of a cluster.
pub const CLUSTER: u64 = 64 << 10;
/// Longest name of a backing file that fits the format.
pub const BACKING_MAX: usize = 1023;

/// First bytes of a file.
pub const MAGIC: u32 = u32::from_be_bytes(*b"QFI\xfb");
const HEADER_BYTES: u32 = 104;
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// This cluster is used once: reads need not ask the reference counts.
const COPIED: u64 = 1 << 63;
/// Entries of an L2 table and of a block of 16-bit reference counts.
const L2_ENTRIES: u64 = CLUSTER / 8;
const REFCOUNTS: u64 = CLUSTER / 2;

/// Where everything lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    size: u64,
    l1_entries: u64,
    l1_at: u64,
    /// Numbers of the L2 tables that there are, ascending.
    l2: Vec<u64>,
    l2_at: u64,
    refcount_table_at: u64,
    refcount_table_clusters: u64,
    refcount_blocks: u64,
    /// First byte of data.
    pub data_at: u64,
    /// Bytes of the file.
    pub file_bytes: u64,
}

impl Layout {
    /// For a disk of `size` bytes of which the clusters `clusters` (ascending) have data.
    pub fn new(size: u64, clusters: &[u64]) -> Self {
        let l1_entries = size.div_ceil(CLUSTER).div_ceil(L2_ENTRIES).max(1);
        let mut l2: Vec<u64> = clusters.iter().map(|cluster| cluster / L2_ENTRIES).collect();
        l2.dedup();
        let l1_clusters = (l1_entries * 8).div_ceil(CLUSTER);
        let fixed = 1 + l1_clusters + l2.len() as u64 + clusters.len() as u64;
        // The counts count their own clusters too.
        let (mut table, mut blocks) = (1, 1);
        loop {
            let all = fixed + table + blocks;
            let wanted = (all.div_ceil(REFCOUNTS), (all.div_ceil(REFCOUNTS) * 8).div_ceil(CLUSTER));
            if (blocks, table) == wanted {
                break;
            }
            (blocks, table) = wanted;
        }
        let l1_at = CLUSTER;
        let l2_at = l1_at + l1_clusters * CLUSTER;
        let refcount_table_at = l2_at + l2.len() as u64 * CLUSTER;
        let data_at = refcount_table_at + (table + blocks) * CLUSTER;
        Self {
            size,
            l1_entries,
            l1_at,
            l2,
            l2_at,
            refcount_table_at,
            refcount_table_clusters: table,
            refcount_blocks: blocks,
            data_at,
            file_bytes: data_at + clusters.len() as u64 * CLUSTER,
        }
    }

    /// Writes everything that is no data; `write` puts bytes at an offset. `backing`: the name of a raw file that has what is not here.
    pub fn write(
        &self,
        clusters: &[u64],
        backing: Option<&str>,
        mut write: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        write(0, &self.header(backing))?;
        let l1: Vec<u8> = (0..self.l1_entries)
            .flat_map(|number| {
                let place = self.l2.binary_search(&number).ok();
                place.map_or(0, |at| COPIED | (self.l2_at + at as u64 * CLUSTER)).to_be_bytes()
            })
            .collect();
        write(self.l1_at, &l1)?;
        let mut next = 0;
        for (at, number) in self.l2.iter().enumerate() {
            let mut table = vec![0; CLUSTER as usize];
            while let Some(cluster) = clusters.get(next).filter(|cluster| *cluster / L2_ENTRIES == *number) {
                let entry = COPIED | (self.data_at + next as u64 * CLUSTER);
                let slot = (cluster % L2_ENTRIES) as usize * 8;
                table[slot..slot + 8].copy_from_slice(&entry.to_be_bytes());
                next += 1;
            }
            write(self.l2_at + at as u64 * CLUSTER, &table)?;
        }
        let blocks_at = self.refcount_table_at + self.refcount_table_clusters * CLUSTER;
        let table: Vec<u8> =
            (0..self.refcount_blocks).flat_map(|block| (blocks_at + block * CLUSTER).to_be_bytes()).collect();
        write(self.refcount_table_at, &table)?;
        let used = self.file_bytes / CLUSTER;
        for block in 0..self.refcount_blocks {
            let count = used.saturating_sub(block * REFCOUNTS).min(REFCOUNTS);
            let counts: Vec<u8> = std::iter::repeat_n(1u16.to_be_bytes(), count as usize).flatten().collect();
            write(blocks_at + block * CLUSTER, &counts)?;
        }
        Ok(())
    }

    fn header(&self, backing: Option<&str>) -> Vec<u8> {
        let mut extensions = Vec::new();
        if backing.is_some() {
            extensions.extend(BACKING_FORMAT.to_be_bytes());
            extensions.extend(3u32.to_be_bytes());
            extensions.extend(b"raw\0\0\0\0\0");
        }
        extensions.extend([0; 8]);
        let backing_at = if backing.is_some() { u64::from(HEADER_BYTES) + extensions.len() as u64 } else { 0 };
        let mut bytes = Vec::new();
        bytes.extend(MAGIC.to_be_bytes());
        bytes.extend(3u32.to_be_bytes());
        bytes.extend(backing_at.to_be_bytes());
        bytes.extend((backing.map_or(0, str::len) as u32).to_be_bytes());
        bytes.extend(CLUSTER.trailing_zeros().to_be_bytes());
        bytes.extend(self.size.to_be_bytes());
        bytes.extend(0u32.to_be_bytes()); // no encryption
        bytes.extend((self.l1_entries as u32).to_be_bytes());
        bytes.extend(self.l1_at.to_be_bytes());
        bytes.extend(self.refcount_table_at.to_be_bytes());
        bytes.extend((self.refcount_table_clusters as u32).to_be_bytes());
        bytes.extend([0; 12]); // no snapshots
        bytes.extend([0; 24]); // no features
        bytes.extend(4u32.to_be_bytes()); // counts of 16 bits
        bytes.extend(HEADER_BYTES.to_be_bytes());
        bytes.extend(extensions);
        bytes.extend(backing.unwrap_or_default().as_bytes());
        bytes
    }
}

/// The clusters that extents touch, ascending, each once.
pub fn clusters_of(extents: &[(u64, u64)]) -> Vec<u64> {
    let mut clusters: Vec<u64> = Vec::new();
    for (offset, len) in extents {
        let first = (offset / CLUSTER).max(clusters.last().map_or(0, |last| last + 1));
        clusters.extend(first..(offset + len).div_ceil(CLUSTER));
    }
    clusters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_are_those_that_extents_touch() {
        assert!(clusters_of(&[]).is_empty());
        assert_eq!(clusters_of(&[(0, 1), (4096, 4096), (CLUSTER - 1, 2)]), [0, 1]);
        assert_eq!(clusters_of(&[(CLUSTER * 5, CLUSTER * 2), (CLUSTER * 9 + 7, 1)]), [5, 6, 9]);
    }

    #[test]
    fn everything_has_its_place_and_its_count() {
        for (size, clusters) in [
            (1u64 << 20, vec![]),
            (1 << 20, vec![0, 15]),
            (1 << 40, vec![0, 8191, 8192, (1 << 24) - 1]),
            (64 << 30, (0..100_000).collect::<Vec<_>>()),
        ] {
            let layout = Layout::new(size, &clusters);
            let (mut end, mut counts) = (0, 0);
            let write = |at: u64, bytes: &[u8]| {
                assert!(at.is_multiple_of(CLUSTER) && at >= end, "{at} after {end}");
                end = at + bytes.len() as u64;
                if at > layout.refcount_table_at {
                    counts += bytes.chunks(2).filter(|count| *count == [0, 1]).count() as u64;
                }
                Ok(())
            };
            layout.write(&clusters, Some("base.img"), write).expect("writes");
            assert!(end <= layout.data_at);
            assert_eq!(counts, layout.file_bytes / CLUSTER, "each cluster of the file is used once");
        }
    }
}
