//! Where a service's sandboxes sleep, and how a program of ours is told.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use stasis_api::dev::{EmbeddedS3, FaultProxy};
use stasis_snapshot::store::s3::S3Settings;

use super::{ACCESS_KEY, BUCKET, Options, SECRET_KEY, Sleep};

/// A store.
pub(super) enum Place {
    Directory(PathBuf),
    S3(S3Settings),
}

pub(super) fn store_of(sleep: &Sleep, s3: &EmbeddedS3, proxy: &FaultProxy, dir: &Path) -> Place {
    let embedded = |endpoint| {
        Place::S3(S3Settings {
            endpoint,
            region: "us-east-1".to_owned(),
            bucket: BUCKET.to_owned(),
            access_key: ACCESS_KEY.to_owned(),
            secret_key: SECRET_KEY.to_owned(),
            path_style: true,
            request_timeout: Duration::from_mins(1),
            commit_timeout: Duration::from_mins(1),
        })
    };
    match sleep {
        Sleep::Proxied => embedded(proxy.endpoint()),
        Sleep::Direct => embedded(s3.endpoint()),
        Sleep::Directory => Place::Directory(dir.join("store")),
        Sleep::Bucket(settings) => Place::S3(settings.clone()),
    }
}

fn store_environment(place: &Place) -> Vec<(&'static str, OsString)> {
    match place {
        Place::Directory(path) => {
            vec![("STASIS_STORE_KIND", "directory".into()), ("STASIS_STORE_PATH", path.into())]
        }
        Place::S3(settings) => [
            ("STASIS_STORE_KIND", "s3"),
            ("STASIS_STORE_ENDPOINT", &settings.endpoint),
            ("STASIS_STORE_BUCKET", &settings.bucket),
            ("STASIS_STORE_REGION", &settings.region),
            ("STASIS_STORE_ACCESS_KEY", &settings.access_key),
            ("STASIS_STORE_SECRET_KEY", &settings.secret_key),
            ("STASIS_STORE_PATH_STYLE", if settings.path_style { "true" } else { "false" }),
        ]
        .map(|(name, value)| (name, value.into()))
        .to_vec(),
    }
}

/// What tells a program of ours its data, its images and its store.
pub(super) fn environment(data: &Path, options: &Options, place: &Place, port: u16) -> Vec<(String, OsString)> {
    let images = options.images.clone().unwrap_or_default();
    let ours = [
        ("STASIS_LISTEN", format!("127.0.0.1:{port}").into()),
        ("STASIS_DATA_DIR", data.into()),
        ("STASIS_IMAGES_DIR", images.into()),
    ];
    let ours = ours.into_iter().chain(store_environment(place)).map(|(name, value)| (name.to_owned(), value));
    ours.chain(options.environment.iter().map(|(name, value)| (name.clone(), value.into()))).collect()
}
