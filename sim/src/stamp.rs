//! What the workload writes: each 512-byte sector says which operation wrote it and where it belongs, so that a read can be
//! judged sector by sector.

use crate::rng::mix;

/// Bytes of a sector.
pub const SECTOR: usize = 512;
const MAGIC: u64 = 0x5EC7_0A11_0000_0000;

/// What a sector holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// Zeroes.
    Zero,
    /// What operation `op` wrote there (0: what was there in the beginning).
    Stamp(u32),
    /// Anything else, in words.
    Other(String),
}

/// Fills one sector with the stamp of `op`.
pub fn fill(volume: u32, op: u32, sector: u64, out: &mut [u8]) {
    let place = sector | u64::from(volume) << 40;
    let seed = mix(u64::from(op) << 32 ^ place);
    for (i, word) in out.chunks_exact_mut(8).enumerate() {
        let value = match i {
            0 => MAGIC | u64::from(op),
            1 => place,
            _ => seed.wrapping_mul(2 * i as u64 + 1),
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// Fills all of `out` with the stamps of `op`, from `sector` on.
pub fn fill_all(volume: u32, op: u32, sector: u64, out: &mut [u8]) {
    for (i, chunk) in out.chunks_exact_mut(SECTOR).enumerate() {
        fill(volume, op, sector + i as u64, chunk);
    }
}

/// Reads one sector's stamp.
pub fn decode(volume: u32, sector: u64, bytes: &[u8]) -> Value {
    let word = |i: usize| u64::from_le_bytes(bytes[i * 8..i * 8 + 8].try_into().expect("8 bytes"));
    let first = word(0);
    if first == 0 && bytes.iter().all(|byte| *byte == 0) {
        return Value::Zero;
    }
    if first >> 32 != MAGIC >> 32 {
        return Value::Other(format!("garbage starting {:02x?}", &bytes[..16]));
    }
    let op = first as u32;
    let mut want = [0; SECTOR];
    fill(volume, op, sector, &mut want);
    if bytes == want {
        return Value::Stamp(op);
    }
    let place = word(1);
    fill((place >> 40) as u32, op, place & ((1 << 40) - 1), &mut want);
    if bytes == want {
        let (volume, sector) = (place >> 40, place & ((1 << 40) - 1));
        return Value::Other(format!("what op {op} wrote to sector {sector} of volume {volume}"));
    }
    Value::Other(format!("a torn sector that begins as op {op}'s"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_is_read_back_and_anything_else_is_told_apart() {
        let mut sector = [0; SECTOR];
        assert_eq!(decode(1, 5, &sector), Value::Zero);
        fill(1, 9, 5, &mut sector);
        assert_eq!(decode(1, 5, &sector), Value::Stamp(9));
        assert!(matches!(decode(1, 6, &sector), Value::Other(text) if text.contains("op 9 wrote to sector 5")));
        assert!(matches!(decode(2, 5, &sector), Value::Other(_)));
        sector[300] ^= 1;
        assert!(matches!(decode(1, 5, &sector), Value::Other(text) if text.contains("torn")));
    }
}
