//! The dialler: hands out TCP connections to the store, and to nothing else, to processes that have no network.
//!
//! It is a process of its own rather than a part of the warden: it resolves names and talks to strangers, which nothing with privileges
//! should do, and unlike the supervisor, which may be restarted at any time, it is there for as long as a VMM may need a connection. What it
//! may connect to is fixed when it is started.
//!
//! A client has a connected `SOCK_SEQPACKET` socket to it. It asks with a message of `HOST:PORT` and one descriptor: an end of a socket
//! pair, on which one message comes back: the word `connected` with the socket, or why there is none. So any number of answers may be
//! waited for at once, and whoever gives up closes its end.

use std::collections::HashSet;
use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, accept_with, socketpair};

use crate::message;

/// The word of an answer that brings a connection.
const CONNECTED: &[u8] = b"connected";
/// How long it may take to be connected to one address.
const CONNECT: Duration = Duration::from_secs(9);
/// Connections being opened at once, over all clients.
const OPENING: usize = 512;
/// Clients at once.
const CLIENTS: usize = 4096;
/// Octets of a request or an answer at most.
const MAX: usize = 512;
/// How long it waits for a first or a next client before it ends.
const IDLE: Duration = Duration::from_mins(1);

/// The client's side: asks for a connection to `place` (`HOST:PORT`) and returns the end on which the answer comes.
pub fn ask(dialler: BorrowedFd<'_>, place: &str) -> io::Result<OwnedFd> {
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    message::send(dialler, place.as_bytes(), &[theirs.as_fd()])?;
    Ok(ours)
}

/// Reads the answer, once [`ask`]'s end is readable.
pub fn answer(end: BorrowedFd<'_>) -> io::Result<TcpStream> {
    let mut buffer = [0; MAX];
    let (word, mut descriptors) = message::receive(end, &mut buffer)?;
    match (word, descriptors.pop()) {
        (CONNECTED, Some(connection)) => Ok(connection.into()),
        ([], _) => Err(io::Error::new(io::ErrorKind::BrokenPipe, "the dialler is gone")),
        (why, _) => Err(io::Error::other(String::from_utf8_lossy(why).into_owned())),
    }
}

/// What is counted over all clients.
#[derive(Debug, Default)]
struct Counts {
    clients: AtomicUsize,
    opening: AtomicUsize,
}

/// Serves clients of `listener` until there have been none for a while. `places` are what may be asked for.
pub fn run(listener: &OwnedFd, places: impl IntoIterator<Item = String>) -> io::Result<()> {
    let (places, counts) = (Arc::new(places.into_iter().collect::<HashSet<_>>()), Arc::new(Counts::default()));
    let mut alone_since = Instant::now();
    loop {
        let mut ready = [rustix::event::PollFd::new(listener, rustix::event::PollFlags::IN)];
        let wait = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
        match rustix::event::poll(&mut ready, Some(&wait)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {
                if counts.clients.load(Ordering::Acquire) > 0 {
                    alone_since = Instant::now();
                } else if alone_since.elapsed() > IDLE {
                    return Ok(());
                }
                continue;
            }
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        let client = match accept_with(listener, SocketFlags::CLOEXEC) {
            Ok(client) => client,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED | rustix::io::Errno::AGAIN) => continue,
            Err(error) => return Err(error.into()),
        };
        alone_since = Instant::now();
        if counts.clients.fetch_add(1, Ordering::AcqRel) >= CLIENTS {
            counts.clients.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!("too many clients");
            continue;
        }
        let (places, counted) = (places.clone(), counts.clone());
        let thread = std::thread::Builder::new().name("client".to_owned()).stack_size(STACK).spawn(move || {
            if let Err(error) = serve(&client, &places, &counted) {
                tracing::debug!(%error, "a client's socket");
            }
            counted.clients.fetch_sub(1, Ordering::AcqRel);
        });
        if let Err(error) = thread {
            counts.clients.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!(%error, "cannot serve a client");
        }
    }
}

