//! The certificate authority of the sandbox's egress proxy in the guest's trust store. No program is run: images may have none that could be.
//!
//! It is put where distributions look for authorities of an administrator, so that their own tools (`update-ca-certificates`, `update-ca-trust`)
//! keep it, and into the bundles that those tools make. In a bundle it stands between two lines of ours, which readers of PEM skip. Where
//! programs bring bundles of their own, variables lead them to the system's: set for commands that are started from now on.
//!
//! What is not done: the hashed links of `/etc/ssl/certs`, stores of Java and of browsers.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use stasis_agent::protocol::trust::{MAX_CERTIFICATE, TrustReply, TrustRequest};

/// The authority by itself.
const OWN: &str = "etc/stasis/egress-authority.pem";
/// Where administrators put authorities: Debian and Alpine, Fedora, SUSE, Arch. Used where the directory is.
const ANCHORS: [&str; 4] = [
    "usr/local/share/ca-certificates/stasis-egress.crt",
    "etc/pki/ca-trust/source/anchors/stasis-egress.pem",
    "etc/pki/trust/anchors/stasis-egress.pem",
    "etc/ca-certificates/trust-source/anchors/stasis-egress.pem",
];
/// Bundles, the most usual first: Debian, Alpine and Arch; Fedora; SUSE; older ones. Used where they are.
const BUNDLES: [&str; 6] = [
    "etc/ssl/certs/ca-certificates.crt",
    "etc/pki/tls/certs/ca-bundle.crt",
    "etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "etc/ssl/ca-bundle.pem",
    "etc/ssl/cert.pem",
    "etc/pki/tls/cacert.pem",
];
/// Bytes of a bundle at most; they have some 200 KiB.
const MAX_BUNDLE: u64 = 8 << 20;
const BEGIN: &str = "# begin: authority of this sandbox's egress proxy\n";
const END: &str = "# end: authority of this sandbox's egress proxy\n";

/// Variables that name all authorities; what they name takes the place of a program's own.
const OF_BUNDLE: [&str; 9] = [
    "AWS_CA_BUNDLE",
    "CARGO_HTTP_CAINFO",
    "CURL_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
    "NIX_SSL_CERT_FILE",
    "PIP_CERT",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_FILE",
];
/// Variables that name authorities beside a program's own.
const OF_AUTHORITY: [&str; 2] = ["DENO_CERT", "NODE_EXTRA_CA_CERTS"];

/// Environment of commands. One request changes it at a time.
static VARIABLES: Mutex<BTreeMap<&'static str, String>> = Mutex::new(BTreeMap::new());

/// The request makes no sense, or the guest cannot keep the authority.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TrustError {
    #[error("is not one certificate in PEM of at most {MAX_CERTIFICATE} bytes")]
    Certificate,
    #[error("cannot write {}", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// The variables that commands get.
pub(crate) fn variables() -> BTreeMap<&'static str, String> {
    VARIABLES.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Takes an authority on in place of the one before.
pub(crate) fn install(request: &TrustRequest) -> Result<TrustReply, TrustError> {
    let mut variables = VARIABLES.lock().unwrap_or_else(PoisonError::into_inner);
    let (reply, new) = install_below(Path::new("/"), request)?;
    *variables = new;
    Ok(reply)
}

