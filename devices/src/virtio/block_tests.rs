//! The block device against a driver of its own: every request, every way to ask for too much, saved and restored.

use std::fs::File;
use std::io::Write as _;

use super::super::driver::{ARENA, Buffer, Driver, readable, writable};
use super::*;

const HEADER: u64 = ARENA;
const STATUS: u64 = ARENA + 0x800;
const DATA: u64 = ARENA + 0x1000;
const SECTORS: u64 = 4096;
const ALL: u64 = !0;

fn base() -> File {
    let mut file = tempfile::tempfile().unwrap();
    let content: Vec<u8> = (0..SECTORS * 512).map(|i| (i / 512 + i) as u8 | 1).collect();
    file.write_all(&content).unwrap();
    file
}

fn disk() -> Arc<Overlay> {
    Arc::new(Overlay::new(Some(base()), tempfile::tempfile().unwrap(), SECTORS * 512).unwrap())
}

fn id() -> [u8; ID_BYTES] {
    let mut id = [0; ID_BYTES];
    id[..7].copy_from_slice(b"root-fs");
    id
}

fn driver(disk: &Arc<Overlay>) -> Driver {
    let mut driver = Driver::new(Block::new(Arc::clone(disk), id()));
    driver.start(64, ALL);
    driver
}

/// One request with `data` between header and status; answers the status and the used length.
fn request(driver: &mut Driver, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
    let mut header = Vec::new();
    header.extend(kind.to_le_bytes());
    header.extend(0u32.to_le_bytes());
    header.extend(sector.to_le_bytes());
    driver.put(HEADER, &header);
    driver.put(STATUS, &[0xff]);
    let mut buffers = vec![readable(HEADER, 16)];
    buffers.extend(data);
    buffers.push(writable(STATUS, 1));
    driver.add(0, &buffers);
    driver.notify(0);
    driver.run(0);
    let (_, len) = driver.take_used(0).expect("no answer");
    (driver.get(STATUS, 1)[0], len)
}

fn content(disk: &Overlay, offset: u64, len: usize) -> Vec<u8> {
    let mut content = vec![0; len];
    disk.read_at(offset, &mut content).unwrap();
    content
}

