//! What a server does.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{canonical, eventually, patience};

/// Accepts one connection, which must come.
pub fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    accept_within(listener, patience()).expect("no connection came")
}

/// Accepts one connection if one is there or comes in time.
pub fn accept_within(listener: &TcpListener, limit: Duration) -> Option<(TcpStream, SocketAddr)> {
    listener.set_nonblocking(true).unwrap();
    let deadline = Instant::now() + limit;
    loop {
        match listener.accept() {
            Ok((stream, peer)) => {
                stream.set_nonblocking(false).unwrap();
                stream.set_read_timeout(Some(patience())).unwrap();
                stream.set_write_timeout(Some(patience())).unwrap();
                return Some((stream, canonical(peer)));
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => panic!("accept: {e}"),
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Serves one connection: reads all, answers "seen ADDRESS, heard WORDS". Gives the address that it saw.
pub fn answer_one(listener: &TcpListener) -> SocketAddr {
    let (mut stream, peer) = accept(listener);
    let mut words = String::new();
    stream.read_to_string(&mut words).unwrap();
    write!(stream, "seen {}, heard {words}", peer.ip()).unwrap();
    peer
}

/// Answers every connection with some words, until it is told to stop.
pub fn answer_all(listener: &TcpListener, words: &str, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        if let Some((mut stream, _)) = accept_within(listener, Duration::from_millis(20)) {
            // The client may have given up.
            let _ = stream.read_to_end(&mut Vec::new()).and_then(|_| stream.write_all(words.as_bytes()));
        }
    }
}

/// Runs something while listeners answer every connection, each with its words.
pub fn while_answering<T>(listeners: &[(&TcpListener, &str)], body: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for (listener, words) in listeners {
            let stop = &stop;
            scope.spawn(move || answer_all(listener, words, stop));
        }
        let outcome = catch_unwind(AssertUnwindSafe(body));
        stop.store(true, Ordering::Relaxed);
        outcome.unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// Closes a listener of this thread's namespace, and waits until none listens on its port. A child that another test is
/// starting has a copy of the listener until it calls exec(2).
pub fn close(listener: TcpListener) {
    const LISTEN: &str = "0A";
    let port = format!(":{:04X}", listener.local_addr().unwrap().port());
    drop(listener);
    let listens = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields[1].ends_with(&port) && fields[3] == LISTEN
    };
    eventually("the listener is closed", || {
        let files =
            ["tcp", "tcp6"].map(|file| std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap());
        !files.iter().flat_map(|text| text.lines().skip(1)).any(listens)
    });
}
