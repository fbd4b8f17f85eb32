use super::*;
use proptest::prelude::*;
use std::io::Write;

fn file_with(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| seed.wrapping_add((i / 7) as u8) | 1).collect()
}

fn read_all(disk: &Overlay) -> Vec<u8> {
    let mut content = vec![0; disk.size() as usize];
    disk.read_at(0, &mut content).unwrap();
    content
}

#[test]
fn reads_fall_through_to_the_base_and_are_zero_past_its_end() {
    let base = pattern(1, 5000);
    let disk = Overlay::new(Some(file_with(&base)), tempfile::tempfile().unwrap(), 4 * BLOCK_BYTES).unwrap();
    let mut expected = base;
    expected.resize(4 * BLOCK, 0);
    assert_eq!(read_all(&disk), expected);
    assert!(disk.present().is_empty() && disk.dirty().is_empty());
}

#[test]
fn a_partial_write_keeps_the_rest_of_the_block_from_the_base() {
    let base = pattern(1, 3 * BLOCK);
    let disk = Overlay::new(Some(file_with(&base)), tempfile::tempfile().unwrap(), 3 * BLOCK_BYTES).unwrap();
    disk.write_at(BLOCK_BYTES - 512, &[9; 1024]).unwrap();
    let mut expected = base;
    expected[BLOCK - 512..BLOCK + 512].fill(9);
    assert_eq!(read_all(&disk), expected);
    assert_eq!(disk.present(), vec![0..2]);
    assert_eq!(disk.dirty(), vec![0..2]);
}

#[test]
fn the_dirty_set_is_taken_and_merged_back() {
    let disk = Overlay::new(None, tempfile::tempfile().unwrap(), 16 * BLOCK_BYTES).unwrap();
    disk.write_at(3 * BLOCK_BYTES, &[1; 2 * BLOCK]).unwrap();
    disk.zero_at(8 * BLOCK_BYTES, BLOCK_BYTES).unwrap();
    let taken = disk.take_dirty();
    assert_eq!(taken, vec![3..5, 8..9]);
    assert!(disk.dirty().is_empty());
    disk.write_at(5 * BLOCK_BYTES, &[1; 512]).unwrap();
    disk.merge_dirty(&taken);
    assert_eq!(disk.dirty(), vec![3..6, 8..9]);
    assert_eq!(disk.dirty_count(), 4);
    // A range from an untrusted place does no harm.
    disk.merge_dirty(&[15..u64::MAX, 7..7]);
    assert_eq!(disk.dirty(), vec![3..6, 8..9, 15..16]);
}

#[test]
fn restored_blocks_are_present_and_clean() {
    let base = pattern(1, 8 * BLOCK);
    let disk = Overlay::new(Some(file_with(&base)), tempfile::tempfile().unwrap(), 8 * BLOCK_BYTES).unwrap();
    disk.restore_block(2, &pattern(5, 2 * BLOCK)).unwrap();
    disk.restore_zero(6..8).unwrap();
    assert_eq!(disk.present(), vec![2..4, 6..8]);
    assert!(disk.dirty().is_empty());
    let mut expected = base;
    expected[2 * BLOCK..4 * BLOCK].copy_from_slice(&pattern(5, 2 * BLOCK));
    expected[6 * BLOCK..].fill(0);
    assert_eq!(read_all(&disk), expected);
}

#[test]
fn the_last_block_may_be_partial() {
    let disk = Overlay::new(None, tempfile::tempfile().unwrap(), BLOCK_BYTES + 512).unwrap();
    disk.write_at(BLOCK_BYTES, &[7; 512]).unwrap();
    assert!(matches!(disk.write_at(BLOCK_BYTES, &[7; 513]), Err(OverlayError::OutOfRange { .. })));
    let mut block = [1; BLOCK];
    disk.read_blocks(1, &mut block).unwrap();
    assert!(block[..512].iter().all(|&byte| byte == 7) && block[512..].iter().all(|&byte| byte == 0));
}

#[test]
fn zeroing_frees_the_room_of_present_blocks() {
    use std::os::unix::fs::MetadataExt;
    let file = tempfile::tempfile().unwrap();
    let probe = file.try_clone().unwrap();
    let disk = Overlay::new(None, file, 64 * BLOCK_BYTES).unwrap();
    disk.write_at(0, &vec![1; 64 * BLOCK]).unwrap();
    disk.flush().unwrap();
    let full = probe.metadata().unwrap().blocks();
    disk.zero_at(0, 64 * BLOCK_BYTES).unwrap();
    assert_eq!(read_all(&disk), vec![0; 64 * BLOCK]);
    if disk.lock().punch {
        assert!(probe.metadata().unwrap().blocks() < full);
    }
}