/// The same below `root`; answers the variables as commands in it see them, too.
fn install_below(
    root: &Path,
    request: &TrustRequest,
) -> Result<(TrustReply, BTreeMap<&'static str, String>), TrustError> {
    let certificate = request.certificate_pem.as_deref().map(checked).transpose()?;
    let own = root.join(OWN);
    // The bundles may have been made anew with it since it was installed.
    let before = fs::read_to_string(&own).ok();
    let mut reply = TrustReply { files: Vec::new(), failed: Vec::new() };
    let shown = |path: &Path| format!("/{}", path.strip_prefix(root).unwrap_or(path).display());

    for anchor in ANCHORS.map(|anchor| root.join(anchor)) {
        if !anchor.parent().is_some_and(Path::is_dir) {
            continue;
        }
        match put(&anchor, certificate.as_deref()) {
            Ok(true) => reply.files.push(shown(&anchor)),
            Ok(false) => {}
            Err(error) => reply.failed.push(format!("{}: {error}", shown(&anchor))),
        }
    }
    let mut bundle = None;
    let mut seen = BTreeSet::new();
    for path in BUNDLES.map(|bundle| root.join(bundle)) {
        // Several of them are often links to one.
        let Ok(file) = fs::canonicalize(&path) else { continue };
        if !file.is_file() || !seen.insert(file.clone()) {
            continue;
        }
        match change(&file, before.as_deref(), certificate.as_deref()) {
            Ok(()) => {
                bundle.get_or_insert_with(|| shown(&path));
                reply.files.push(shown(&path));
            }
            Err(error) => reply.failed.push(format!("{}: {error}", shown(&path))),
        }
    }
    // Last: until it is there, the one before is still known, so that a request that failed half-way can be sent again.
    put(&own, certificate.as_deref()).map_err(|source| TrustError::Write { path: own.clone(), source })?;

    let mut variables = BTreeMap::new();
    if certificate.is_some() {
        reply.files.push(shown(&own));
        variables.extend(OF_AUTHORITY.map(|name| (name, shown(&own))));
        // Without a bundle these would take a program's own authorities away.
        if let Some(bundle) = bundle {
            variables.extend(OF_BUNDLE.map(|name| (name, bundle.clone())));
        }
    } else {
        reply.files.clear();
    }
    Ok((reply, variables))
}

/// The certificate as it is written: one block, lines as they came, a line feed at the end.
fn checked(pem: &str) -> Result<String, TrustError> {
    let text = pem.replace("\r\n", "\n");
    let inner = text
        .trim()
        .strip_prefix("-----BEGIN CERTIFICATE-----\n")
        .and_then(|t| t.strip_suffix("\n-----END CERTIFICATE-----"))
        .filter(|_| pem.len() <= MAX_CERTIFICATE)
        .ok_or(TrustError::Certificate)?;
    let data = STANDARD.decode(inner.replace('\n', "")).map_err(|_| TrustError::Certificate)?;
    // A sequence, as every certificate is.
    if data.first() != Some(&0x30) {
        return Err(TrustError::Certificate);
    }
    Ok(format!("{}\n", text.trim()))
}

/// Writes `content`, or removes the file when there is none; true when it has it now.
fn put(path: &Path, content: Option<&str>) -> io::Result<bool> {
    match content {
        Some(content) => {
            if let Some(above) = path.parent() {
                fs::create_dir_all(above)?;
            }
            replace(path, content, 0o644).map(|()| true)
        }
        None => match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(false),
        },
    }
}

/// Takes the authority before out of a bundle and puts `certificate` in.
fn change(bundle: &Path, before: Option<&str>, certificate: Option<&str>) -> io::Result<()> {
    let found = fs::metadata(bundle)?;
    if found.len() > MAX_BUNDLE {
        return Err(io::Error::other(format!("has {} bytes; at most {MAX_BUNDLE} are read", found.len())));
    }
    let text = fs::read_to_string(bundle)?;
    let changed = changed(&text, before, certificate);
    if changed == text { Ok(()) } else { replace(bundle, &changed, found.permissions().mode() & 0o777) }
}

/// The text of a bundle with `certificate` in place of ours of before.
fn changed(text: &str, before: Option<&str>, certificate: Option<&str>) -> String {
    let mut rest = text.to_owned();
    while let Some(begin) = rest.find(BEGIN) {
        // Without its end, what follows is somebody else's.
        let end = rest.get(begin..).and_then(|after| after.find(END)).map(|at| begin + at + END.len());
        rest.replace_range(begin..end.unwrap_or(begin + BEGIN.len()), "");
    }
    if let Some(before) = before.filter(|before| !before.trim().is_empty()) {
        rest = rest.replace(before, "");
    }
    if let Some(certificate) = certificate {
        if !rest.is_empty() && !rest.ends_with('\n') {
            rest.push('\n');
        }
        rest.extend([BEGIN, certificate, END]);
    }
    rest
}

