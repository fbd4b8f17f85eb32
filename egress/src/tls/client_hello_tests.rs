//! Client hellos as clients send them, in pieces, and as nobody should.

use super::*;
use proptest::prelude::*;
use std::sync::Arc;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore};

/// What rustls says to `name`.
fn real(name: &str, alpn: &[&[u8]]) -> Vec<u8> {
    // Named, since other crates of the workspace bring another provider.
    let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()));
    let builder = builder.with_safe_default_protocol_versions().unwrap();
    let mut config = builder.with_root_certificates(RootCertStore::empty()).with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut connection = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut bytes = Vec::new();
    connection.write_tls(&mut bytes).unwrap();
    bytes
}

/// A ClientHello with these extensions, as a handshake message.
fn message(extensions: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let vector = |content: &[u8]| [&u16::try_from(content.len()).unwrap().to_be_bytes()[..], content].concat();
    let extensions: Vec<u8> =
        extensions.iter().flat_map(|(kind, content)| [&kind.to_be_bytes()[..], &vector(content)].concat()).collect();
    let body = [&[3, 3][..], &[7; 32], &[0], &vector(&[0x13, 1]), &[1, 0], &vector(&extensions)].concat();
    [&[1][..], &u32::try_from(body.len()).unwrap().to_be_bytes()[1..], &body].concat()
}

/// In records of `size` bytes of content.
fn records(message: &[u8], size: usize) -> Vec<u8> {
    message
        .chunks(size)
        .flat_map(|part| [&[22, 3, 1][..], &u16::try_from(part.len()).unwrap().to_be_bytes(), part].concat())
        .collect()
}

fn sni(name: &[u8]) -> (u16, Vec<u8>) {
    let one = [&[0][..], &u16::try_from(name.len()).unwrap().to_be_bytes(), name].concat();
    (0, [&u16::try_from(one.len()).unwrap().to_be_bytes()[..], &one].concat())
}

fn read(bytes: &[u8]) -> Result<Option<ClientHello>, HelloError> {
    Reader::default().read(bytes)
}

fn of(extensions: &[(u16, Vec<u8>)]) -> Result<Option<ClientHello>, HelloError> {
    read(&records(&message(extensions), 1 << 14))
}

fn name(text: &str) -> Name {
    Name::parse(text.as_bytes()).unwrap()
}

#[test]
fn a_real_one_is_read_and_its_protocols_are_known() {
    let hello = read(&real("API.example.com", &[b"h2", b"http/1.1"])).unwrap().unwrap();
    assert_eq!(hello.server_name, Some(name("api.example.com")));
    assert_eq!(hello.alpn, [b"h2".to_vec(), b"http/1.1".to_vec()]);
    assert!(!hello.encrypted);
    // rustls sends no SNI for an address.
    assert_eq!(read(&real("192.0.2.1", &[])).unwrap().unwrap().server_name, None);
}

#[test]
fn grease_says_nothing_and_an_encrypted_hello_is_seen() {
    let grease = [(0x0a0a, vec![]), sni(b"a.example"), (0xfafa, vec![0])];
    let hello = of(&grease).unwrap().unwrap();
    assert_eq!((hello.server_name, hello.encrypted), (Some(name("a.example")), false));
    let hidden = of(&[sni(b"a.example"), (0xfe0d, vec![0; 40])]).unwrap().unwrap();
    assert!(hidden.encrypted);
}

#[test]
fn what_could_be_read_in_two_ways_is_refused() {
    let two_names = {
        let one = [&[0, 0, 9][..], b"a.example"].concat();
        let list = [one.clone(), one].concat();
        (0, [&u16::try_from(list.len()).unwrap().to_be_bytes()[..], &list].concat())
    };
    for extensions in
        [vec![sni(b"a.example"), sni(b"b.example")], vec![two_names], vec![(0, vec![])], vec![(0, vec![0, 0])]]
    {
        assert!(matches!(of(&extensions), Err(HelloError::Malformed(_))), "{extensions:?}");
    }
    assert_eq!(of(&[sni(b"1.2.3.4")]), Err(HelloError::ServerName(NameError::Address)));
    assert_eq!(of(&[sni(b"a.example\0.evil.org")]), Err(HelloError::ServerName(NameError::Malformed)));
    assert_eq!(of(&[sni(b"")]), Err(HelloError::ServerName(NameError::Malformed)));
    let followed = [message(&[sni(b"a.example")]), message(&[sni(b"b.example")])].concat();
    assert!(matches!(read(&records(&followed, 1 << 14)), Err(HelloError::Malformed(_))));
    let bytes = records(&message(&[sni(b"a.example")]), 20);
    let interrupted = [&bytes[..25], &[21, 3, 3, 0, 2, 1, 0], &bytes[25..]].concat();
    assert!(matches!(read(&interrupted), Err(HelloError::Malformed(_))));
}

#[test]
fn what_is_no_tls_is_known_by_its_first_bytes() {
    for bytes in
        [&b"GET / HTTP/1.1\r\n"[..], &[22, 2], &[22, 3, 1, 0, 0], &[22, 3, 1, 0xff, 0xff], &[22, 3, 1, 0, 1, 2]]
    {
        assert!(read(bytes).is_err(), "{bytes:?}");
    }
    assert_eq!(read(&[]), Ok(None));
}

#[test]
fn large_ones_are_refused_before_they_are_here() {
    assert_eq!(read(&[22, 3, 1, 0, 4, 1, 0xff, 0, 0]), Err(HelloError::TooLarge));
    let endless = records(&vec![1; 1 << 20][..], 1);
    assert_eq!(
        read(&[&records(&message(&[(9, vec![0; 15000])]), 1)[..MAX_BYTES], &endless].concat()),
        Err(HelloError::TooLarge)
    );
    assert!(of(&[sni(b"a.example"), (41, vec![0; 12000])]).unwrap().is_some());
}

proptest! {
    #[test]
    fn however_it_is_cut_the_same_is_read(size in 1_usize..400, mut cuts in prop::collection::vec(0_usize..3000, 0..8)) {
        let bytes = real("api.example.com", &[b"h2"]);
        let bytes = records(&bytes[5..], size);
        prop_assume!(bytes.len() <= MAX_BYTES);
        cuts.retain(|cut| *cut < bytes.len());
        cuts.sort_unstable();
        let mut reader = Reader::default();
        for cut in cuts {
            prop_assert_eq!(reader.read(&bytes[..cut]), Ok(None));
        }
        prop_assert_eq!(reader.read(&bytes).unwrap().unwrap().server_name, Some(name("api.example.com")));
    }

    #[test]
    fn bytes_of_a_stranger_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..300), keep in 0_usize..60) {
        let real = real("api.example.com", &[b"h2"]);
        bytes.splice(0..0, real[..keep].iter().copied());
        let whole = read(&bytes);
        // What is refused or complete stays so, whatever comes after it in further reads.
        let mut reader = Reader::default();
        let mut parts = Ok(None);
        for end in 0..=bytes.len() {
            parts = reader.read(&bytes[..end]);
            if !matches!(parts, Ok(None)) {
                break;
            }
        }
        if matches!(whole, Ok(None)) {
            prop_assert_eq!(parts, Ok(None));
        }
    }
}
