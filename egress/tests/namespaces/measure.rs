//! What a tunnel costs: the same bytes between the same namespaces with and without the proxy. Figures, no assertions; run with
//! `STASIS_EGRESS_MEASURE=1`.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use crate::custom;
use crate::world::{BULK, World, within};

/// Set to measure.
pub(crate) const VARIABLE: &str = "STASIS_EGRESS_MEASURE";

/// Bytes of one transfer.
const BYTES: usize = 1 << 30;
const GIBIBYTES: f64 = 1.0;
const ROUNDS: usize = 5;
const CONNECTIONS: usize = 300;

fn serve(mut stream: TcpStream) -> std::io::Result<()> {
    let mut kind = [0];
    stream.read_exact(&mut kind)?;
    let mut buffer = vec![0; 256 << 10];
    match kind {
        [b'd'] => (0..BYTES / buffer.len()).try_for_each(|_| stream.write_all(&buffer)),
        [b'u'] => {
            while stream.read(&mut buffer)? > 0 {}
            stream.write_all(b".")
        }
        _ => stream.write_all(b"."),
    }
}

/// Seconds that one transfer takes from this namespace.
fn transfer(namespace: &str, kind: u8) -> f64 {
    within(namespace, move || {
        let began = Instant::now();
        let mut stream = TcpStream::connect((BULK, 443)).unwrap();
        stream.write_all(&[kind]).unwrap();
        let mut buffer = vec![0; 256 << 10];
        if kind == b'u' {
            (0..BYTES / buffer.len()).for_each(|_| stream.write_all(&buffer).unwrap());
            stream.shutdown(std::net::Shutdown::Write).unwrap();
        }
        while stream.read(&mut buffer).unwrap() > 0 {}
        began.elapsed().as_secs_f64()
    })
}

/// Milliseconds from the first packet of a connection to its first answer.
fn answers(namespace: &str) -> f64 {
    within(namespace, || {
        let began = Instant::now();
        for _ in 0..CONNECTIONS {
            let mut stream = TcpStream::connect((BULK, 443)).unwrap();
            stream.write_all(b"?").unwrap();
            stream.read_exact(&mut [0]).unwrap();
        }
        began.elapsed().as_secs_f64() * 1000.0 / f64::from(CONNECTIONS as u32)
    })
}

fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Prints the figures.
pub(crate) async fn throughput() {
    let world = World::new().await;
    world.put(1, custom(&[], &[&format!("{BULK}/32")])).await;
    let listener = within(&world.world(), || TcpListener::bind((BULK, 443)).unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || serve(stream));
        }
    });
    let (guest, host) = (world.guest(), world.host());
    let measured = tokio::task::spawn_blocking(move || {
        for (what, kind) in [("down", b'd'), ("up", b'u')] {
            let (mut direct, mut proxied) = (Vec::new(), Vec::new());
            for _ in 0..ROUNDS {
                direct.push(transfer(&host, kind));
                proxied.push(transfer(&guest, kind));
            }
            let rate = |seconds: Vec<f64>| GIBIBYTES / middle(seconds);
            let (direct, proxied) = (rate(direct), rate(proxied));
            eprintln!(
                "{what}: direct {direct:.2} GiB/s, through the proxy {proxied:.2} GiB/s, {:.0} %",
                100.0 * proxied / direct
            );
        }
        eprintln!(
            "connection to first answer: direct {:.3} ms, through the proxy {:.3} ms",
            answers(&host),
            answers(&guest)
        );
    });
    measured.await.unwrap();
}
