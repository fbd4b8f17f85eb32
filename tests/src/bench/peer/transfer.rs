//! A file as compressed parts in the store: what a pipeline around a VMM that snapshots into files does.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use rustix::fs::SeekFrom;

use super::Ground;
use crate::vmm::Error;

/// Bytes of the file in one part.
const PART: u64 = 8 << 20;
const LEVEL: i32 = 1;
const GRANT: Duration = Duration::from_mins(10);

/// What is in the store: where each part of the file belongs, and its bytes before compression.
pub struct Uploaded {
    /// Offset and length of each part.
    pub parts: Vec<(u64, u64)>,
    /// Bytes sent.
    pub sent: u64,
    /// How long it took, grants included.
    pub took: Duration,
    file_len: u64,
    prefix: String,
}

/// The extents of a file that hold data, cut into parts.
fn parts(file: &File) -> Result<Vec<(u64, u64)>, Error> {
    let len = file.metadata()?.len();
    let mut found = Vec::new();
    let mut at = 0;
    while at < len {
        let from = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(from) => from,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let to = rustix::fs::seek(file, SeekFrom::Hole(from))?.min(len);
        let mut start = from;
        while start < to {
            let end = (start + PART).min(to);
            found.push((start, end - start));
            start = end;
        }
        at = to;
    }
    Ok(found)
}

/// Compresses and stores a file's data.
pub async fn upload(ground: &Ground<'_>, path: &Path, name: &str) -> Result<Uploaded, Error> {
    let begun = Instant::now();
    let file = std::sync::Arc::new(File::open(path)?);
    let found = parts(&file)?;
    let prefix = format!("peer/{name}");
    let store = ground.home.store.as_ref();
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let packed = futures::stream::iter(found.clone().into_iter().enumerate()).map(|(n, (from, len))| {
        let file = file.clone();
        async move {
            let work = tokio::task::spawn_blocking(move || {
                let mut part = vec![0; usize::try_from(len).map_err(std::io::Error::other)?];
                file.read_exact_at(&mut part, from)?;
                zstd::bulk::compress(&part, LEVEL)
            });
            Ok::<_, Error>((n, Bytes::from(work.await??)))
        }
    });
    let puts = packed.buffer_unordered(cores).map(|packed| {
        let prefix = &prefix;
        async move {
            let (n, body) = packed?;
            let grant = store.grant_put(&format!("{prefix}/{n}"), GRANT).await?;
            let len = body.len() as u64;
            ground.bare.put(grant, body).await?;
            Ok::<_, Error>(len)
        }
    });
    let sizes: Vec<u64> = puts.buffer_unordered(ground.bare.connections()).try_collect().await?;
    Ok(Uploaded {
        parts: found,
        sent: sizes.iter().sum(),
        took: begun.elapsed(),
        file_len: file.metadata()?.len(),
        prefix,
    })
}

/// Reads and unpacks it into a new file.
pub async fn download(ground: &Ground<'_>, uploaded: &Uploaded, path: &Path) -> Result<Duration, Error> {
    let begun = Instant::now();
    let file = std::sync::Arc::new(File::create(path)?);
    file.set_len(uploaded.file_len)?;
    let store = ground.home.store.as_ref();
    let gets = futures::stream::iter(uploaded.parts.iter().enumerate()).map(|(n, (from, len))| {
        let (file, from, len) = (file.clone(), *from, *len);
        async move {
            let grant = store.grant_get(&format!("{}/{n}", uploaded.prefix), GRANT).await?;
            let packed = ground.bare.fetch(grant).await?;
            let work = tokio::task::spawn_blocking(move || {
                let part = zstd::bulk::decompress(&packed, usize::try_from(len).map_err(std::io::Error::other)?)?;
                file.write_all_at(&part, from)
            });
            work.await??;
            Ok::<_, Error>(())
        }
    });
    gets.buffer_unordered(ground.bare.connections()).try_collect::<Vec<()>>().await?;
    Ok(begun.elapsed())
}

/// Deletes the parts.
pub async fn clear(ground: &Ground<'_>, uploaded: &Uploaded) -> Result<(), Error> {
    ground.bare.clear(ground.home.store.as_ref(), &uploaded.prefix, uploaded.parts.len()).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_not_parts() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&vec![1; 9 << 20], 16 << 20).unwrap();
        file.write_all_at(&[1; 4096], 40 << 20).unwrap();
        let found = parts(&file).unwrap();
        assert_eq!(found, [(16 << 20, 8 << 20), (24 << 20, 1 << 20), (40 << 20, 4096)]);
    }
}
