//! Our own persisted twins of kernel structs.
//!
//! A snapshot never holds a kernel struct as some crate happens to lay it out: every field is named here, so that its bytes are ours to
//! version. [`mirror!`] writes the twin and both conversions; padding and reserved fields are left out and restored as zero.

/// Declares a persisted struct and its conversions from and to the kernel's struct of the same fields.
macro_rules! mirror {
    ($(#[$meta:meta])* $name:ident = $kernel:ty { $($field:ident: $type:ty),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        pub(crate) struct $name { $(pub(crate) $field: $type),* }

        impl From<&$kernel> for $name {
            fn from(k: &$kernel) -> Self {
                Self { $($field: crate::mirror::Mirrored::of(&k.$field)),* }
            }
        }

        impl From<&$name> for $kernel {
            fn from(s: &$name) -> Self {
                let mut k = <$kernel>::default();
                $(crate::mirror::Mirrored::put(&s.$field, &mut k.$field);)*
                k
            }
        }

        impl crate::mirror::Mirrored<$kernel> for $name {
            fn of(k: &$kernel) -> Self { Self::from(k) }
            fn put(&self, k: &mut $kernel) { *k = <$kernel>::from(self); }
        }
    };
}
pub(crate) use mirror;

/// How one field moves between the two sides.
pub(crate) trait Mirrored<K> {
    fn of(kernel: &K) -> Self;
    fn put(&self, kernel: &mut K);
}

macro_rules! plain {
    ($($type:ty),*) => { $(
        impl Mirrored<$type> for $type {
            fn of(k: &$type) -> Self { *k }
            fn put(&self, k: &mut $type) { *k = *self; }
        }
    )* };
}
plain!(u8, u16, u32, u64, i64);

impl<K: Default, S: Mirrored<K> + Default, const N: usize> Mirrored<[K; N]> for [S; N] {
    fn of(k: &[K; N]) -> Self {
        std::array::from_fn(|i| S::of(&k[i]))
    }
    fn put(&self, k: &mut [K; N]) {
        for (from, to) in self.iter().zip(k) {
            from.put(to);
        }
    }
}