/// Stack of a thread: what the resolver needs, and no more, since there are as many as clients.
const STACK: usize = 256 << 10;

fn serve(client: &OwnedFd, places: &Arc<HashSet<String>>, counts: &Arc<Counts>) -> io::Result<()> {
    let mut buffer = [0; MAX];
    loop {
        let (bytes, mut descriptors) = message::receive(client.as_fd(), &mut buffer)?;
        if bytes.is_empty() {
            return Ok(());
        }
        let Some(end) = descriptors.pop() else { continue };
        let place = String::from_utf8_lossy(bytes);
        let Some(place) = places.get(&*place).cloned() else {
            tracing::warn!(%place, "a place that nobody may be connected to was asked for");
            refuse(&end, &format!("only the store may be connected to, not {place}"));
            continue;
        };
        if counts.opening.fetch_add(1, Ordering::AcqRel) >= OPENING {
            counts.opening.fetch_sub(1, Ordering::AcqRel);
            refuse(&end, "too many connections are being opened");
            continue;
        }
        // On a thread of its own: one that takes long holds up nobody.
        let counted = counts.clone();
        let thread = std::thread::Builder::new().name("connect".to_owned()).stack_size(STACK).spawn(move || {
            connect(&end, &place);
            counted.opening.fetch_sub(1, Ordering::AcqRel);
        });
        if let Err(error) = thread {
            counts.opening.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!(%error, "cannot open a connection");
        }
    }
}

fn connect(end: &OwnedFd, place: &str) {
    match dial(place) {
        // Whoever gave up has closed its end.
        Ok(connection) => drop(message::send(end.as_fd(), CONNECTED, &[connection.as_fd()])),
        Err(error) => refuse(end, &format!("cannot connect to {place}: {error}")),
    }
}

fn refuse(end: &OwnedFd, why: &str) {
    let short = &why[..why.floor_char_boundary(MAX)];
    let _ = message::send(end.as_fd(), short.as_bytes(), &[]);
}

/// To the first of the place's addresses that answers.
fn dial(place: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in place.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, CONNECT) {
            Ok(connection) => return Ok(connection),
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpListener;

    fn wait(end: &OwnedFd) -> io::Result<TcpStream> {
        let mut ready = [rustix::event::PollFd::new(end, rustix::event::PollFlags::IN)];
        let wait = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut ready, Some(&wait)).unwrap(), 1, "no answer");
        answer(end.as_fd())
    }

    #[test]
    fn connections_to_the_store_are_handed_out_and_to_nothing_else() {
        let store = TcpListener::bind("127.0.0.1:0").unwrap();
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = store.local_addr().unwrap().port();
        let places: Arc<HashSet<String>> = Arc::new([format!("localhost:{port}"), format!("127.0.0.1:{port}")].into());
        let (client, ours) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let serving = std::thread::spawn({
            let places = places.clone();
            move || serve(&ours, &places, &Arc::new(Counts::default()))
        });
        for place in &*places {
            let mut connection = wait(&ask(client.as_fd(), place).unwrap()).unwrap();
            let (mut accepted, _) = store.accept().unwrap();
            connection.write_all(b"x").unwrap();
            accepted.read_exact(&mut [0]).unwrap();
        }
        let elsewhere = other.local_addr().unwrap().port();
        for place in [format!("127.0.0.1:{elsewhere}"), format!("127.0.0.2:{port}"), String::from("x"), "y".repeat(500)]
        {
            let error = wait(&ask(client.as_fd(), &place).unwrap()).unwrap_err();
            assert!(error.to_string().contains("only the store"), "{error}");
        }
        drop(store);
        let error = wait(&ask(client.as_fd(), &format!("127.0.0.1:{port}")).unwrap()).unwrap_err();
        assert!(error.to_string().contains("cannot connect"), "{error}");
        drop(client);
        serving.join().unwrap().unwrap();
    }
}
