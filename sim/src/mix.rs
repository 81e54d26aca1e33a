//! Keyed hashing: entities, fixed-seed maps.

use std::hash::{BuildHasherDefault, Hasher};

const K1: u64 = 0x9e37_79b9_7f4a_7c15;
const K2: u64 = 0xd6e8_feb8_6659_fd93;

/// Mixes one word well enough that every output bit depends on every input bit (two multiplications).
#[inline]
pub const fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 32)).wrapping_mul(K2);
    let x = (x ^ (x >> 29)).wrapping_mul(K1);
    x ^ (x >> 32)
}

/// Mixes two words into one.
#[inline]
pub const fn mix2(a: u64, b: u64) -> u64 {
    mix(a.rotate_left(23) ^ b.wrapping_mul(K1))
}

/// A hash of a name, usable in constants.
pub const fn text_hash(text: &str) -> u64 {
    let bytes = text.as_bytes();
    let mut h = 0xcbf2_9ce4_8422_2325_u64;
    let mut i = 0;
    while i < bytes.len() {
        h = (h ^ bytes[i] as u64).wrapping_mul(0x100_0000_01b3);
        i += 1;
    }
    mix(h)
}

/// What a decision is about: a guest, a task, an I/O. Derived from its parent, so that it stays the same when other
/// work is added or removed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Entity(pub u64);

impl Entity {
    /// The world itself.
    pub const WORLD: Entity = Entity(0);

    /// The part of `self` in `role`, distinguished by `key`.
    #[inline]
    pub const fn child(self, role: &str, key: u64) -> Self {
        Self(mix2(mix2(self.0, text_hash(role)), key))
    }

    /// As [`Entity::child`], with the role's hash at hand.
    #[inline]
    pub(crate) const fn child_hashed(self, role: u64, key: u64) -> Self {
        Self(mix2(mix2(self.0, role), key))
    }
}

/// A hasher for keys that are already mixed, or small integers.
#[derive(Default, Clone, Copy)]
pub struct MixHasher(u64);

impl Hasher for MixHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }
    fn write_u64(&mut self, x: u64) {
        self.0 = mix2(self.0, x);
    }
    fn write_u32(&mut self, x: u32) {
        self.write_u64(u64::from(x));
    }
    fn write_usize(&mut self, x: usize) {
        self.write_u64(x as u64);
    }
}

/// A hash map whose order is the same in every process. For look-ups only; sort the results of an iteration.
#[expect(clippy::disallowed_types, reason = "the hasher is fixed here, which is what the ban asks for")]
pub type FixedMap<K, V> = std::collections::HashMap<K, V, BuildHasherDefault<MixHasher>>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_frozen() {
        // Decision files hold these: a change here orphans every stored run.
        assert_eq!(mix(1), 0x4339_7d8f_89a4_131f, "{:#x}", mix(1));
        assert_eq!(
            Entity::WORLD.child("guest", 1).0,
            0x0e8c_88e0_2464_d06c,
            "{:#x}",
            Entity::WORLD.child("guest", 1).0
        );
    }
}
