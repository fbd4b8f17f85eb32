//! Where an image is, as clients write it: containers-transports(5).
//!
//! - `docker.io/library/python:3.12`, with `docker://` before it or not: a registry
//! - `oci:PATH[:NAME]`: an OCI image layout, a directory
//! - `oci-archive:PATH[:NAME]`: the same as a tar archive
//! - `docker-archive:PATH[:NAME]`: what `docker save` wrote
//!
//! `NAME` picks one image of several. Paths are of the supervisor's host, below the operator's `templates.local_dir`.

use std::fmt;
use std::path::{Component, Path, PathBuf};

/// Where an image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reference {
    /// In a registry.
    Registry(oci_client::Reference),
    /// On this host.
    Local(Place),
}

/// An image on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub(super) form: Form,
    pub(super) path: PathBuf,
    pub(super) name: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    OciLayout,
    OciArchive,
    DockerArchive,
}

/// Not a reference: the end of a sentence that starts with the field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadReference(String);

impl Reference {
    /// Reads one.
    pub fn parse(text: &str) -> Result<Self, BadReference> {
        let forms =
            [("oci:", Form::OciLayout), ("oci-archive:", Form::OciArchive), ("docker-archive:", Form::DockerArchive)];
        if let Some((form, rest)) = forms.iter().find_map(|(prefix, form)| Some((*form, text.strip_prefix(prefix)?))) {
            return place(form, rest).map(Self::Local);
        }
        let name = text.strip_prefix("docker://").unwrap_or(text);
        if let Some((transport, _)) = name.split_once("://") {
            return Err(BadReference(format!("names the transport {transport:?}, which this server does not have")));
        }
        match name.parse() {
            Ok(reference) => Ok(Self::Registry(reference)),
            Err(error) => Err(BadReference(format!("is no image reference: {error}"))),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(name) => write!(f, "{name}"),
            Self::Local(place) => {
                let form = match place.form {
                    Form::OciLayout => "oci",
                    Form::OciArchive => "oci-archive",
                    Form::DockerArchive => "docker-archive",
                };
                write!(f, "{form}:{}", place.path.display())?;
                place.name.iter().try_for_each(|name| write!(f, ":{name}"))
            }
        }
    }
}

fn place(form: Form, rest: &str) -> Result<Place, BadReference> {
    let (path, name) = match rest.split_once(':') {
        Some((path, name)) => (path, Some(name.to_owned())),
        None => (rest, None),
    };
    let plain = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::RootDir | Component::CurDir);
    if path.is_empty() || path.contains('\0') || !Path::new(path).components().all(plain) {
        return Err(BadReference(format!("has the path {path:?}, which must not be empty or have '..'")));
    }
    if name.as_ref().is_some_and(String::is_empty) {
        return Err(BadReference("has an empty name behind the path".to_owned()));
    }
    Ok(Place { form, path: PathBuf::from(path), name })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_leads_where_it_says() {
        let registry = |text: &str| match Reference::parse(text) {
            Ok(Reference::Registry(name)) => name.to_string(),
            other => panic!("{text}: {other:?}"),
        };
        assert_eq!(registry("python:3.12"), "docker.io/library/python:3.12");
        assert_eq!(registry("docker://ghcr.io/a/b"), "ghcr.io/a/b:latest");
        let local = |text: &str| match Reference::parse(text) {
            Ok(Reference::Local(place)) => (place.form, place.path.display().to_string(), place.name),
            other => panic!("{text}: {other:?}"),
        };
        assert_eq!(local("oci:/a/b"), (Form::OciLayout, "/a/b".to_owned(), None));
        assert_eq!(local("oci-archive:a.tar:v1"), (Form::OciArchive, "a.tar".to_owned(), Some("v1".to_owned())));
        let saved = (Form::DockerArchive, "a.tar".to_owned(), Some("docker.io/x:1".to_owned()));
        assert_eq!(local("docker-archive:a.tar:docker.io/x:1"), saved);
        for text in ["oci:/a:b", "docker-archive:x:y:1", "docker.io/library/a:b"] {
            assert_eq!(Reference::parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        for bad in [
            "",
            "oci:",
            "oci:../x",
            "oci:/a/../b",
            "oci:/a:",
            "docker-daemon://x",
            "x/UPPER",
            "a b",
            "file:///etc/passwd",
        ] {
            assert!(Reference::parse(bad).is_err(), "{bad:?}");
        }
    }
}
