//! The header in front of every frame (virtio 1.2 §5.1.6), and what of it is believed.
//!
//! The header of a frame from the guest goes to the host's kernel with the frame. So it is checked first against what was negotiated and
//! against the frame's length; a frame whose header does not hold is dropped, as a switch drops a damaged one.

use virtio_bindings::virtio_net as b;

/// Size of a header, bytes.
pub(super) const HEADER_BYTES: usize = 12;
/// Ethernet header.
const ETHERNET_BYTES: u64 = 14;
/// Ethernet header with a VLAN tag.
pub(super) const ETHERNET_TAGGED_BYTES: u64 = 18;
/// Longest frame: an IPv4 packet of any length that its header can say.
pub(super) const MAX_FRAME: u64 = 65_535 + ETHERNET_TAGGED_BYTES;
/// Shortest segments that a frame may be cut into, bytes: the least that Linux sends. Shorter ones would make the host's kernel cut one
/// frame into tens of thousands.
const MIN_SEGMENT: u16 = 48;
/// Bytes of a TCP or UDP checksum.
const CHECKSUM_BYTES: u64 = 2;

/// A decoded header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) flags: u8,
    pub(super) gso_type: u8,
    /// Length of all headers of a frame to be segmented, bytes: a hint.
    pub(super) hdr_len: u16,
    /// Payload of each segment, bytes.
    pub(super) gso_size: u16,
    /// Where the checksum begins to count, from the start of the frame.
    pub(super) csum_start: u16,
    /// Where the checksum goes, from `csum_start`.
    pub(super) csum_offset: u16,
    /// Chains that the frame fills; receiving only.
    pub(super) num_buffers: u16,
}

impl Header {
    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
            num_buffers: word(10),
        }
    }

    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset, self.num_buffers];
        for (to, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// How many packets the frame, of `len` bytes, is on the wire.
    pub(super) fn segments(&self, len: u64) -> u64 {
        if u32::from(self.gso_type) == b::VIRTIO_NET_HDR_GSO_NONE {
            1
        } else {
            len.div_ceil(u64::from(self.gso_size).max(1)).max(1)
        }
    }
}

/// What the driver may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Offloads {
    /// VIRTIO_NET_F_CSUM.
    pub(super) checksum: bool,
    /// VIRTIO_NET_F_HOST_TSO4.
    pub(super) tso4: bool,
    /// Largest packet without segmentation, bytes.
    pub(super) mtu: u16,
}

/// Why a frame of the guest was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refused {
    #[error("a frame of {0} bytes")]
    Length(u64),
    #[error("an offload that was not negotiated")]
    NotNegotiated,
    #[error("a checksum outside the frame")]
    Checksum,
    #[error("a segmentation that makes no sense")]
    Segmentation,
}

