//! What is read from buckets and from VMMs: manifests, frames, heads, the collector's objects.

use serde_json::Value;
use stasis_snapshot::commit::{Attempt, Head};
use stasis_snapshot::gc::{Memory, lease};
use stasis_snapshot::ids::Digest;
use stasis_snapshot::layout::Place;
use stasis_snapshot::manifest::{HEADER_LEN, Header, Manifest};
use stasis_snapshot::pack::{self, Codec, FRAME_PAGES, FrameEntry};
use stasis_snapshot::page::PAGE_SIZE;
use stasis_snapshot::seal::{self, DataKey, DataKeyId, OperatorKey, SealedState, Seals, WrappedKey};

use super::alloc::peak_of;

/// Bytes that a frame may allocate beyond its stored bytes: the largest one decoded, and a codec's working memory.
const FRAME_BOUND: usize = FRAME_PAGES as usize * PAGE_SIZE + (64 << 10);
/// Bytes of an entry of the section table, and where in it the section's place, length and digest are.
const ENTRY: usize = 56;

fn u64_at(bytes: &[u8], at: usize) -> Option<usize> {
    let number = u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?);
    usize::try_from(number).ok()
}

/// The same manifest with every digest and length right again, so that a mutation reaches what lies behind them.
fn reseal(input: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = input.to_vec();
    let len = bytes.len() as u64;
    bytes.get_mut(16..24)?.copy_from_slice(&len.to_le_bytes());
    let sections = u32::from_le_bytes(bytes.get(12..16)?.try_into().ok()?) as usize;
    let table_end = HEADER_LEN + sections.checked_mul(ENTRY)?;
    let mut offset = table_end;
    for entry in (HEADER_LEN..table_end).step_by(ENTRY) {
        let last = entry + ENTRY == table_end;
        let claimed = u64_at(&bytes, entry + 16)?;
        // The last section takes what is left, so that inserted and removed bytes do not end the story.
        let section_len = if last { bytes.len().checked_sub(offset)? } else { claimed };
        let digest = Digest::of(bytes.get(offset..offset.checked_add(section_len)?)?);
        let fields = bytes.get_mut(entry..entry + ENTRY)?;
        fields[8..16].copy_from_slice(&(offset as u64).to_le_bytes());
        fields[16..24].copy_from_slice(&(section_len as u64).to_le_bytes());
        fields[24..].copy_from_slice(&digest.0);
        offset += section_len;
    }
    let table = Digest::of(bytes.get(HEADER_LEN..table_end)?);
    bytes.get_mut(24..56)?.copy_from_slice(&table.0);
    let check = Digest::of(&bytes[..56]);
    bytes.get_mut(56..64)?.copy_from_slice(&check.0[..8]);
    Some(bytes)
}

/// A manifest decodes within its bound or is refused; what is accepted encodes to what decodes to the same.
pub fn manifest(input: &[u8]) {
    let sealed = reseal(input);
    for bytes in [Some(input), sealed.as_deref()].into_iter().flatten() {
        let _ = Header::read(bytes);
        let (decoded, peak) = peak_of(|| Manifest::decode(bytes));
        let bound = Manifest::decode_bound(bytes.len());
        assert!(peak <= bound, "{peak} bytes for {} of input, at most {bound}", bytes.len());
        if let Ok(mut manifest) = decoded {
            let again = manifest.encode().expect("what was decoded encodes");
            manifest.prune();
            assert_eq!(Manifest::decode(&again).as_ref(), Ok(&manifest));
        }
    }
}

