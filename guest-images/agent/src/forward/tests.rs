use super::*;
use stasis_agent::protocol::forward_line;
use std::path::PathBuf;
use tokio::net::{TcpListener, UnixListener, UnixStream};

/// A forwarder on a unix socket.
fn forwarder() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    tokio::spawn(serve(UnixListener::bind(&path).unwrap()));
    (dir, path)
}

async fn asked(path: &PathBuf, line: &str) -> (UnixStream, String) {
    let mut host = UnixStream::connect(path).await.unwrap();
    host.write_all(line.as_bytes()).await.unwrap();
    let answer = read_line(&mut host).await.unwrap();
    (host, String::from_utf8(answer).unwrap())
}

async fn listening(address: SocketAddr) -> (TcpListener, String) {
    let listener = TcpListener::bind(address).await.unwrap();
    let port = NonZeroU16::new(listener.local_addr().unwrap().port()).unwrap();
    (listener, forward_line(port))
}

fn loopback() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

#[tokio::test]
async fn half_closes_pass_in_both_directions() {
    let (_dir, path) = forwarder();
    let (listener, line) = listening(loopback()).await;
    let (mut host, answer) = asked(&path, &line).await;
    assert_eq!(answer, "OK");
    let (mut app, _) = listener.accept().await.unwrap();
    host.write_all(b"question").await.unwrap();
    host.shutdown().await.unwrap();
    let mut question = Vec::new();
    app.read_to_end(&mut question).await.unwrap();
    assert_eq!(question, b"question");
    app.write_all(b"answer").await.unwrap();
    drop(app);
    let mut answer = Vec::new();
    host.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"answer");
    // The other way round.
    let (mut host, _) = asked(&path, &line).await;
    let (mut app, _) = listener.accept().await.unwrap();
    app.shutdown().await.unwrap();
    assert_eq!(host.read(&mut [0; 1]).await.unwrap(), 0);
    host.write_all(b"still").await.unwrap();
    drop(host);
    let mut heard = Vec::new();
    app.read_to_end(&mut heard).await.unwrap();
    assert_eq!(heard, b"still");
}

#[tokio::test]
async fn a_server_on_ipv6_alone_is_reached() {
    let (_dir, path) = forwarder();
    let Ok(listener) = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).await else {
        eprintln!("this machine has no IPv6 loopback");
        return;
    };
    let port = NonZeroU16::new(listener.local_addr().unwrap().port()).unwrap();
    assert_eq!(asked(&path, &forward_line(port)).await.1, "OK");
}

#[tokio::test]
async fn a_port_without_listener_and_a_bad_line_are_told_apart() {
    let (_dir, path) = forwarder();
    let (listener, line) = listening(loopback()).await;
    drop(listener);
    let (mut host, answer) = asked(&path, &line).await;
    assert_eq!(answer, "REFUSED");
    assert_eq!(host.read(&mut [0; 1]).await.unwrap(), 0);
    assert_eq!(asked(&path, "GET / HTTP/1.1\n").await.1, "FAILED the line names no port");
    // No end of line in sight: closed without a word.
    let mut host = UnixStream::connect(&path).await.unwrap();
    host.write_all(&[b'x'; 2 * MAX_FORWARD_LINE]).await.unwrap();
    assert!(read_line(&mut host).await.is_err());
}

#[tokio::test]
async fn a_host_that_goes_away_ends_the_apps_connection() {
    let (_dir, path) = forwarder();
    let (listener, line) = listening(loopback()).await;
    let (host, _) = asked(&path, &line).await;
    let (mut app, _) = listener.accept().await.unwrap();
    drop(host);
    assert_eq!(app.read(&mut [0; 1]).await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_connections_carry_much_both_ways() {
    const EACH: usize = 1 << 20;
    let (_dir, path) = forwarder();
    let (listener, line) = listening(loopback()).await;
    tokio::spawn(async move {
        while let Ok((mut app, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = app.split();
                tokio::io::copy(&mut from, &mut to).await.unwrap();
                to.shutdown().await.unwrap();
            });
        }
    });
    let mut all = tokio::task::JoinSet::new();
    for number in 0..100u8 {
        let (path, line) = (path.clone(), line.clone());
        all.spawn(async move {
            let (host, answer) = asked(&path, &line).await;
            assert_eq!(answer, "OK");
            let (mut from, mut to) = host.into_split();
            let sending = async move {
                to.write_all(&vec![number; EACH]).await.unwrap();
                to.shutdown().await.unwrap();
            };
            let mut echo = Vec::new();
            let ((), read) = tokio::join!(sending, from.read_to_end(&mut echo));
            read.unwrap();
            assert!(echo.len() == EACH && echo.iter().all(|&byte| byte == number));
        });
    }
    while let Some(done) = all.join_next().await {
        done.unwrap();
    }
}
