//! The guest's console on the host: a log of bounded size.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

/// A log file that starts over when it is full; the full one is kept beside it with `.1` added.
pub(crate) struct ConsoleLog {
    path: PathBuf,
    file: File,
    written: u64,
}

/// Bytes of one log file. The guest decides how much it prints; two files bound what the host keeps.
const LIMIT: u64 = 1 << 20;

impl ConsoleLog {
    /// Appends to the file at `path`.
    pub(crate) fn open(path: PathBuf) -> std::io::Result<Self> {
        let file = File::options().create(true).append(true).open(&path)?;
        let written = file.metadata()?.len();
        Ok(Self { path, file, written })
    }
}

impl Write for ConsoleLog {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.written >= LIMIT {
            let mut old = self.path.clone().into_os_string();
            old.push(".1");
            std::fs::rename(&self.path, old)?;
            *self = Self::open(std::mem::take(&mut self.path))?;
        }
        let written = self.file.write(bytes)?;
        self.written += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chatty_guest_fills_two_files_and_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut log = ConsoleLog::open(path).unwrap();
        for _ in 0..40 {
            log.write_all(&vec![b'x'; 100_000]).unwrap();
        }
        let sizes: Vec<u64> =
            std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).collect();
        assert_eq!(sizes.len(), 2);
        assert!(sizes.iter().sum::<u64>() <= 2 * (LIMIT + 100_000));
    }
}
