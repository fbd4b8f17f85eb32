//! Data keys of sandboxes (`stasis_snapshot::seal`): drawn here, kept wrapped in records and manifests, handed to VMMs.
//!
//! A sandbox gets a key when its record is made, for everything that is captured of it on this host; one that is taken up from the bucket gets
//! a new one. So no supervisor ever writes under a key that another one drew. A manifest names the keys of all packs that it names: those of a
//! template, of a snapshot or of another host come with the manifest that the sandbox was restored from.

use super::Core;
use crate::error::Error;
use crate::known_packs::KnownPacks;
use crate::registry::Sandbox;
use stasis_snapshot::manifest::Manifest;
use stasis_snapshot::seal::{DataKey, DataKeyId, SealError, WrappedKey};
use zeroize::Zeroizing;

impl Core {
    /// A key for what will be captured of a new sandbox; `None` where nothing is encrypted.
    pub(super) fn draw_data_key(&self) -> Option<WrappedKey> {
        if !self.config.seal.encrypts() {
            return None;
        }
        let key = DataKey::new(DataKeyId(self.sources.random()), &Zeroizing::new(self.sources.random::<32>()));
        self.store.seals().wrap(&key, self.sources.random())
    }

    /// Gives every sandbox a key under the current operator's key. At the start, when nobody else changes records.
    pub(super) fn renew_data_keys(&self) -> Result<(), Error> {
        let seals = self.store.seals();
        for sandbox in self.registry.all() {
            let next = match sandbox.record().data_key {
                Some(wrapped) if Some(wrapped.under) == seals.current() => continue,
                Some(wrapped) => match seals.unwrap(&wrapped) {
                    Ok(key) => seals.wrap(&key, self.sources.random()),
                    // What was sent ahead under it is lost with it; what was committed has its own copy.
                    Err(error) => {
                        tracing::warn!(id = %sandbox.id, %error, "it gets another data key");
                        self.draw_data_key()
                    }
                },
                None => self.draw_data_key(),
            };
            if next.is_some() {
                self.registry.amend(&sandbox, |record| record.data_key = next)?;
            }
        }
        Ok(())
    }

    /// How templates that are booted ahead are sealed, for their names; nothing where they are not.
    pub(super) fn seal_word(&self) -> String {
        let key = self.store.seals().current();
        key.map_or_else(String::new, |key| format!("seal {key} {}", self.config.seal.encrypts()))
    }

    /// What a capture of the sandbox is encrypted under.
    pub(super) fn data_key(&self, sandbox: &Sandbox) -> Result<Option<DataKey>, Error> {
        if !self.config.seal.encrypts() {
            return Ok(None);
        }
        let wrapped = sandbox.record().data_key.ok_or(Error::Bug("a sandbox without a data key"))?;
        self.store.seals().unwrap(&wrapped).map(Some).map_err(sealed(format!("the data key of {}", sandbox.id)))
    }

    /// The keys that `manifest` needs, for its envelope: the sandbox's own, and those of the manifest that it was restored from.
    pub(super) fn keys_of(
        &self,
        sandbox: &Sandbox,
        manifest: &Manifest,
        known: &KnownPacks,
    ) -> Result<Vec<WrappedKey>, Error> {
        let seals = self.store.seals();
        let own = sandbox.record().data_key;
        let find = |id: DataKeyId| own.iter().chain(known.data_keys()).find(|wrapped| wrapped.id == id);
        let mut keys = Vec::new();
        for id in manifest.keys_needed() {
            let wrapped = find(id).ok_or_else(|| Error::Draft {
                id: sandbox.id.clone(),
                what: format!("it needs the data key {id}, which is not the sandbox's"),
                source: None,
            })?;
            if Some(wrapped.under) == seals.current() {
                keys.push(wrapped.clone());
                continue;
            }
            let key = seals.unwrap(wrapped).map_err(sealed(format!("a data key of {}", sandbox.id)))?;
            keys.extend(seals.wrap(&key, self.sources.random()));
        }
        Ok(keys)
    }

    /// The same keys for a VMM that is to restore it.
    pub(super) fn keys_to_restore(&self, manifest: &str, known: &KnownPacks) -> Result<Vec<DataKey>, Error> {
        let seals = self.store.seals();
        let unwrap = |wrapped| seals.unwrap(wrapped).map_err(sealed(manifest.to_owned()));
        known.data_keys().iter().map(unwrap).collect()
    }
}

fn sealed(object: String) -> impl FnOnce(SealError) -> Error {
    move |source| Error::Seal { object, source }
}
