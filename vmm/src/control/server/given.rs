//! What requests bring with them: descriptors under tokens, manifests, grants, disks.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read as _;

use stasis_snapshot::grant::{Access, GrantedObject};
use stasis_snapshot::granted::{GrantedPacks, Patience};
use stasis_snapshot::ids::Digest;
use stasis_snapshot::manifest::{self, Manifest};

use super::Server;
use crate::control::refusal::{Refusal, chain, failed};
use crate::control::types::{DiskConfig, FdToken};
use crate::machine::{BaseGiven, Disk};

impl Server {
    pub(super) fn take(&self, what: &str, token: FdToken) -> Result<File, Refusal> {
        self.files.take(token).ok_or_else(|| {
            Refusal::BadRequest(format!("no descriptor was sent for the {what} under token {}", token.0))
        })
    }

    /// A manifest that was sent, its digest checked.
    pub(super) fn manifest(&self, token: FdToken, digest: &str) -> Result<Manifest, Refusal> {
        let digest =
            digest.parse::<Digest>().map_err(|e| Refusal::BadRequest(format!("manifest_digest: {}", chain(&e))))?;
        let mut bytes = Vec::new();
        self.take("manifest", token)?.take(manifest::MAX_LEN).read_to_end(&mut bytes).map_err(failed)?;
        Manifest::decode_checked(&bytes, digest).map_err(failed)
    }

    /// The grants with the files they name.
    pub(super) fn granted(&self, objects: Vec<GrantedObject>) -> Result<GrantedPacks, Refusal> {
        let mut files = HashMap::new();
        for object in &objects {
            if let Access::Fd(token) = object.access {
                files.insert(token, self.take(&object.key, FdToken(token))?);
            }
            if let Some(token) = object.cache
                && let Some(file) = self.files.take(FdToken(token))
            {
                files.insert(token, file);
            }
        }
        GrantedPacks::new(self.settings.store.clone(), objects, &mut files, Patience::default()).map_err(failed)
    }

    pub(super) fn disks(&self, configs: Vec<DiskConfig>) -> Result<Vec<Disk>, Refusal> {
        let disk = |config: DiskConfig| {
            let base = match (config.base, config.base_digest) {
                (Some(token), Some(digest)) => {
                    let digest = digest
                        .parse::<Digest>()
                        .map_err(|e| Refusal::BadRequest(format!("base_digest: {}", chain(&e))))?;
                    let index = config.base_index.map(|token| self.take("index of a disk base", token)).transpose()?;
                    Some(BaseGiven { file: self.take("disk base", token)?, digest, index })
                }
                (None, None) => None,
                _ => return Err(Refusal::BadRequest("base and base_digest belong together".to_owned())),
            };
            let overlay = config.overlay.map(|token| self.take("disk overlay", token)).transpose()?;
            if overlay.is_some() == config.read_only {
                return Err(Refusal::BadRequest("a disk has an overlay or is read_only".to_owned()));
            }
            let size = config.size_mib.checked_mul(1 << 20);
            let size = size.ok_or_else(|| Refusal::BadRequest(format!("size_mib {}", config.size_mib)))?;
            Disk::new(base, overlay, size).map_err(failed)
        };
        configs.into_iter().map(disk).collect()
    }
}
