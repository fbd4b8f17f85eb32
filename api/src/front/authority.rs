//! The certificates of `stasis dev`: an authority of its own, kept in the data directory, and a server certificate that is made anew at each
//! start. The authority may sign for the names of this one domain and for the loopback alone, so whoever trusts it trusts it for no more.

use crate::error::Error;
use crate::invoke::Domain;
use crate::sources::{Sources, UnixMs};
use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    GeneralSubtree, IsCa, Issuer, KeyPair, KeyUsagePurpose, NameConstraints, SanType, date_time_ymd,
};
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// The authority's certificate, for clients to trust.
pub const CA: &str = "ca.pem";
const CA_KEY: &str = "ca.key";
/// The server's certificate.
pub const LEAF: &str = "server.pem";
/// The server's key.
pub const LEAF_KEY: &str = "server.key";

/// Years of the authority's life.
const CA_YEARS: i32 = 10;
/// Years of the server certificate's life, of which a start uses the first.
const LEAF_YEARS: i32 = 1;

/// Where everything is.
#[derive(Clone, Debug)]
pub struct Authority {
    /// The authority's certificate.
    pub ca: PathBuf,
    /// The server's certificate.
    pub cert: PathBuf,
    /// The server's key.
    pub key: PathBuf,
}

impl Authority {
    /// Makes what is missing in `dir`: the authority once for each domain, the server's certificate each time.
    pub fn prepare(dir: &Path, domain: &Domain, sources: &Sources) -> Result<Self, Error> {
        let failed = |action: &str| {
            let action = action.to_owned();
            move |source| Error::Local { action, source }
        };
        fs::create_dir_all(dir).map_err(failed("create the directory of certificates"))?;
        let (ca_path, ca_key_path) = (dir.join(CA), dir.join(CA_KEY));
        let now = year(sources.now_ms());
        let known = read_authority(&ca_path, &ca_key_path, domain).map_err(failed("read the authority"))?;
        let (ca_key, born) = if let Some(known) = known.filter(|(_, born)| now < born + CA_YEARS - LEAF_YEARS) {
            known
        } else {
            let key = KeyPair::generate().map_err(io::Error::other).map_err(failed("make a key"))?;
            let made = authority(domain, now)
                .and_then(|params| params.self_signed(&key))
                .map_err(io::Error::other)
                .map_err(failed("make the authority"))?;
            // The key first: a certificate without its key would be taken for whole.
            write(&ca_key_path, &key.serialize_pem(), 0o600).map_err(failed("keep the authority's key"))?;
            write(&ca_path, &(header(domain, now) + &made.pem()), 0o644).map_err(failed("keep the authority"))?;
            (key, now)
        };
        let made = authority(domain, born).and_then(|params| {
            let issuer = Issuer::new(params, ca_key);
            let key = KeyPair::generate()?;
            let cert = server(domain, now)?.signed_by(&key, &issuer)?;
            Ok((cert, key))
        });
        let (cert, key) = made.map_err(io::Error::other).map_err(failed("make the server's certificate"))?;
        write(&dir.join(LEAF_KEY), &key.serialize_pem(), 0o600).map_err(failed("keep the server's key"))?;
        write(&dir.join(LEAF), &cert.pem(), 0o644).map_err(failed("keep the server's certificate"))?;
        Ok(Self { ca: ca_path, cert: dir.join(LEAF), key: dir.join(LEAF_KEY) })
    }
}

/// First line of the authority's file: what its certificate is made of beside its key.
fn header(domain: &Domain, born: i32) -> String {
    format!("# stasis dev, {}, {born}\n", domain.name())
}

/// The authority's key and the year it was made; none when there is none for this domain.
fn read_authority(ca: &Path, key: &Path, domain: &Domain) -> io::Result<Option<(KeyPair, i32)>> {
    let read = |path: &Path| match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    };
    let (Some(text), Some(key)) = (read(ca)?, read(key)?) else { return Ok(None) };
    let born = text.lines().next().and_then(|line| line.rsplit(", ").next()).and_then(|year| year.parse().ok());
    let Some(born) = born.filter(|born| text.starts_with(&header(domain, *born))) else { return Ok(None) };
    KeyPair::from_pem(&key).map(|key| Some((key, born))).map_err(io::Error::other)
}

fn named(name: &str) -> DistinguishedName {
    let mut out = DistinguishedName::new();
    out.push(DnType::CommonName, name);
    out
}

/// From the first day of the year before, for clocks that differ.
fn lifetime(params: &mut CertificateParams, from: i32, years: i32) {
    params.not_before = date_time_ymd(from - 1, 12, 1);
    params.not_after = date_time_ymd(from + years, 12, 31);
}

fn authority(domain: &Domain, born: i32) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name = named(&format!("stasis dev authority for {}", domain.name()));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.name_constraints = Some(NameConstraints {
        permitted_subtrees: vec![
            GeneralSubtree::DnsName(domain.name().to_owned()),
            GeneralSubtree::DnsName("localhost".to_owned()),
            GeneralSubtree::IpAddress(CidrSubnet::from_v4_prefix(Ipv4Addr::LOCALHOST.octets(), 8)),
            GeneralSubtree::IpAddress(CidrSubnet::from_v6_prefix(Ipv6Addr::LOCALHOST.octets(), 128)),
        ],
        excluded_subtrees: Vec::new(),
    });
    lifetime(&mut params, born, CA_YEARS);
    Ok(params)
}

fn server(domain: &Domain, now: i32) -> Result<CertificateParams, rcgen::Error> {
    let names = vec![domain.name().to_owned(), format!("*.{}", domain.name()), "localhost".to_owned()];
    let mut params = CertificateParams::new(names)?;
    for address in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
        params.subject_alt_names.push(SanType::IpAddress(address));
    }
    params.distinguished_name = named(domain.name());
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    lifetime(&mut params, now, LEAF_YEARS);
    Ok(params)
}

fn year(now: UnixMs) -> i32 {
    crate::sources::rfc3339(now).get(..4).and_then(|year| year.parse().ok()).unwrap_or(1970)
}

/// Whole or not at all.
fn write(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    let new = path.with_extension("new");
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&new)?;
    file.write_all(text.as_bytes())?;
    fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn the_authority_stays_and_its_key_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let (domain, sources) = (Domain::parse("box.test:8443").unwrap(), Sources::system());
        let made = Authority::prepare(dir.path(), &domain, &sources).unwrap();
        let ca = fs::read(&made.ca).unwrap();
        let leaf = fs::read(&made.cert).unwrap();
        for key in [CA_KEY, LEAF_KEY] {
            assert_eq!(fs::metadata(dir.path().join(key)).unwrap().permissions().mode() & 0o777, 0o600);
        }
        Authority::prepare(dir.path(), &domain, &sources).unwrap();
        assert_eq!(fs::read(&made.ca).unwrap(), ca);
        assert_ne!(fs::read(&made.cert).unwrap(), leaf);
        // Another domain needs another authority.
        Authority::prepare(dir.path(), &Domain::parse("other.test").unwrap(), &sources).unwrap();
        assert_ne!(fs::read(&made.ca).unwrap(), ca);
    }
}
