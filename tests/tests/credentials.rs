//! A credential that a guest uses and never has, against a real HTTPS server: the header arrives, the guest's memory and disks do not hold it,
//! nor does anything else but the journal of the host that was given it; and a client that pins the server is refused, clearly and soon.
//!
//! Needs what `walls` needs.

use std::net::TcpListener;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::json;
use stasis_snapshot::commit::Head;
use stasis_snapshot::image::PageRef;
use stasis_snapshot::manifest::{ImageKind, Manifest};
use stasis_snapshot::{pack, page::PAGE_SIZE};
use stasis_tests::site::{self, SHARED, Site, files_holding, holds};
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::Error;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

/// What the server is asked for with, and no guest may have.
const SECRET: &str = "s3cret-Ohpheex7aiv0Gaec";
/// What the guest sends itself, and keeps in the environment of a program that runs on: a search of its memory that finds this finds.
const OWN: &str = "own-eiShoh5ahThaiNga";
/// What the guest writes on its disk.
const WRITTEN: &str = "written-ieT3ahch7Eenge8u";
/// Longest that a refusal may take, in the rig.
const SOON: Duration = Duration::from_secs(30);

/// Heads of the requests that the server got.
type Heads = Arc<Mutex<Vec<String>>>;

fn main() {
    let lacking = site::lacking();
    let mut listener = None;
    if lacking.is_none() {
        let laid_out = site::lay_out(&[], || {
            listener = Some(TcpListener::bind((SHARED, 443))?);
            Ok(())
        });
        if let Err(error) = laid_out {
            eprintln!("the test's own network cannot be made: {error}");
            std::process::exit(1);
        }
    }
    Suite::default().test("a_guest_uses_a_credential_that_it_never_has", lacking, move || credential(listener)).main();
}

/// An authority of the site, and the server's certificate by it: PEM of the first, and what a server needs of the second.
fn certificates() -> Result<(String, Arc<ServerConfig>), Error> {
    let key = KeyPair::generate()?;
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.distinguished_name.push(rcgen::DnType::CommonName, "the site's authority");
    let pem = authority.self_signed(&key)?.pem();
    let own = KeyPair::generate()?;
    let names = ["api.example.com", "plain.example.com"].map(str::to_owned);
    let certificate = CertificateParams::new(names)?.signed_by(&own, &Issuer::new(authority, key))?;
    let own = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(own.serialize_der()));
    let builder = ServerConfig::builder_with_provider(Arc::new(default_provider()));
    let builder = builder.with_safe_default_protocol_versions()?.with_no_client_auth();
    Ok((pem, Arc::new(builder.with_single_cert(vec![certificate.der().clone()], own)?)))
}

/// Keeps each request's head and says nothing of it: an answer with the secret would bring it to the guest.
async fn serve(listener: TcpListener, tls: Arc<ServerConfig>, heads: Heads) -> Result<(), Error> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let acceptor = TlsAcceptor::from(tls);
    loop {
        let (stream, _) = listener.accept().await?;
        let (acceptor, heads) = (acceptor.clone(), heads.clone());
        tokio::spawn(async move {
            let Ok(mut stream) = acceptor.accept(stream).await else { return };
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                match stream.read_u8().await {
                    Ok(byte) => head.push(byte),
                    Err(_) => return,
                }
            }
            let head = String::from_utf8_lossy(&head).to_lowercase();
            heads.lock().unwrap_or_else(PoisonError::into_inner).push(head);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\nconnection: close\r\n\r\nok\n").await;
            let _ = stream.shutdown().await;
        });
    }
}

/// The content of the paused sandbox's images as its packs have it, one after the other: memory, disks. What equals the template is left out.
async fn images(site: &Site, id: &str) -> Result<[Vec<u8>; 2], Error> {
    let store = site.service.store()?;
    let head = Head::decode(&store.get(&format!("v1/test/sandbox/{id}/head")).await?.bytes)?;
    let named = head.manifest.ok_or("the head names no manifest")?;
    let manifest = Manifest::decode_checked(&store.get(&named.key).await?.bytes, named.digest)?;
    let mut frames = Vec::new();
    for entry in &manifest.packs {
        let bytes = store.get(&entry.key).await?.bytes;
        let decode = |(number, frame): (u32, &pack::FrameEntry)| {
            let stored = &bytes[frame.offset as usize..][..frame.stored_len as usize];
            pack::decode_frame(frame, number, stored, None)
        };
        frames.push((0..).zip(&entry.frames).map(decode).collect::<Result<Vec<_>, _>>()?);
    }
    let [mut memory, mut disks] = [Vec::new(), Vec::new()];
    for image in &manifest.images {
        let content = if image.kind == ImageKind::Memory { &mut memory } else { &mut disks };
        for run in image.map.runs() {
            match run.at {
                PageRef::Pack { pack, frame, index } => {
                    let from = index as usize * PAGE_SIZE;
                    let pages = &frames[pack as usize][frame as usize][from..][..run.pages as usize * PAGE_SIZE];
                    content.extend_from_slice(pages);
                }
                // So that what is on both sides of it does not become one.
                PageRef::Zero | PageRef::Base { .. } => content.push(0),
            }
        }
    }
    Ok([memory, disks])
}

