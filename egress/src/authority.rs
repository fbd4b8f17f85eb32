//! A sandbox's certificate authority: made by the supervisor, installed in the guest by its agent, used here to end TLS for the domains of
//! transforms. It can vouch for nothing outside its own guest.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use time::{Duration, OffsetDateTime};
use tokio_rustls::rustls::crypto::ring::sign::any_supported_type;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_rustls::rustls::sign::{CertifiedKey, SigningKey};

use crate::control::types::{Authority, Secret};
use crate::names::Name;

/// An authority lives as long as any sandbox may.
const AUTHORITY_LIFE: Duration = Duration::days(3650);
/// A certificate of a server is made anew before this is over; some clients take no longer ones.
const LEAF_LIFE: Duration = Duration::days(90);
/// When a kept certificate of a server is made anew.
const LEAF_REUSE: Duration = Duration::days(30);
/// Before now: a guest's clock may be late.
const SKEW: Duration = Duration::days(2);
/// Certificates of servers that are kept.
const MAX_LEAVES: usize = 64;

/// An authority makes no sense, or a certificate could not be made.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// rcgen says why.
    #[error("cannot {doing}")]
    Certificate {
        /// What.
        doing: &'static str,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
    /// rustls says why.
    #[error("cannot use the authority's key for TLS")]
    Key(#[source] tokio_rustls::rustls::Error),
}

fn failed(doing: &'static str) -> impl FnOnce(rcgen::Error) -> AuthorityError {
    move |source| AuthorityError::Certificate { doing, source }
}

/// Makes an authority called `name`, with a fresh key.
pub fn make(name: &str) -> Result<Authority, AuthorityError> {
    let key = KeyPair::generate().map_err(failed("make a key"))?;
    let certificate = params(name).self_signed(&key).map_err(failed("make the authority's certificate"))?;
    Ok(Authority {
        name: name.to_owned(),
        certificate_pem: certificate.pem(),
        key_pem: Secret::new(key.serialize_pem()),
    })
}

/// The authority's certificate. The issuer of a server's must be called the same and have the same key.
fn params(name: &str) -> CertificateParams {
    let now = OffsetDateTime::now_utc();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    (params.not_before, params.not_after) = (now - SKEW, now + AUTHORITY_LIFE);
    params
}

/// An authority at work.
pub(crate) struct Issuing {
    issuer: Issuer<'static, KeyPair>,
    /// Of all servers' certificates: what it vouches for is this process, whatever it is called.
    key: KeyPair,
    signing: Arc<dyn SigningKey>,
    leaves: Mutex<HashMap<Name, (OffsetDateTime, Arc<CertifiedKey>)>>,
}

impl Issuing {
    pub(crate) fn new(authority: &Authority) -> Result<Self, AuthorityError> {
        let own = KeyPair::from_pem(authority.key_pem.reveal()).map_err(failed("read the authority's key"))?;
        let key = KeyPair::generate().map_err(failed("make a key"))?;
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let signing = any_supported_type(&der).map_err(AuthorityError::Key)?;
        Ok(Self { issuer: Issuer::new(params(&authority.name), own), key, signing, leaves: Mutex::default() })
    }

    /// A certificate for `name`.
    pub(crate) fn leaf(&self, name: &Name) -> Result<Arc<CertifiedKey>, AuthorityError> {
        let now = OffsetDateTime::now_utc();
        if let Some((made, leaf)) = self.leaves.lock().unwrap_or_else(PoisonError::into_inner).get(name)
            && now - *made < LEAF_REUSE
        {
            return Ok(Arc::clone(leaf));
        }
        let mut params = CertificateParams::new([name.to_string()]).map_err(failed("name a server's certificate"))?;
        params.distinguished_name = DistinguishedName::new();
        // A common name has 64 bytes at most; clients read the alternative name.
        let common = if name.as_str().len() <= 64 { name.as_str() } else { "stasis egress" };
        params.distinguished_name.push(DnType::CommonName, common);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        (params.not_before, params.not_after) = (now - SKEW, now + LEAF_LIFE);
        let signed = params.signed_by(&self.key, &self.issuer).map_err(failed("make a server's certificate"))?;
        let chain = vec![CertificateDer::from(signed.der().to_vec())];
        let leaf = Arc::new(CertifiedKey::new(chain, Arc::clone(&self.signing)));
        let mut leaves = self.leaves.lock().unwrap_or_else(PoisonError::into_inner);
        if leaves.len() >= MAX_LEAVES {
            let oldest = leaves.iter().min_by_key(|(_, (made, _))| *made).map(|(name, _)| name.clone());
            oldest.and_then(|name| leaves.remove(&name));
        }
        leaves.insert(name.clone(), (now, Arc::clone(&leaf)));
        Ok(leaf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use tokio_rustls::rustls::client::WebPkiServerVerifier;
    use tokio_rustls::rustls::client::danger::ServerCertVerifier as _;
    use tokio_rustls::rustls::crypto::ring::default_provider;
    use tokio_rustls::rustls::pki_types::pem::PemObject as _;
    use tokio_rustls::rustls::pki_types::{ServerName, UnixTime};
    use tokio_rustls::rustls::{RootCertStore, SignatureScheme};

    fn verify(authority: &Authority, leaf: &CertifiedKey, name: &str) -> bool {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(authority.certificate_pem.as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(default_provider());
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
        assert!(verifier.supported_verify_schemes().contains(&SignatureScheme::ECDSA_NISTP256_SHA256));
        let name = ServerName::try_from(name.to_owned()).unwrap();
        verifier.verify_server_cert(&leaf.cert[0], &[], &name, &[], UnixTime::now()).is_ok()
    }

    #[test]
    fn servers_certificates_are_trusted_with_their_own_authority_alone() {
        let (ours, other) = (make("one").unwrap(), make("one").unwrap());
        let issuing = Issuing::new(&ours).unwrap();
        let long = format!("{}.example.com", "a".repeat(63));
        for name in ["api.example.com", &long] {
            let leaf = issuing.leaf(&Name::parse(name.as_bytes()).unwrap()).unwrap();
            assert!(verify(&ours, &leaf, name));
            assert!(!verify(&other, &leaf, name) && !verify(&ours, &leaf, "other.example.com"));
        }
    }

    #[test]
    fn certificates_are_kept_and_bounded() {
        let issuing = Issuing::new(&make("x").unwrap()).unwrap();
        let name = |i: usize| Name::parse(format!("n{i}.example.com").as_bytes()).unwrap();
        let first = issuing.leaf(&name(0)).unwrap();
        assert!(Arc::ptr_eq(&first, &issuing.leaf(&name(0)).unwrap()));
        for i in 0..2 * MAX_LEAVES {
            issuing.leaf(&name(i)).unwrap();
        }
        assert_eq!(issuing.leaves.lock().unwrap().len(), MAX_LEAVES);
    }

    #[test]
    fn what_is_no_key_is_refused_without_being_shown() {
        let wrong = Authority { key_pem: Secret::new("s3cret".to_owned()), ..make("x").unwrap() };
        let error = Issuing::new(&wrong).err().unwrap();
        assert!(!format!("{error} {error:?}").contains("s3cret"));
    }
}
