//! What moving the bytes costs when nothing else is done: objects of the same number and size as parallel PUTs, then GETs, over the same
//! store with as many connections. The figure that uploads and downloads are held against.

use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use rand::RngCore as _;
use stasis_snapshot::store::{ObjectStore, RawGrant};

use crate::vmm::Error;

/// How long grants are good for.
const GRANT: Duration = Duration::from_mins(10);
/// Random bytes that bodies are cut from; the largest pack has 8 MiB.
const POOL: usize = 16 << 20;

/// Moves bytes, and nothing else.
pub struct Bare {
    http: reqwest::Client,
    connections: usize,
    pool: Bytes,
}

impl Bare {
    /// One with this many transfers at once.
    pub fn new(connections: usize) -> Result<Self, Error> {
        let mut pool = vec![0; POOL];
        rand::rng().fill_bytes(&mut pool);
        Ok(Self { http: reqwest::Client::builder().no_proxy().build()?, connections, pool: pool.into() })
    }

    /// Stores objects of these sizes under `prefix` and answers how long that took. Grants are made before the clock runs.
    pub async fn upload(&self, store: &dyn ObjectStore, prefix: &str, sizes: &[u64]) -> Result<Duration, Error> {
        let mut grants = Vec::new();
        for (n, size) in sizes.iter().enumerate() {
            let body = self.pool.slice(..usize::try_from(*size)?.min(POOL));
            grants.push((store.grant_put(&format!("{prefix}/{n}"), GRANT).await?, body));
        }
        let begun = Instant::now();
        futures::stream::iter(grants)
            .map(|(grant, body)| self.put(grant, body))
            .buffer_unordered(self.connections)
            .try_collect::<Vec<()>>()
            .await?;
        Ok(begun.elapsed())
    }

    /// The time of one PUT of a KiB on a connection that is open.
    pub async fn small_put(&self, store: &dyn ObjectStore) -> Result<Duration, Error> {
        let sizes = [1 << 10];
        self.upload(store, "bare-small", &sizes).await?;
        let took = self.upload(store, "bare-small", &sizes).await?;
        self.clear(store, "bare-small", 1).await?;
        Ok(took)
    }

    /// Reads the objects of an upload again, whole.
    pub async fn download(&self, store: &dyn ObjectStore, prefix: &str, objects: usize) -> Result<Duration, Error> {
        let mut grants = Vec::new();
        for n in 0..objects {
            grants.push(store.grant_get(&format!("{prefix}/{n}"), GRANT).await?);
        }
        let begun = Instant::now();
        futures::stream::iter(grants)
            .map(|grant| self.get(grant))
            .buffer_unordered(self.connections)
            .try_collect::<Vec<u64>>()
            .await?;
        Ok(begun.elapsed())
    }

    /// Deletes what an upload stored.
    pub async fn clear(&self, store: &dyn ObjectStore, prefix: &str, objects: usize) -> Result<(), Error> {
        for n in 0..objects {
            store.delete(&format!("{prefix}/{n}")).await?;
        }
        Ok(())
    }

    /// Stores one body.
    pub async fn put(&self, grant: RawGrant, body: Bytes) -> Result<(), Error> {
        match grant {
            RawGrant::Url(url) => {
                self.http.put(url).body(body).send().await?.error_for_status()?;
            }
            RawGrant::File(file) => {
                tokio::task::spawn_blocking(move || {
                    file.write_all_at(&body, 0)?;
                    file.sync_data()
                })
                .await??;
            }
        }
        Ok(())
    }

    /// Reads one body and answers its length.
    pub async fn get(&self, grant: RawGrant) -> Result<u64, Error> {
        match grant {
            RawGrant::Url(url) => {
                let mut answer = self.http.get(url).send().await?.error_for_status()?;
                let mut total = 0;
                while let Some(piece) = answer.chunk().await? {
                    total += piece.len() as u64;
                }
                Ok(total)
            }
            RawGrant::File(file) => {
                let read = tokio::task::spawn_blocking(move || std::io::copy(&mut &file, &mut std::io::sink()));
                Ok(read.await??)
            }
        }
    }

    /// The bytes of one object.
    pub async fn fetch(&self, grant: RawGrant) -> Result<Bytes, Error> {
        match grant {
            RawGrant::Url(url) => Ok(self.http.get(url).send().await?.error_for_status()?.bytes().await?),
            RawGrant::File(mut file) => {
                let read = tokio::task::spawn_blocking(move || {
                    let mut bytes = Vec::new();
                    std::io::Read::read_to_end(&mut file, &mut bytes).map(|_| bytes)
                });
                Ok(read.await??.into())
            }
        }
    }

    /// Transfers at once.
    pub fn connections(&self) -> usize {
        self.connections
    }
}
