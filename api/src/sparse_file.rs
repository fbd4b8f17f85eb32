//! Reading a large file without its holes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

/// Hands every block of `block` bytes in which the file has data to `each`, in order, with its offset; the last one ends with the file, which is
/// `len` bytes long. A hole may end inside a block, whose beginning is then zero.
pub(crate) fn each_block(file: &File, len: u64, block: usize, mut each: impl FnMut(u64, &[u8])) -> io::Result<()> {
    let step = block as u64;
    let mut bytes = vec![0; block];
    let mut at = 0;
    while at < len {
        at = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => data - data % step,
            // Nothing but a hole up to the end.
            Err(rustix::io::Errno::NXIO) => break,
            // A file system without holes.
            Err(rustix::io::Errno::INVAL) => at,
            Err(e) => return Err(e.into()),
        };
        let there = usize::try_from(step.min(len - at)).unwrap_or(block);
        file.read_exact_at(&mut bytes[..there], at)?;
        each(at, &bytes[..there]);
        at += step;
    }
    Ok(())
}
