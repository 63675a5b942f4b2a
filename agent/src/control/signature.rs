//! What a disk holds before it becomes a CDP disk, so that nobody's data is overwritten by a slip of the finger.

use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use cdp_journal::format::{SUPERBLOCK_A, SUPERBLOCK_B, Superblock};

/// How much of the beginning, and of the end, has to be zeroes where no kind of content is known.
const EDGE_BYTES: u64 = 1 << 20;
/// What else there may be.
const UNKNOWN: &str = "data of a kind that is not known";

/// Where each kind of content shows itself.
const SIGNATURES: &[(u64, &[u8], &str)] = &[
    // Either of the two makes it one: a start takes the other.
    (SUPERBLOCK_A, &Superblock::MAGIC, "a CDP disk"),
    (SUPERBLOCK_B, &Superblock::MAGIC, "a CDP disk"),
    (0, b"XFSB", "an XFS file system"),
    (1080, b"\x53\xef", "an ext2, ext3 or ext4 file system"),
    (65600, b"_BHRfS_M", "a btrfs file system"),
    (3, b"NTFS    ", "an NTFS file system"),
    (0, b"LUKS\xba\xbe", "a LUKS volume"),
    (512, b"LABELONE", "an LVM physical volume"),
    (0, b"QFI\xfb", "a qcow2 image"),
    (4096, b"\xfc\x4e\x2b\xa9", "a member of an md array"),
    (4086, b"SWAPSPACE2", "swap space"),
    (512, b"EFI PART", "a GPT partition table"),
    (4096, b"EFI PART", "a GPT partition table"),
    (510, b"\x55\xaa", "a partition table or a FAT file system"),
];

/// Names what is there; `None`: nothing, as far as both ends of the disk tell. (ZFS, MD, RAID controllers and others keep what tells of them at the end.)
pub fn find(path: &Path) -> io::Result<Option<&'static str>> {
    let mut file = File::open(path)?;
    for (offset, magic, name) in SIGNATURES {
        let mut found = vec![0; magic.len()];
        match file.read_exact_at(&mut found, *offset) {
            Ok(()) if found == *magic => return Ok(Some(name)),
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(error) => return Err(error),
        }
    }
    let size = file.seek(SeekFrom::End(0))?;
    let mut edge = vec![0; size.min(EDGE_BYTES) as usize];
    for offset in [0, size.saturating_sub(EDGE_BYTES)] {
        file.read_exact_at(&mut edge, offset)?;
        if edge.iter().any(|byte| *byte != 0) {
            return Ok(Some(UNKNOWN));
        }
    }
    Ok(None)
}

/// Bytes of a file or block device.
pub fn size(path: &Path) -> io::Result<u64> {
    File::open(path)?.seek(SeekFrom::End(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_signature_is_found_where_it_stands_and_other_content_at_both_ends() {
        let temp = tempfile::tempdir().expect("temporary directory");
        let path = temp.path().join("disk");
        for (offset, magic, name) in SIGNATURES {
            let file = File::create(&path).expect("create");
            file.set_len(1 << 20).expect("grow");
            assert_eq!(find(&path).expect("readable"), None);
            file.write_all_at(magic, *offset).expect("write");
            assert_eq!(find(&path).expect("readable"), Some(*name));
        }
        let (len, edge) = (8 << 20, EDGE_BYTES);
        for (offset, found) in [(0, true), (edge - 1, true), (edge, false), (len - edge - 1, false), (len - edge, true)]
        {
            let file = File::create(&path).expect("create");
            file.set_len(len).expect("grow");
            file.write_all_at(&[1], offset).expect("write");
            assert_eq!(find(&path).expect("readable"), found.then_some(UNKNOWN), "a byte at {offset}");
        }
        File::create(&path).expect("an empty file");
        assert_eq!((find(&path).expect("readable"), size(&path).expect("readable")), (None, 0));
    }
}
