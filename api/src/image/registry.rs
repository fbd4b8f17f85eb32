//! Images from registries. Only registries that the operator lists are asked: a client names them, and would otherwise have this host
//! connect to whatever it can reach.

use super::blob::{Blob, digest_of, sha256_hex};
use super::wire::{self, MAX_DOCUMENT, document};
use super::{Credentials, Image, ImageError, Layer, Password, Progress, local};
use crate::config::Templates as Limits;
use crate::sources::UnixMs;
use futures::StreamExt as _;
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::manifest::{OciDescriptor, OciImageManifest};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

const CONNECT: Duration = Duration::from_secs(20);
/// A registry from which nothing comes for so long is given up.
const STALL: Duration = Duration::from_mins(1);
/// Times that a layer is asked for.
const TRIES: u32 = 3;

/// Whether `registry`, a host with a port or without, is one of `listed`: a name, `*.` and a suffix, or `*`.
fn is_listed(registry: &str, listed: &[String]) -> bool {
    listed.iter().any(|entry| match entry.strip_prefix('*') {
        Some("") => true,
        Some(suffix) => suffix.starts_with('.') && registry.ends_with(suffix),
        None => entry == registry,
    })
}

/// Fetches an image into `work`. `now` is for what must be signed.
pub(super) async fn pull(
    name: &Reference,
    credentials: Option<&Credentials>,
    limits: &Limits,
    work: &Path,
    progress: &Progress,
    now: UnixMs,
) -> Result<Image, ImageError> {
    if !is_listed(name.registry(), &limits.registries) {
        return Err(ImageError::Place(format!(
            "this server does not pull from {}: its operator lists the registries that it may ask (templates.registries)",
            name.registry()
        )));
    }
    progress.begin("manifest", 0);
    let client = Client::new(ClientConfig {
        protocol: ClientProtocol::HttpsExcept(limits.plain_http.clone()),
        platform_resolver: Some(Box::new(oci_client::client::linux_amd64_resolver)),
        connect_timeout: Some(CONNECT),
        read_timeout: Some(STALL),
        user_agent: "stasis",
        ..ClientConfig::default()
    });
    let auth = match credentials {
        Some(credentials) => {
            let Password { username, password } = credentials.password(limits, now).await?;
            RegistryAuth::Basic(username, password)
        }
        None => RegistryAuth::Anonymous,
    };
    let (manifest, digest) =
        client.pull_image_manifest(name, &auth).await.map_err(failed(name, "fetch its manifest"))?;
    let dir = work.join("blob");
    fs::create_dir_all(&dir).map_err(local(format!("make {}", dir.display())))?;
    let mut pull = Pull { client, name, dir: &dir, left: limits.image_mib << 20, progress };
    pull.image(manifest, digest).await
}

fn failed(name: &Reference, action: &str) -> impl FnOnce(OciDistributionError) -> ImageError {
    let (reference, action) = (name.to_string(), action.to_owned());
    move |source| {
        let unreachable = match &source {
            OciDistributionError::RequestError(_) | OciDistributionError::IoError(_) => true,
            OciDistributionError::ServerError { code, .. } => *code >= 500,
            _ => false,
        };
        ImageError::Registry { reference, action, unreachable, source: source.into() }
    }
}

struct Pull<'a> {
    client: Client,
    name: &'a Reference,
    dir: &'a Path,
    /// Octets that may still come.
    left: u64,
    progress: &'a Progress,
}

impl Pull<'_> {
    async fn image(&mut self, manifest: OciImageManifest, digest: String) -> Result<Image, ImageError> {
        let wanted = manifest.config.digest.clone();
        let blob = self.blob("its configuration", manifest.config).await?;
        let config = blob.read(MAX_DOCUMENT).map_err(|e| document("configuration", e))?;
        let found = digest_of(&config);
        if found != wanted {
            return Err(document("configuration", format_args!("it has the digest {found}, not {wanted}")));
        }
        let count = manifest.layers.len();
        let (process, diff_ids) = wire::configuration(&config, count)?;
        let mut layers = Vec::new();
        for (index, (layer, diff_id)) in manifest.layers.into_iter().zip(diff_ids).enumerate() {
            let digest = Some(layer.digest.clone());
            self.progress.begin(format_args!("pull of layer {} of {count}", index + 1), size(&layer));
            let blob = self.blob(&format!("layer {} of {count} ({})", index + 1, layer.digest), layer).await?;
            layers.push(Layer { blob, digest, diff_id });
        }
        Ok(Image { digest, process, layers })
    }

    /// A blob, in a file. Its digest is checked by who reads it.
    async fn blob(&mut self, what: &str, mut named: OciDescriptor) -> Result<Blob, ImageError> {
        // A manifest may name other hosts to fetch a layer from.
        named.urls = None;
        let Some(hex) = sha256_hex(&named.digest).map(str::to_owned) else {
            return Err(document("manifest", format_args!("{:?} is no SHA-256 digest", named.digest)));
        };
        self.left = self.left.checked_sub(size(&named)).ok_or_else(|| {
            document("manifest", format_args!("{what} is larger than what is left of the limit (templates.image_mib)"))
        })?;
        let path = self.dir.join(hex);
        let mut tries = 1;
        loop {
            match self.fetch(what, &named, &path).await {
                Ok(file) => return Blob::whole(file).map_err(local(format!("read {}", path.display()))),
                Err(ImageError::Registry { unreachable: true, .. }) if tries < TRIES => tries += 1,
                Err(error) => return Err(error),
            }
        }
    }

    async fn fetch(&self, what: &str, named: &OciDescriptor, path: &Path) -> Result<File, ImageError> {
        let action = format!("fetch {what}");
        let mut file = File::options().create(true).truncate(true).read(true).write(true).open(path);
        let file =
            file.as_mut().map_err(|e| local(format!("write {}", path.display()))(std::io::Error::from(e.kind())))?;
        let mut stream = self.client.pull_blob_stream(self.name, named).await.map_err(failed(self.name, &action))?;
        let mut left = size(named);
        while let Some(piece) = stream.next().await {
            let piece = piece.map_err(|e| failed(self.name, &action)(e.into()))?;
            left = left
                .checked_sub(piece.len() as u64)
                .ok_or_else(|| document("manifest", format_args!("{what} is longer than it says")))?;
            // Into the page cache, piece by piece: not worth a thread of its own.
            file.write_all(&piece).map_err(local(format!("write {}", path.display())))?;
            self.progress.add(piece.len() as u64);
        }
        file.try_clone().map_err(local(format!("read {}", path.display())))
    }
}

fn size(named: &OciDescriptor) -> u64 {
    u64::try_from(named.size).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listed_registries_are_asked() {
        let listed = ["docker.io", "*.example.com", "localhost:5000"].map(str::to_owned);
        for (registry, answer) in [
            ("docker.io", true),
            ("a.example.com", true),
            ("example.com", false),
            ("notexample.com", false),
            ("localhost:5000", true),
            ("localhost", false),
            ("169.254.169.254", false),
        ] {
            assert_eq!(is_listed(registry, &listed), answer, "{registry}");
        }
        assert!(
            is_listed("anything", &["*".to_owned()]) && !is_listed("x", &[]) && !is_listed("ax", &["*x".to_owned()])
        );
    }
}