#[test]
fn zeroes_are_right_without_holes_and_after_a_failed_write() {
    let disk = Overlay::new(None, tempfile::tempfile().unwrap(), 40 * BLOCK_BYTES).unwrap();
    disk.lock().punch = false;
    disk.write_at(0, &vec![1; 40 * BLOCK]).unwrap();
    disk.zero_at(512, 38 * BLOCK_BYTES).unwrap();
    let mut expected = vec![1; 40 * BLOCK];
    expected[512..512 + 38 * BLOCK].fill(0);
    assert_eq!(read_all(&disk), expected);

    // Bytes that a failed write left in an absent block.
    for punch in [true, false] {
        let file = tempfile::tempfile().unwrap();
        let behind = file.try_clone().unwrap();
        let disk = Overlay::new(None, file, 4 * BLOCK_BYTES).unwrap();
        behind.write_all_at(&[1; BLOCK], BLOCK_BYTES).unwrap();
        disk.lock().torn = true;
        disk.lock().punch = punch;
        disk.zero_at(0, 4 * BLOCK_BYTES).unwrap();
        assert_eq!(read_all(&disk), vec![0; 4 * BLOCK]);
    }
}

#[test]
fn nonsense_is_refused() {
    let disk = Overlay::new(None, tempfile::tempfile().unwrap(), 4 * BLOCK_BYTES).unwrap();
    for (offset, len) in [(4 * BLOCK_BYTES, 1), (u64::MAX, 1), (u64::MAX - 511, 512)] {
        let mut buffer = vec![0; len];
        assert!(disk.read_at(offset, &mut buffer).is_err());
        assert!(disk.write_at(offset, &buffer).is_err());
        assert!(disk.zero_at(offset, len as u64).is_err());
    }
    assert!(disk.zero_at(0, u64::MAX).is_err());
    assert!(disk.read_blocks(4, &mut [0; BLOCK]).is_err());
    assert!(disk.read_blocks(u64::MAX, &mut [0; BLOCK]).is_err());
    assert!(disk.read_blocks(0, &mut [0; 100]).is_err());
    assert!(disk.restore_block(0, &[0; 4095]).is_err());
    assert!(disk.restore_block(u64::MAX / BLOCK_BYTES, &[0; BLOCK]).is_err());
    assert!(disk.restore_zero(3..5).is_err());
    assert!(disk.restore_zero(0..u64::MAX).is_err());
    for size in [0, 511, MAX_DISK_BYTES + 512, u64::MAX] {
        assert!(matches!(Overlay::new(None, tempfile::tempfile().unwrap(), size), Err(OverlayError::Size(_))));
    }
    assert!(matches!(Overlay::new(None, file_with(b"x"), 512), Err(OverlayError::NotEmpty(1))));
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let disk = Overlay::read_only(file_with(&[3; 512]), 1024).unwrap();
    assert!(disk.is_read_only());
    assert!(matches!(disk.write_at(0, &[0; 512]), Err(OverlayError::ReadOnly)));
    assert!(matches!(disk.zero_at(0, 512), Err(OverlayError::ReadOnly)));
    assert!(matches!(disk.restore_block(0, &[0; BLOCK]), Err(OverlayError::ReadOnly)));
    disk.flush().unwrap();
    let mut expected = vec![3; 512];
    expected.resize(1024, 0);
    assert_eq!(read_all(&disk), expected);
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    TakeDirty,
}

fn steps(size: u64) -> impl Strategy<Value = Vec<Step>> {
    let write = (0..size, 1..20_000u64, any::<u8>())
        .prop_map(move |(at, len, seed)| Step::Write(at, pattern(seed, len.min(size - at) as usize)));
    let zero = (0..size, 0..20_000u64).prop_map(move |(at, len)| Step::Zero(at, len.min(size - at)));
    prop::collection::vec(prop_oneof![4 => write, 3 => zero, 1 => Just(Step::TakeDirty)], 1..24)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// The disk is a byte array; dirty is what changed since it was taken; a second disk that gets each dirty block is the same.
    #[test]
    fn behaves_like_a_byte_array(base_len in 0usize..40_000, punch in any::<bool>(), steps in steps(10 * BLOCK_BYTES - 512)) {
        let size = 10 * BLOCK_BYTES - 512;
        let base = pattern(3, base_len.min(size as usize));
        let disk = Overlay::new(Some(file_with(&base)), tempfile::tempfile().unwrap(), size).unwrap();
        let copy = Overlay::new(Some(file_with(&base)), tempfile::tempfile().unwrap(), size).unwrap();
        disk.lock().punch = punch;
        let mut model = base.clone();
        model.resize(size as usize, 0);
        let transfer = || {
            for block in disk.take_dirty().into_iter().flatten() {
                let mut content = [0; BLOCK];
                disk.read_blocks(block, &mut content).unwrap();
                if content == [0; BLOCK] {
                    copy.restore_zero(block..block + 1).unwrap();
                } else {
                    copy.restore_block(block, &content).unwrap();
                }
            }
        };
        for step in steps {
            match step {
                Step::Write(at, data) => {
                    disk.write_at(at, &data).unwrap();
                    model[at as usize..at as usize + data.len()].copy_from_slice(&data);
                }
                Step::Zero(at, len) => {
                    disk.zero_at(at, len).unwrap();
                    model[at as usize..(at + len) as usize].fill(0);
                }
                Step::TakeDirty => transfer(),
            }
            prop_assert!(read_all(&disk) == model);
        }
        transfer();
        prop_assert!(read_all(&copy) == model);
        prop_assert!(copy.dirty().is_empty());
        prop_assert_eq!(copy.present(), disk.present());
    }
}