/// What is sealed: no bytes open that were not sealed, and what was sealed opens to what it was, whatever it is.
pub fn seal(input: &[u8]) {
    let seals = Seals::new(OperatorKey::new(&[3; 32]), Vec::new(), false);
    let place = "v1/t/sandbox/s/1-1-01010101010101010101010101010101/manifest";
    assert!(seals.open_manifest(place, input).is_err());
    assert!(seals.open_head(place, input).is_err());
    assert!(seals.open_bytes("purpose", place, input).is_err());
    let _ = seal::manifest_sealed_under(input);
    let _ = seal::head_sealed_under(input);
    let wrapped: Vec<WrappedKey> = serde_json::from_slice(input).ok().into_iter().collect();
    assert!(wrapped.iter().all(|wrapped| seals.unwrap(wrapped).is_err()));
    if let Ok(key) = serde_json::from_slice::<DataKey>(input) {
        let again = serde_json::to_vec(&key).expect("a key can be written");
        assert_eq!(serde_json::from_slice::<DataKey>(&again).ok(), Some(key));
    }
    let object = seals.seal_manifest(place, input.to_vec(), &wrapped).expect("a short text");
    let opened = seals.open_manifest(place, &object).expect("what was sealed opens");
    assert_eq!((opened.manifest, &opened.keys), (input, &wrapped));
    let _ = Manifest::decode(&object);
    let object = seals.seal_head(place, input);
    assert_eq!(seals.open_head(place, &object), Ok(input));
    let _ = Head::decode(&object);
    let key = DataKey::new(DataKeyId([4; 16]), &[5; 32]);
    let sealed = key.seal_state([6; 32], input.to_vec());
    assert_eq!(key.open_state(&sealed).as_deref(), Ok(input));
    let forged = SealedState { bytes: input.to_vec(), ..sealed };
    assert!(key.open_state(&forged).is_err());
}

/// A frame decodes to its pages within its bound or is refused. Input: codec, pages (two bytes), stored bytes; and the same as a whole pack.
pub fn frame(input: &[u8]) {
    let _ = pack::check_header(input);
    let Some((&[codec, low, high], stored)) = input.split_first_chunk() else { return };
    let entry = FrameEntry {
        offset: 0,
        stored_len: stored.len() as u32,
        pages: u16::from_le_bytes([low, high]).into(),
        codec: [Codec::Raw, Codec::Lz4, Codec::Zstd][usize::from(codec) % 3],
        digest: Digest::of(stored),
    };
    let (decoded, peak) = peak_of(|| pack::decode_frame(&entry, 0, stored, None));
    let bound = FRAME_BOUND + stored.len();
    assert!(peak <= bound, "{peak} bytes, at most {bound}");
    if let Ok(pages) = decoded {
        assert_eq!(pages.len(), entry.pages as usize * PAGE_SIZE);
    }
}

/// Takes fractions out: serde_json reads them fast rather than to the last digit. Records hold none.
fn round(value: &mut Value) {
    match value {
        Value::Number(number) if number.is_f64() => *value = Value::Null,
        Value::Array(items) => items.iter_mut().for_each(round),
        Value::Object(fields) => fields.values_mut().for_each(round),
        _ => {}
    }
}

/// A head decodes within its bound or is refused; what is accepted encodes to what decodes to the same. So do the other JSON objects of a bucket,
/// and keys are read without a panic.
pub fn head(input: &[u8]) {
    let (decoded, peak) = peak_of(|| Head::decode(input));
    let bound = Head::decode_bound(input.len());
    assert!(peak <= bound, "{peak} bytes for {} of input, at most {bound}", input.len());
    if let Ok(head) = decoded {
        // One that grew past the limit by being printed is refused, by name.
        if let Ok(again) = head.encode() {
            let mut again = Head::decode(again.as_bytes()).expect("what was encoded decodes");
            let mut head = head;
            [&mut again.record, &mut head.record].into_iter().for_each(round);
            assert_eq!(again, head);
        }
    }
    let _ = serde_json::from_slice::<Attempt>(input);
    let _ = lease::Body::decode(input);
    if let Ok(memory) = Memory::decode(input) {
        let again = memory.encode().expect("what was decoded encodes");
        assert_eq!(Memory::decode(&again).expect("what was encoded decodes"), memory);
    }
    if let Ok(key) = std::str::from_utf8(input)
        && let Some(place) = Place::of(key)
    {
        assert!(key.starts_with(place.owner));
    }
}
