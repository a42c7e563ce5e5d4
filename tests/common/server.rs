//! What a server does.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{PATIENCE, canonical};

/// Accepts one connection, or panics when none comes.
pub fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    accept_within(listener, PATIENCE).expect("no connection came")
}

pub fn accept_within(listener: &TcpListener, patience: Duration) -> Option<(TcpStream, SocketAddr)> {
    listener.set_nonblocking(true).unwrap();
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        match listener.accept() {
            Ok((stream, peer)) => {
                stream.set_nonblocking(false).unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                return Some((stream, canonical(peer)));
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(2)),
            Err(e) => panic!("accept: {e}"),
        }
    }
    None
}

/// Serves one connection: reads all, answers "seen ADDRESS, heard WORDS". Gives whom it saw.
pub fn answer_one(listener: &TcpListener) -> SocketAddr {
    let (mut stream, peer) = accept(listener);
    let mut words = String::new();
    stream.read_to_string(&mut words).unwrap();
    write!(stream, "seen {}, heard {words}", peer.ip()).unwrap();
    peer
}

/// Answers every connection with some words, until that is enough.
pub fn answer_all(listener: &TcpListener, words: &str, enough: &AtomicBool) {
    while !enough.load(Ordering::Relaxed) {
        if let Some((mut stream, _)) = accept_within(listener, Duration::from_millis(50)) {
            // A client that has gone is its own affair.
            let _ = stream.read_to_end(&mut Vec::new()).and_then(|_| stream.write_all(words.as_bytes()));
        }
    }
}
