//! The requests, one after the other, until the image is a file system or is refused.

use std::fs::File;
use std::io::{self, Read as _, Write as _};

use crate::disk::{BLOCK, Disk};
use crate::ext4::geometry::Geometry;
use crate::layer::{self, Budget, Fault};
use crate::protocol::{MAX_MESSAGE, MAX_TEXT, Reply, Request, VERSION};
use crate::tree::Tree;
use crate::{ext4, furnish};

/// What the process is started with.
#[derive(Debug)]
pub struct Inherited {
    /// Requests come and replies go.
    pub control: File,
    /// The bytes of the layers.
    pub input: File,
    /// The disk.
    pub disk: File,
    /// Octets of it.
    pub octets: u64,
}

/// An image that is being unpacked.
struct Work {
    tree: Tree,
    disk: Disk,
    budget: Budget,
    geometry: Geometry,
}

/// Serves until it is done, or nobody asks any more.
pub fn run(inherited: Inherited) -> io::Result<()> {
    let Inherited { mut control, mut input, disk, octets } = inherited;
    let mut begun = Some(disk);
    let mut work = None;
    let mut message = vec![0; MAX_MESSAGE];
    loop {
        let len = control.read(&mut message)?;
        if len == 0 {
            return Ok(());
        }
        let done = match serde_json::from_slice(&message[..len])? {
            Request::Begin { version: VERSION, bytes, entries } => begun
                .take()
                .ok_or_else(|| io::Error::other("it has begun already").into())
                .and_then(|disk| Work::new(disk, octets, Budget { bytes, entries }))
                .map(|new| work = Some(new)),
            Request::Begin { version, .. } => Err(io::Error::other(format!(
                "this unpacker speaks version {VERSION}, not {version}: its program and the supervisor's are of different builds"
            ))
            .into()),
            Request::Layer { number, bytes, diff_id } => match &mut work {
                Some(Work { tree, disk, budget, .. }) => {
                    layer::apply(tree, disk, budget, number, (&mut input).take(bytes), &diff_id)
                }
                None => Err(io::Error::other("it has not begun").into()),
            },
            Request::Finish { working_dir } => match work.take() {
                Some(work) => work.finish(working_dir.as_deref()),
                None => Err(io::Error::other("it has not begun").into()),
            },
        };
        let reply = match done {
            Ok(()) => Reply::Done,
            Err(Fault { entry, what }) => {
                Reply::Refused { entry: entry.map(|entry| short(&entry)), what: short(&what) }
            }
        };
        control.write_all(&serde_json::to_vec(&reply)?)?;
        if reply != Reply::Done {
            return Ok(());
        }
    }
}

fn short(text: &str) -> String {
    text.chars().take(MAX_TEXT).collect()
}

impl Work {
    fn new(disk: File, octets: u64, budget: Budget) -> Result<Self, Fault> {
        let too_odd =
            || io::Error::other(format!("a disk of {octets} bytes has no room for a file system (templates.disk_mib)"));
        let geometry = Geometry::of(octets).ok_or_else(too_odd)?;
        let disk = Disk::new(disk, geometry.first, octets / BLOCK);
        Ok(Self { tree: Tree::new(budget.entries), disk, budget, geometry })
    }

    fn finish(mut self, working_dir: Option<&str>) -> Result<(), Fault> {
        furnish::furnish(&mut self.tree, &mut self.disk, working_dir)?;
        ext4::write(&mut self.tree, &mut self.disk, &self.geometry)
            .map_err(|error| Fault { entry: None, what: crate::chain(&error) })
    }
}