/// Checks the header of a frame of `len` bytes from the guest, and answers the header that the host is given.
pub(super) fn check(header: &Header, len: u64, offloads: Offloads) -> Result<Header, Refused> {
    let needs_checksum = u32::from(header.flags) & b::VIRTIO_NET_HDR_F_NEEDS_CSUM != 0;
    let segmented = u32::from(header.gso_type) != b::VIRTIO_NET_HDR_GSO_NONE;
    let longest = if segmented { MAX_FRAME } else { u64::from(offloads.mtu) + ETHERNET_TAGGED_BYTES };
    if !(ETHERNET_BYTES..=longest).contains(&len) {
        return Err(Refused::Length(len));
    }
    // Flags that a driver has no business with, and what is of use only to a receiver, do not travel on.
    let mut passed = Header::default();
    if needs_checksum {
        if !offloads.checksum {
            return Err(Refused::NotNegotiated);
        }
        let end = u64::from(header.csum_start) + u64::from(header.csum_offset) + CHECKSUM_BYTES;
        if end > len || u64::from(header.csum_start) < ETHERNET_BYTES {
            return Err(Refused::Checksum);
        }
        passed.flags = b::VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
        passed.csum_start = header.csum_start;
        passed.csum_offset = header.csum_offset;
    }
    if segmented {
        // IPv6, UDP and ECN are not offered.
        if !offloads.tso4 || u32::from(header.gso_type) != b::VIRTIO_NET_HDR_GSO_TCPV4 {
            return Err(Refused::NotNegotiated);
        }
        let headers = u64::from(header.hdr_len);
        if !needs_checksum || !(MIN_SEGMENT..=offloads.mtu).contains(&header.gso_size) || headers > len {
            return Err(Refused::Segmentation);
        }
        passed.gso_type = header.gso_type;
        passed.gso_size = header.gso_size;
        passed.hdr_len = header.hdr_len;
    }
    Ok(passed)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: Offloads = Offloads { checksum: true, tso4: true, mtu: 1500 };

    fn tso() -> Header {
        Header {
            flags: 1,
            gso_type: 1,
            hdr_len: 54,
            gso_size: 1460,
            csum_start: 34,
            csum_offset: 16,
            ..Header::default()
        }
    }

    #[test]
    fn what_linux_sends_passes_unchanged() {
        assert_eq!(check(&tso(), 65_000, ALL), Ok(tso()));
        let checksum = Header { flags: 1, csum_start: 34, csum_offset: 6, ..Header::default() };
        assert_eq!(check(&checksum, 60, ALL), Ok(checksum));
        assert_eq!(
            check(&Header::default(), 42, Offloads { checksum: false, tso4: false, mtu: 1500 }).map(drop),
            Ok(())
        );
    }

    #[test]
    fn what_was_not_negotiated_or_does_not_fit_is_refused() {
        let no_tso = Offloads { tso4: false, ..ALL };
        let nothing = Offloads { checksum: false, ..no_tso };
        let cases = [
            (Header::default(), 13, ALL, Refused::Length(13)),
            (Header::default(), 1519, ALL, Refused::Length(1519)),
            (tso(), MAX_FRAME + 1, ALL, Refused::Length(MAX_FRAME + 1)),
            (tso(), 3000, no_tso, Refused::NotNegotiated),
            (Header { gso_type: 4, ..tso() }, 3000, ALL, Refused::NotNegotiated),
            (Header { gso_type: 3, ..tso() }, 3000, ALL, Refused::NotNegotiated),
            (Header { gso_type: 0x81, ..tso() }, 3000, ALL, Refused::NotNegotiated),
            (Header { flags: 1, csum_start: 34, ..Header::default() }, 60, nothing, Refused::NotNegotiated),
            (Header { flags: 0, ..tso() }, 3000, ALL, Refused::Segmentation),
            (Header { gso_size: 0, ..tso() }, 3000, ALL, Refused::Segmentation),
            (Header { gso_size: 1, ..tso() }, 3000, ALL, Refused::Segmentation),
            (Header { gso_size: 1501, ..tso() }, 3000, ALL, Refused::Segmentation),
            (Header { hdr_len: 3001, ..tso() }, 3000, ALL, Refused::Segmentation),
            (Header { csum_start: 2985, ..tso() }, 3000, ALL, Refused::Checksum),
            (Header { csum_start: 0, ..tso() }, 3000, ALL, Refused::Checksum),
            (Header { csum_start: u16::MAX, csum_offset: u16::MAX, ..tso() }, 3000, ALL, Refused::Checksum),
        ];
        for (header, len, offloads, why) in cases {
            assert_eq!(check(&header, len, offloads), Err(why), "{header:?}");
        }
    }

    proptest! {
        #[test]
        fn what_passes_holds_for_the_frame(bytes in any::<[u8; HEADER_BYTES]>(), len in 0_u64..70_000) {
            let header = Header::decode(&bytes);
            prop_assert_eq!(header.encode(), bytes);
            if let Ok(passed) = check(&header, len, ALL) {
                prop_assert!((14..=MAX_FRAME).contains(&len));
                prop_assert!(u64::from(passed.hdr_len) <= len && passed.num_buffers == 0);
                prop_assert!(passed.segments(len) <= 1366);
                if passed.flags != 0 {
                    prop_assert!(u64::from(passed.csum_start) + u64::from(passed.csum_offset) + 2 <= len);
                } else {
                    prop_assert_eq!(passed, Header::default());
                }
            }
        }
    }
}