async fn credential(listener: Option<TcpListener>) -> Outcome {
    let keys = tempfile::tempdir()?;
    let (authority, tls) = certificates()?;
    let file = keys.path().join("site.pem");
    std::fs::write(&file, &authority)?;
    let heads = Heads::default();
    tokio::spawn(serve(listener.ok_or("no listener")?, tls, heads.clone()));
    let taken = || std::mem::take(&mut *heads.lock().unwrap_or_else(PoisonError::into_inner));

    let site = Site::start(&format!("authorities = [\"{}\"]", file.display())).await?;
    let policy = json!({
        "mode": "custom", "allow_domains": ["plain.example.com"],
        "transforms": [{
            "domain": "api.example.com", "inject_headers": {"authorization": SECRET}, "strip_headers": ["x-guest"],
        }],
    });
    let id = site.create(policy).await?;
    site.say("made");
    let run = async |command: &str| -> Result<(i64, String), Error> {
        let done = site.run(&id, command).await?;
        site.say(command);
        let said = format!("{}{}", done["stdout"].as_str().unwrap_or(""), done["stderr"].as_str().unwrap_or(""));
        Ok((done["exit_code"].as_i64().ok_or("no exit code")?, said))
    };

    // The header arrives, whatever the guest says in its place, and the guest's own is gone. Its programs trust the proxy without being told.
    let curl =
        format!("curl -sS -m 120 -H 'X-Guest: {OWN}' -H 'Authorization: mine' https://api.example.com/v1/things");
    let python = "python3 -c 'import urllib.request as r; print(r.urlopen(\"https://api.example.com/py\").read())'";
    for (command, path) in [(curl.as_str(), "get /v1/things "), (python, "get /py ")] {
        let (code, said) = run(command).await?;
        let got = taken();
        assert!(code == 0 && said.contains("ok"), "{code}: {said}");
        let head = got.first().ok_or("the server got nothing")?;
        assert!(
            head.starts_with(path) && head.contains(&format!("authorization: {}\r\n", SECRET.to_lowercase())),
            "{head}"
        );
        assert!(got.len() == 1 && !head.contains("x-guest") && !head.contains("mine"), "{got:?}");
    }

    // A domain without a transform is not looked into: what arrives is the server's own certificate, which this guest does not know.
    let (code, said) = run("curl -sS -m 120 https://plain.example.com/").await?;
    assert!(code == 60 && taken().is_empty(), "{code}: {said}");
    let encoded = STANDARD.encode(&authority);
    // What curl had in memory was free when it ended, and free memory is given back to the host.
    run(&format!("OWN={OWN} setsid sleep 100000 >/dev/null 2>&1 &")).await?;
    run(&format!("echo {encoded} | base64 -d > /root/site.pem; echo {WRITTEN} > /root/written; sync")).await?;
    let (code, said) = run("curl -sS -m 120 --cacert /root/site.pem https://plain.example.com/").await?;
    let got = taken();
    assert!(code == 0 && got.len() == 1 && !got[0].contains("authorization"), "{code}: {said}, {got:?}");

    // A client that takes the real server's authority alone, for a domain whose TLS the proxy ends.
    let begun = Instant::now();
    let (code, said) = run("curl -sS -m 120 --cacert /root/site.pem https://api.example.com/").await?;
    assert!(code == 60 && begun.elapsed() < SOON, "{code} after {:?}: {said}", begun.elapsed());
    assert!(taken().is_empty(), "nothing was asked of the server");
    let refusals = site.refusals(&id).await?;
    assert!(refusals.iter().any(|line| line.ends_with("api.example.com client-distrust")), "{refusals:?}");

    // Shown nowhere.
    let network = site.network(&id).await?;
    let record = site.service.call("GET", &format!("/v1/sandbox/{id}"), None).await?.expect(200)?.json;
    for shown in [&network, &record] {
        assert!(!shown.to_string().contains(SECRET) && shown.to_string().contains("[redacted]"), "{shown}");
    }

    // After a pause all of the guest lies in the store.
    site.service.pause(&id).await?.expect(201)?;
    let [memory, disks] = images(&site, &id).await?;
    site.say(&format!("{} MiB of memory, {} MiB of disk", memory.len() >> 20, disks.len() >> 20));
    assert!(holds(&memory, OWN.as_bytes()), "the search does not find what the guest had in memory");
    assert!(holds(&disks, WRITTEN.as_bytes()), "the search does not find what the guest wrote");
    for (what, content) in [("memory", &memory), ("disks", &disks)] {
        assert!(!holds(content, SECRET.as_bytes()), "the credential is in the guest's {what}");
    }
    let files = files_holding(site.service.dir.path(), SECRET.as_bytes());
    let journal = |path: &std::path::PathBuf| path.display().to_string().contains("/journal.db");
    assert!(!files.is_empty() && files.iter().all(journal), "{files:?}");

    // It is still used after a wake.
    site.service.resume(&id).await?.expect(200)?;
    let (code, said) = run(&curl).await?;
    let got = taken();
    assert!(code == 0 && got.len() == 1 && got[0].contains(&SECRET.to_lowercase()), "{code}: {said}, {got:?}");
    Ok(())
}