#[test]
fn the_configuration_space_is_laid_out_as_the_standard_says() {
    let disk = disk();
    let driver = driver(&disk);
    let word = |offset: u64| {
        let mut data = [0; 4];
        driver.device().read(0x100 + offset, &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!(u64::from(word(0)) | u64::from(word(4)) << 32, SECTORS);
    assert_eq!((word(8), word(12)), (64 * 1024, 254));
    assert_eq!(word(20), 512);
    assert_eq!(word(24), 3 | 8 << 16, "8 sectors a physical block");
    assert_eq!((word(36), word(40), word(44)), (1 << 21, 16, 8));
    assert_eq!((word(48), word(52), word(56)), (1 << 21, 16, 1));
    assert_eq!(word(60), 0, "past the end");
    let mut byte = [0];
    driver.device().read(0x100 + 24, &mut byte);
    assert_eq!(byte, [3], "one byte of it");
}

#[test]
fn reads_and_writes_move_data_and_mark_pages() {
    let disk = disk();
    let mut driver = driver(&disk);
    driver.clear_dirty();
    let (status, len) =
        request(&mut driver, b::VIRTIO_BLK_T_IN, 5, &[writable(DATA, 1024), writable(DATA + 0x3000, 3 * 512)]);
    assert_eq!((status, len), (0, 5 * 512 + 1));
    let mut read = driver.get(DATA, 1024);
    read.extend(driver.get(DATA + 0x3000, 3 * 512));
    assert_eq!(read, content(&disk, 5 * 512, 5 * 512));
    for address in [DATA, DATA + 0x3000, STATUS, Driver::ring_addresses(0, 64)[2]] {
        assert!(driver.is_dirty(address), "{address:#x}");
    }
    assert!(!driver.is_dirty(DATA + 0x1000));

    driver.put(DATA, &[0x42; 1024]);
    driver.clear_dirty();
    let (status, len) = request(&mut driver, b::VIRTIO_BLK_T_OUT, 9, &[readable(DATA, 100), readable(DATA + 100, 924)]);
    assert_eq!((status, len), (0, 1));
    assert_eq!(content(&disk, 9 * 512, 1024), [0x42; 1024]);
    assert_eq!(disk.dirty(), vec![1..2]);
    assert!(!driver.is_dirty(DATA + 0x1000));
    assert_eq!(driver.take_interrupt(), 1);
    assert_eq!(driver.completed(), 2);
}

#[test]
fn large_requests_cross_every_buffer_boundary() {
    let disk = disk();
    let mut driver = driver(&disk);
    let pattern: Vec<u8> = (0..1_500_000u32 / 512 * 512).map(|i| (i * 7 / 3) as u8).collect();
    // Over the boundary of the two memory regions.
    let at = (4 << 20) - 700_000;
    driver.put(at, &pattern);
    assert_eq!(request(&mut driver, b::VIRTIO_BLK_T_OUT, 3, &[readable(at, pattern.len() as u32)]).0, 0);
    assert!(content(&disk, 3 * 512, pattern.len()) == pattern);
    driver.put(at, &vec![0; pattern.len()]);
    assert_eq!(request(&mut driver, b::VIRTIO_BLK_T_IN, 3, &[writable(at, pattern.len() as u32)]).0, 0);
    assert!(driver.get(at, pattern.len()) == pattern);
}

#[test]
fn flush_identify_discard_and_write_zeroes() {
    let disk = disk();
    let mut driver = driver(&disk);
    assert_eq!(request(&mut driver, b::VIRTIO_BLK_T_FLUSH, 0, &[]), (0, 1));
    assert_eq!(request(&mut driver, b::VIRTIO_BLK_T_GET_ID, 0, &[writable(DATA, 20)]), (0, 21));
    assert_eq!(driver.get(DATA, 20), id());

    let segment = |sector: u64, count: u32, flags: u32| {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(count.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes
    };
    driver.put(DATA, &[segment(8, 16, 0), segment(100, 3, 0)].concat());
    assert_eq!(request(&mut driver, b::VIRTIO_BLK_T_DISCARD, 0, &[readable(DATA, 32)]).0, 0);
    assert_eq!(content(&disk, 8 * 512, 16 * 512), [0; 16 * 512]);
    assert_eq!(content(&disk, 100 * 512, 3 * 512), [0; 3 * 512]);
    assert_ne!(content(&disk, 103 * 512, 1), [0]);
    assert_eq!(disk.dirty(), vec![1..3, 12..13]);
    driver.put(DATA, &segment(200, 9, 1));
    assert_eq!(request(&mut driver, b::VIRTIO_BLK_T_WRITE_ZEROES, 0, &[readable(DATA, 16)]).0, 0);
    assert_eq!(content(&disk, 200 * 512, 9 * 512), [0; 9 * 512]);

    let before = disk.dirty();
    for (kind, bytes, expected) in [
        (b::VIRTIO_BLK_T_DISCARD, segment(SECTORS, 1, 0), b::VIRTIO_BLK_S_IOERR),
        (b::VIRTIO_BLK_T_DISCARD, segment(u64::MAX, 1, 0), b::VIRTIO_BLK_S_IOERR),
        (b::VIRTIO_BLK_T_DISCARD, segment(0, u32::MAX, 0), b::VIRTIO_BLK_S_IOERR),
        (b::VIRTIO_BLK_T_DISCARD, segment(0, 1, 1), b::VIRTIO_BLK_S_UNSUPP),
        (b::VIRTIO_BLK_T_WRITE_ZEROES, segment(0, 1, 2), b::VIRTIO_BLK_S_UNSUPP),
        (b::VIRTIO_BLK_T_WRITE_ZEROES, vec![0; 15], b::VIRTIO_BLK_S_IOERR),
        (b::VIRTIO_BLK_T_WRITE_ZEROES, vec![0; 17 * 16], b::VIRTIO_BLK_S_IOERR),
        (b::VIRTIO_BLK_T_WRITE_ZEROES, vec![], b::VIRTIO_BLK_S_IOERR),
    ] {
        driver.put(DATA, &bytes);
        let (status, _) = request(&mut driver, kind, 0, &[readable(DATA, bytes.len() as u32)]);
        assert_eq!(u32::from(status), expected, "{kind} {bytes:?}");
    }
    assert_eq!(disk.dirty(), before, "a refused request changes nothing");
}

#[test]
fn requests_that_the_disk_cannot_serve_get_an_error_status_and_the_device_lives() {
    let disk = disk();
    let mut driver = driver(&disk);
    let ioerr = b::VIRTIO_BLK_S_IOERR as u8;
    for (kind, sector, data) in [
        (b::VIRTIO_BLK_T_IN, SECTORS, writable(DATA, 512)),
        (b::VIRTIO_BLK_T_IN, SECTORS - 1, writable(DATA, 1024)),
        (b::VIRTIO_BLK_T_IN, u64::MAX, writable(DATA, 512)),
        (b::VIRTIO_BLK_T_IN, u64::MAX / 512, writable(DATA, 512)),
        (b::VIRTIO_BLK_T_IN, 0, writable(DATA, 100)),
        (b::VIRTIO_BLK_T_OUT, SECTORS, readable(DATA, 512)),
        (b::VIRTIO_BLK_T_OUT, SECTORS - 1, readable(DATA, 1024)),
        (b::VIRTIO_BLK_T_OUT, SECTORS - 600, readable(DATA, 512 * 1024)),
        (b::VIRTIO_BLK_T_OUT, 1 << 55, readable(DATA, 512)),
        (b::VIRTIO_BLK_T_OUT, 0, readable(DATA, 511)),
    ] {
        assert_eq!(request(&mut driver, kind, sector, &[data]).0, ioerr, "{kind} {sector}");
    }
    assert!(disk.dirty().is_empty(), "not even the part that fits was written");
    for kind in [2, 3, 7, 99, u32::MAX] {
        assert_eq!(request(&mut driver, kind, 0, &[]).0, b::VIRTIO_BLK_S_UNSUPP as u8);
    }
    // No data at all is a transfer of zero sectors.
    assert_eq!(request(&mut driver, b::VIRTIO_BLK_T_IN, 0, &[]), (0, 1));
    assert_eq!(request(&mut driver, b::VIRTIO_BLK_T_IN, 0, &[writable(DATA, 512)]), (0, 513));
    assert!(!driver.needs_reset());
}

#[test]
fn a_request_without_header_or_status_breaks_the_device() {
    let disk = disk();
    for buffers in [
        vec![readable(HEADER, 16)],
        vec![readable(HEADER, 15), writable(STATUS, 1)],
        vec![writable(STATUS, 1)],
        vec![readable(HEADER, 16), writable(STATUS, 0)],
        vec![readable(HEADER, 0)],
        vec![writable(HEADER, 16), writable(DATA, 512), writable(STATUS, 1)],
    ] {
        let mut driver = driver(&disk);
        driver.put(HEADER, &[0; 16]);
        driver.add(0, &buffers);
        driver.notify(0);
        driver.run(0);
        assert!(driver.needs_reset());
        assert_eq!(driver.used_index(0), 0);
    }
}

#[test]
fn a_read_only_disk_says_so_and_refuses_writes() {
    let disk = Arc::new(Overlay::read_only(base(), SECTORS * 512).unwrap());
    let mut driver = driver(&disk);
    assert_ne!(driver.offered() & 1 << b::VIRTIO_BLK_F_RO, 0);
    assert_eq!(driver.offered() & (DISCARD | WRITE_ZEROES), 0);
    assert_eq!(request(&mut driver, b::VIRTIO_BLK_T_OUT, 0, &[readable(DATA, 512)]).0, b::VIRTIO_BLK_S_IOERR as u8);
    assert_eq!(request(&mut driver, b::VIRTIO_BLK_T_DISCARD, 0, &[readable(DATA, 16)]).0, b::VIRTIO_BLK_S_UNSUPP as u8);
    assert_eq!(request(&mut driver, b::VIRTIO_BLK_T_FLUSH, 0, &[]).0, 0);
    assert_eq!(request(&mut driver, b::VIRTIO_BLK_T_IN, 0, &[writable(DATA, 512)]).0, 0);
}

#[test]
fn discard_needs_its_feature() {
    let mut driver = Driver::new(Block::new(disk(), id()));
    driver.start(64, !(DISCARD | WRITE_ZEROES));
    driver.put(DATA, &[0; 16]);
    for kind in [b::VIRTIO_BLK_T_DISCARD, b::VIRTIO_BLK_T_WRITE_ZEROES] {
        assert_eq!(request(&mut driver, kind, 0, &[readable(DATA, 16)]).0, b::VIRTIO_BLK_S_UNSUPP as u8);
    }
}

#[test]
fn one_turn_moves_a_bounded_amount() {
    let disk = disk();
    let mut driver = driver(&disk);
    let mut header = b::VIRTIO_BLK_T_IN.to_le_bytes().to_vec();
    header.extend([0; 12]);
    driver.put(HEADER, &header);
    for _ in 0..20 {
        driver.add(0, &[readable(HEADER, 16), writable(DATA, 1 << 20), writable(STATUS, 1)]);
    }
    driver.notify(0);
    driver.turn(0);
    assert_eq!(driver.used_index(0), 4);
    driver.run(0);
    assert_eq!(driver.used_index(0), 20);
}

#[test]
fn requests_that_move_nothing_take_several_turns_too() {
    let disk = disk();
    let mut driver = Driver::new(Block::new(Arc::clone(&disk), id()));
    driver.start(256, 0);
    let mut header = b::VIRTIO_BLK_T_FLUSH.to_le_bytes().to_vec();
    header.extend([0; 12]);
    driver.put(HEADER, &header);
    for _ in 0..100 {
        driver.add(0, &[readable(HEADER, 16), writable(STATUS, 1)]);
    }
    driver.notify(0);
    driver.turn(0);
    assert_eq!(u32::from(driver.used_index(0)), CALL_REQUESTS);
    driver.run(0);
    assert_eq!(driver.used_index(0), 100);
}

#[test]
fn the_state_round_trips_and_another_disk_is_refused() {
    let disk = disk();
    let mut driver = driver(&disk);
    assert_eq!(request(&mut driver, b::VIRTIO_BLK_T_IN, 0, &[writable(DATA, 512)]).0, 0);
    let mut next = driver.migrate(Block::new(Arc::clone(&disk), id()));
    assert_eq!(next.device().save(), driver.device().save());
    driver.put(DATA, &[7; 512]);
    assert_eq!(request(&mut next, b::VIRTIO_BLK_T_OUT, 1, &[readable(DATA, 512)]).0, 0);
    assert_eq!(content(&disk, 512, 512), [7; 512]);

    let state = driver.device().save().device;
    let smaller = Arc::new(Overlay::new(None, tempfile::tempfile().unwrap(), 512).unwrap());
    assert!(matches!(Block::new(smaller, id()).restore(&state), Err(RestoreError::Mismatch { .. })));
    let fixed = Arc::new(Overlay::read_only(base(), SECTORS * 512).unwrap());
    assert!(matches!(Block::new(fixed, id()).restore(&state), Err(RestoreError::Mismatch { .. })));
}
