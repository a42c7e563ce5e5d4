//! A transparent TCP proxy with tokio.
//!
//!     proxy LISTEN-PORT PORT
//!
//! Intercepts connections that this host would forward to PORT of other hosts, over IPv4 and IPv6, and connects to the server
//! from the client's own address. A connection without a byte for five minutes is closed. A server must accept within ten
//! seconds. At most 1,000 connections are open at a time. SIGINT ends the proxy.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tproxy::rules::{Config, Listener, Mode, Rules};
use tproxy::socket::{ConnectOptions, ListenOptions};

const CONNECT: Duration = Duration::from_secs(10);
const IDLE: Duration = Duration::from_secs(300);
const CONNECTIONS: usize = 1000;

type Anything = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Anything> {
    let mut args = std::env::args().skip(1).map(|arg| arg.parse::<u16>());
    let (Some(listen), Some(port)) = (args.next(), args.next()) else {
        return Err("usage: proxy LISTEN-PORT PORT".into());
    };
    let (listen, port) = (listen?, port?);

    let listener =
        tproxy::socket::listen(SocketAddr::new([0u16; 8].into(), listen), ListenOptions::new().nonblocking(true))?;
    let listener = TcpListener::from_std(listener.into())?;
    let rules = Rules::install(&Config::new([Listener::from_fd(&listener, Mode::Tproxy)?]).ports([port]))?;
    println!("listening");

    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let serve = async {
        loop {
            let place = places.clone().acquire_owned().await;
            match listener.accept().await {
                Ok((client, from)) => {
                    tokio::spawn(async move {
                        if let Err(error) = relay(client, from).await {
                            eprintln!("{from}: {error}");
                        }
                        drop(place);
                    });
                }
                // Usually a lack of descriptors: other connections may end soon.
                Err(error) => {
                    eprintln!("accept: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    };
    tokio::select! {
        () = serve => {}
        _ = tokio::signal::ctrl_c() => {}
    }
    rules.remove()?;
    Ok(())
}

async fn relay(mut client: TcpStream, from: SocketAddr) -> Result<(), Anything> {
    let to = tproxy::orig_dst(&client)?;
    if must_not_be_called(to.ip().to_canonical()) {
        return Err(format!("refused: denied destination {to}").into());
    }
    let options = ConnectOptions::new().nonblocking(true);
    let mut server = TcpStream::from_std(tproxy::socket::connect_from(from, to, options)?.into())?;
    timeout(CONNECT, server.writable()).await??;
    if let Some(error) = server.take_error()? {
        return Err(error.into());
    }
    println!("intercepted {from} -> {to}");
    let (mut from_client, mut to_client) = client.split();
    let (mut from_server, mut to_server) = server.split();
    tokio::try_join!(pump(&mut from_client, &mut to_server), pump(&mut from_server, &mut to_client))?;
    Ok(())
}

/// Destinations that the proxy must not connect to for its clients, because it connects from inside the network.
fn must_not_be_called(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_unspecified() || ip.is_link_local() || ip.is_multicast(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unspecified() || ip.is_unicast_link_local() || ip.is_multicast(),
    }
}

/// Moves bytes until the end of stream, which is passed on.
async fn pump(from: &mut (impl AsyncReadExt + Unpin), to: &mut (impl AsyncWriteExt + Unpin)) -> Result<(), Anything> {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let len = timeout(IDLE, from.read(&mut buffer)).await??;
        if len == 0 {
            return Ok(to.shutdown().await?);
        }
        timeout(IDLE, to.write_all(&buffer[..len])).await??;
    }
}
