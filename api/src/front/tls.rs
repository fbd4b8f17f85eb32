//! Certificate and key, from files or from memory. ring does the cryptography; TLS 1.2 and 1.3; HTTP/2 before HTTP/1.1.

use crate::config;
use crate::error::Error;
use std::path::Path;
use std::sync::Arc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// What the configuration asks for; none when it asks for none.
pub fn of(config: &config::Tls) -> Result<Option<TlsAcceptor>, Error> {
    let (Some(cert), Some(key)) = (&config.cert, &config.key) else { return Ok(None) };
    let wrong = |field: &str, path: &Path, error: &dyn std::fmt::Display| {
        Error::Host(format!("cannot use {} ({field}): {error}", path.display()))
    };
    let chain = CertificateDer::pem_file_iter(cert)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| wrong("tls.cert", cert, &e))?;
    if chain.is_empty() {
        return Err(wrong("tls.cert", cert, &"there is no certificate in it"));
    }
    let key_der = PrivateKeyDer::from_pem_file(key).map_err(|e| wrong("tls.key", key, &e))?;
    let mut server = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| wrong("tls.cert", cert, &e))?
        .with_no_client_auth()
        .with_single_cert(chain, key_der)
        .map_err(|e| wrong("tls.key", key, &e))?;
    server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Some(TlsAcceptor::from(Arc::new(server))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::front::authority::{Authority, LEAF, LEAF_KEY};
    use crate::invoke::Domain;
    use crate::sources::Sources;
    use std::path::PathBuf;

    fn config(cert: PathBuf, key: PathBuf) -> config::Tls {
        config::Tls { cert: Some(cert), key: Some(key), plain: false }
    }

    #[test]
    fn files_that_are_no_certificate_and_key_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let domain = Domain::parse("box.test").unwrap();
        Authority::prepare(dir.path(), &domain, &Sources::system()).unwrap();
        let (cert, key, junk) = (dir.path().join(LEAF), dir.path().join(LEAF_KEY), dir.path().join("junk"));
        std::fs::write(&junk, "junk").unwrap();
        assert!(of(&config::Tls::default()).unwrap().is_none());
        assert!(of(&config(cert.clone(), key.clone())).unwrap().is_some());
        for (cert, key, field) in [
            (&junk, &key, "tls.cert"),
            (&cert, &junk, "tls.key"),
            (&dir.path().join("none"), &key, "tls.cert"),
            (&cert, &dir.path().join("none"), "tls.key"),
        ] {
            let error = of(&config(cert.clone(), key.clone())).err().unwrap().to_string();
            assert!(error.contains(field), "{error}");
        }
        // A key of another certificate.
        let other = tempfile::tempdir().unwrap();
        Authority::prepare(other.path(), &domain, &Sources::system()).unwrap();
        assert!(of(&config(cert, other.path().join(LEAF_KEY))).is_err());
    }
}