/// In one step: a program that reads meanwhile sees the old file or the new one.
fn replace(path: &Path, content: &str, mode: u32) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".stasis-new");
    let new = PathBuf::from(name);
    let written = fs::write(&new, content)
        .and_then(|()| fs::set_permissions(&new, fs::Permissions::from_mode(mode)))
        .and_then(|()| fs::rename(&new, path));
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pem(seed: u8) -> String {
        let data = STANDARD.encode([&[0x30, 0x82], &[seed; 60][..]].concat());
        format!("-----BEGIN CERTIFICATE-----\n{}\n{}\n-----END CERTIFICATE-----\n", &data[..64], &data[64..])
    }

    fn trust(root: &Path, certificate: Option<String>) -> (TrustReply, BTreeMap<&'static str, String>) {
        install_below(root, &TrustRequest { certificate_pem: certificate }).unwrap()
    }

    fn debian() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        for below in ["etc/ssl/certs", "usr/local/share/ca-certificates"] {
            fs::create_dir_all(dir.path().join(below)).unwrap();
        }
        let bundle = dir.path().join(BUNDLES[0]);
        fs::write(&bundle, pem(1)).unwrap();
        std::os::unix::fs::symlink("certs/ca-certificates.crt", dir.path().join("etc/ssl/cert.pem")).unwrap();
        (dir, bundle)
    }

    #[test]
    fn an_authority_is_added_once_replaced_and_taken_away() {
        let (dir, bundle) = debian();
        let anchor = dir.path().join(ANCHORS[0]);
        let (reply, variables) = trust(dir.path(), Some(pem(2)));
        assert_eq!(reply.files, [format!("/{}", ANCHORS[0]), format!("/{}", BUNDLES[0]), format!("/{OWN}")]);
        assert!(reply.failed.is_empty());
        assert_eq!(variables["SSL_CERT_FILE"], "/etc/ssl/certs/ca-certificates.crt");
        assert_eq!(variables["NODE_EXTRA_CA_CERTS"], format!("/{OWN}"));
        let text = fs::read_to_string(&bundle).unwrap();
        assert!(text.starts_with(&pem(1)) && text.contains(&pem(2)));
        assert_eq!(trust(dir.path(), Some(pem(2))).0, reply);
        assert_eq!(fs::read_to_string(&bundle).unwrap(), text);

        // What the distribution's own tool makes of the anchor.
        fs::write(&bundle, [pem(1), pem(2)].concat()).unwrap();
        trust(dir.path(), Some(pem(3)));
        let text = fs::read_to_string(&bundle).unwrap();
        assert!(text.contains(&pem(1)) && text.contains(&pem(3)) && !text.contains(&pem(2)));
        assert_eq!(fs::read_to_string(&anchor).unwrap(), pem(3));

        let (reply, variables) = trust(dir.path(), None);
        assert_eq!(fs::read_to_string(&bundle).unwrap(), pem(1));
        assert!(!anchor.exists() && !dir.path().join(OWN).exists());
        assert!(variables.is_empty() && reply.files.is_empty());
    }

    #[test]
    fn an_image_without_a_bundle_keeps_its_programs_own_authorities() {
        let dir = tempfile::tempdir().unwrap();
        let (reply, variables) = trust(dir.path(), Some(pem(2)));
        assert_eq!(reply.files, [format!("/{OWN}")]);
        assert_eq!(variables.keys().copied().collect::<Vec<_>>(), OF_AUTHORITY);
    }

    #[test]
    fn a_bundle_keeps_its_mode_and_what_others_wrote() {
        let (dir, bundle) = debian();
        fs::set_permissions(&bundle, fs::Permissions::from_mode(0o444)).unwrap();
        fs::write(dir.path().join("etc/ssl/other"), "").unwrap();
        trust(dir.path(), Some(pem(2)));
        assert_eq!(fs::metadata(&bundle).unwrap().permissions().mode() & 0o777, 0o444);
        let half = format!("{}{BEGIN}{}", pem(1), pem(9));
        assert_eq!(changed(&half, None, None), [pem(1), pem(9)].concat());
        assert_eq!(changed("no line feed", None, Some(&pem(2))), format!("no line feed\n{BEGIN}{}{END}", pem(2)));
    }

    #[test]
    fn what_is_not_one_certificate_is_refused() {
        let (dir, bundle) = debian();
        let two = [pem(1), pem(2)].concat();
        let long = format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----", "MAAA".repeat(5000));
        for wrong in ["", "nonsense", &two, &long, "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----"] {
            let request = TrustRequest { certificate_pem: Some(wrong.to_owned()) };
            assert!(matches!(install_below(dir.path(), &request), Err(TrustError::Certificate)), "{wrong:?}");
        }
        assert_eq!(fs::read_to_string(&bundle).unwrap(), pem(1));
        let windows = pem(2).replace('\n', "\r\n");
        assert_eq!(checked(&windows).unwrap(), pem(2));
    }
}
