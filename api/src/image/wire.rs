//! The JSON of images as their specifications have it (OCI image specification 1.1; the `manifest.json` of `docker save`), and what of a
//! configuration a guest is told. Only the fields that are used; unknown ones are ignored, as the specification asks.

use super::ImageError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::num::NonZeroU16;

/// Octets of a manifest, an index or a configuration at most.
pub(super) const MAX_DOCUMENT: u64 = 4 << 20;
/// Layers at most: what container runtimes take.
const MAX_LAYERS: usize = 127;

/// Names an object of an image.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    #[serde(default)]
    pub(super) media_type: String,
    pub(super) digest: String,
    #[serde(default)]
    pub(super) annotations: BTreeMap<String, String>,
    #[serde(default)]
    pub(super) platform: Option<Platform>,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct Platform {
    #[serde(default)]
    pub(super) architecture: String,
    #[serde(default)]
    pub(super) os: String,
}

impl Platform {
    pub(super) fn fits(&self) -> bool {
        self.os == "linux" && self.architecture == "amd64"
    }

    pub(super) fn text(&self) -> String {
        format!("{}/{}", self.os, self.architecture)
    }
}

/// An index of images, or the `index.json` of a layout.
#[derive(Debug, Deserialize)]
pub(super) struct Index {
    pub(super) manifests: Vec<Descriptor>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Manifest {
    pub(super) config: Descriptor,
    pub(super) layers: Vec<Descriptor>,
}

/// One image of a `docker save` archive.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Saved {
    pub(super) config: String,
    #[serde(default)]
    pub(super) repo_tags: Option<Vec<String>>,
    pub(super) layers: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct ConfigFile {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    config: Option<Config>,
    rootfs: Rootfs,
}

#[derive(Debug, Deserialize)]
struct Rootfs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Config {
    user: Option<String>,
    exposed_ports: Option<BTreeMap<String, serde_json::Value>>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: Option<String>,
}

/// What an image says about the processes in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Program that the image is made for, with its first arguments.
    pub entrypoint: Option<Vec<String>>,
    /// Its other arguments; the program where there is no entrypoint.
    pub cmd: Option<Vec<String>>,
    /// Working directory.
    pub working_dir: Option<String>,
    /// User: a name or number, with `:` and a group if it likes.
    pub user: Option<String>,
    /// Environment.
    pub env: BTreeMap<String, String>,
    /// TCP port of its app: `PORT` of its environment, else the only one that it exposes.
    pub port: Option<NonZeroU16>,
}

impl Process {
    /// The command line that the image is made for; empty when it has none.
    pub fn command(&self) -> Vec<String> {
        self.entrypoint.iter().chain(&self.cmd).flatten().cloned().collect()
    }
}

/// Reads a document of an image.
pub(super) fn read<'a, T: Deserialize<'a>>(part: &str, bytes: &'a [u8]) -> Result<T, ImageError> {
    serde_json::from_slice(bytes).map_err(|e| document(part, e))
}

pub(super) fn document(part: &str, what: impl std::fmt::Display) -> ImageError {
    ImageError::Document { part: part.to_owned(), what: what.to_string() }
}

/// The process and the digests of the archives of `layers` layers that a configuration names.
pub(super) fn configuration(bytes: &[u8], layers: usize) -> Result<(Process, Vec<String>), ImageError> {
    const PART: &str = "configuration";
    let file: ConfigFile = read(PART, bytes)?;
    let platform = Platform { architecture: file.architecture, os: file.os };
    if !platform.fits() {
        return Err(ImageError::Platform(platform.text()));
    }
    if layers > MAX_LAYERS {
        return Err(document("manifest", format_args!("it has {layers} layers, at most {MAX_LAYERS} are taken")));
    }
    if file.rootfs.diff_ids.len() != layers {
        return Err(document(
            PART,
            format_args!("it names {} layers, the manifest {layers}", file.rootfs.diff_ids.len()),
        ));
    }
    let config = file.config.unwrap_or_default();
    let texts = [&config.entrypoint, &config.cmd, &config.env].into_iter().flatten().flatten();
    if texts.chain(&config.user).chain(&config.working_dir).any(|text| text.contains('\0')) {
        return Err(document(PART, "a text in it has a NUL"));
    }
    let env: BTreeMap<String, String> = config
        .env
        .unwrap_or_default()
        .iter()
        .filter_map(|variable| variable.split_once('='))
        .filter(|(name, _)| !name.is_empty())
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let exposed = config.exposed_ports.unwrap_or_default();
    let port = env.get("PORT").and_then(|port| port.parse().ok()).or_else(|| only_port(exposed.keys()));
    let some = |text: Option<String>| text.filter(|text| !text.is_empty());
    let process = Process {
        entrypoint: config.entrypoint,
        cmd: config.cmd,
        working_dir: some(config.working_dir),
        user: some(config.user),
        env,
        port,
    };
    Ok((process, file.rootfs.diff_ids))
}

/// The only TCP port of a list such as `8080/tcp`, `53/udp`.
fn only_port<'a>(exposed: impl Iterator<Item = &'a String>) -> Option<NonZeroU16> {
    let mut tcp = exposed.filter_map(|port| match port.split_once('/') {
        None => port.parse().ok(),
        Some((port, "tcp")) => port.parse().ok(),
        Some(_) => None,
    });
    tcp.next().filter(|_| tcp.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(config: &str) -> Process {
        let text =
            format!(r#"{{"os":"linux","architecture":"amd64","config":{config},"rootfs":{{"diff_ids":["a"]}}}}"#);
        configuration(text.as_bytes(), 1).unwrap().0
    }

    #[test]
    fn a_port_is_named_or_the_only_one() {
        let port = |config: &str| process(config).port.map(NonZeroU16::get);
        assert_eq!(port(r#"{"Env":["PORT=3000"],"ExposedPorts":{"80/tcp":{}}}"#), Some(3000));
        assert_eq!(port(r#"{"ExposedPorts":{"80/tcp":{},"53/udp":{}}}"#), Some(80));
        assert_eq!(port(r#"{"ExposedPorts":{"80":{}}}"#), Some(80));
        assert_eq!(port(r#"{"ExposedPorts":{"80/tcp":{},"443/tcp":{}}}"#), None);
        assert_eq!(port(r#"{"Env":["PORT=many"]}"#), None);
        assert_eq!(port("{}"), None);
    }

    #[test]
    fn a_command_line_is_entrypoint_and_cmd() {
        let both =
            process(r#"{"Entrypoint":["/run"],"Cmd":["a","b"],"User":"","WorkingDir":"/w","Env":["A=1=2","B"]}"#);
        assert_eq!(both.command(), ["/run", "a", "b"]);
        assert_eq!((both.user, both.working_dir.as_deref()), (None, Some("/w")));
        assert_eq!(both.env, BTreeMap::from([("A".to_owned(), "1=2".to_owned())]));
        assert!(process("null").command().is_empty());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let wrong = |text: &str| configuration(text.as_bytes(), 1).unwrap_err().to_string();
        assert!(wrong(r#"{"os":"linux","architecture":"arm64","rootfs":{"diff_ids":["a"]}}"#).contains("linux/arm64"));
        assert!(wrong(r#"{"os":"linux","architecture":"amd64","rootfs":{"diff_ids":[]}}"#).contains("0 layers"));
        assert!(wrong("[]").contains("configuration"));
        let nul = r#"{"os":"linux","architecture":"amd64","config":{"Cmd":["a\u0000"]},"rootfs":{"diff_ids":["a"]}}"#;
        assert!(wrong(nul).contains("NUL"));
    }
}
