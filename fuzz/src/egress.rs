//! What a guest says to the egress proxy: first bytes of a connection, requests, DNS questions.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use hickory_proto::op::Message;
use http_body_util::Empty;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use stasis_egress::dns::question::Question;
use stasis_egress::proxy::opening::{Opening, Openings};
use stasis_egress::proxy::target;
use stasis_egress::tls::client_hello::MAX_BYTES;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::alloc::peak_of;

/// Read at once and byte by byte, the same is found, in bounded memory; the name that is found stands in the input.
pub fn opening(input: &[u8]) {
    let (whole, peak) = peak_of(|| Openings::default().read(input));
    assert!(peak <= (64 << 10) + 8 * input.len().min(MAX_BYTES), "{peak} bytes for {} of input", input.len());
    let mut openings = Openings::default();
    let parts = (1..=input.len()).find_map(|end| openings.read(&input[..end]));
    match (&whole, &parts) {
        // What follows in the same read may be a reason to refuse; it is never one to find another name.
        (Some(Opening::Tls(all)), Some(Opening::Tls(first))) => assert_eq!(all, first),
        (None, found) => assert_eq!(*found, None),
        (Some(Opening::Tls(_)), other) => panic!("whole it is TLS, in parts {other:?}"),
        _ => {}
    }
    if let Some(Opening::Tls(hello)) = whole
        && let Some(name) = hello.server_name
    {
        // Records may cut it.
        let letters = |bytes: &[u8]| -> Vec<u8> { bytes.iter().map(u8::to_ascii_lowercase).collect() };
        let (input, name) = (letters(input), letters(name.as_str().as_bytes()));
        let mut rest = input.iter();
        assert!(name.iter().all(|byte| rest.any(|other| other == byte)), "the name is not in the input");
    }
}

/// Whatever is taken for a request names its destination in so many words, once.
pub fn request(input: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let names = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&names);
    runtime.block_on(async {
        let (mut client, server) = tokio::io::duplex(input.len().max(1));
        client.write_all(input).await.expect("a duplex takes its size");
        client.shutdown().await.expect("a duplex ends");
        let service = service_fn(move |request: Request<Incoming>| {
            let (parts, _) = request.into_parts();
            if let Ok(name) = target::name(&parts) {
                assert!(parts.headers.get_all("host").iter().count() <= 1);
                seen.lock().expect("one thread").push(name);
            }
            async { Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new())) }
        });
        let reader = tokio::spawn(async move { client.read_to_end(&mut Vec::new()).await });
        let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(server), service).await;
        let _ = reader.await;
    });
    let text = input.to_ascii_lowercase();
    for name in names.lock().expect("one thread").iter() {
        let name = name.as_str().as_bytes();
        assert!(text.windows(name.len()).any(|part| part == name), "the name is not in the input");
    }
}

/// An answer answers the question that was asked, and fits.
pub fn question(input: &[u8]) {
    let Ok(question) = Question::parse(input) else { return };
    let addresses = [[1, 2, 3, 4].into(); 60];
    for message in
        [question.addresses(&addresses, 60), question.answer(hickory_proto::op::ResponseCode::Refused, Some("why"))]
    {
        let bytes = question.datagram(&message).expect("an answer can be written");
        assert!(bytes.len() <= 1232);
        let answer = Message::from_vec(&bytes).expect("what was written can be read");
        assert_eq!(answer.metadata.id.to_be_bytes(), input[..2]);
        assert_eq!(answer.queries.first(), Some(question.query()));
    }
}
