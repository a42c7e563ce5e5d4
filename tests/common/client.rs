//! What a client does.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use super::{PATIENCE, SOON};

/// What the client heard, and from where it asked.
#[derive(Debug)]
pub struct Heard {
    pub from: SocketAddr,
    pub answer: String,
}

pub fn ask(to: SocketAddr) -> std::io::Result<Heard> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"who am I?")?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(Heard { from: stream.local_addr()?, answer })
}

/// What a server says, if it does so soon.
pub fn said(to: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, SOON)?;
    stream.set_read_timeout(Some(SOON))?;
    stream.write_all(b"?")?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
