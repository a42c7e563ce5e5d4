//! What a client does.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::{limit, patience, silence};

/// What the client heard, and from where it asked.
#[derive(Debug)]
pub struct Heard {
    pub from: SocketAddr,
    pub answer: String,
}

/// Connects, which must succeed.
pub fn connect(to: SocketAddr) -> TcpStream {
    TcpStream::connect_timeout(&to, patience()).unwrap_or_else(|e| panic!("{to}: {e}"))
}

/// Connects to where nothing may answer. An attempt is given up before TCP sends its first packet again.
pub fn connect_in_vain(to: SocketAddr) -> std::io::Result<TcpStream> {
    TcpStream::connect_timeout(&to, silence())
}

/// Connects, sends a request and reads the reply to its end.
pub fn ask(to: SocketAddr) -> std::io::Result<Heard> {
    ask_within(to, patience())
}

/// The same, with a time limit for each step.
pub fn ask_within(to: SocketAddr, limit: Duration) -> std::io::Result<Heard> {
    let mut stream = TcpStream::connect_timeout(&to, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(b"who am I?")?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(Heard { from: stream.local_addr()?, answer })
}

/// The reply of whichever server gets a connection.
pub fn said(to: SocketAddr) -> std::io::Result<String> {
    said_within(to, patience())
}

/// The same, with a time limit for each step.
pub fn said_within(to: SocketAddr, limit: Duration) -> std::io::Result<String> {
    ask_within(to, limit).map(|heard| heard.answer)
}

/// The reply, after as many attempts as it takes: something was repaired, and may need a moment.
pub fn said_eventually(to: SocketAddr) -> Option<String> {
    (0..4).find_map(|_| said_within(to, limit(5000)).ok())
}
