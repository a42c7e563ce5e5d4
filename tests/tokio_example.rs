//! examples/proxy.rs, as it is built, between a client and a server.

mod common;

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};

use common::*;

#[test]
fn tokio_proxy_connects_from_the_client_and_leaves_nothing() {
    let lab = Lab::new();
    let before = lab.proxy.state();
    let server = lab.serve(80);
    // cargo builds examples beside the tests.
    let program = std::env::current_exe().unwrap().parent().unwrap().join("../examples/proxy");
    let mut proxy =
        lab.proxy.run(|| Command::new(&program).args(["3129", "80"]).stdout(Stdio::piped()).spawn().unwrap());
    let mut said = BufReader::new(proxy.stdout.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert_eq!(line, "listening\n");
    for hosts in [v4(), v6()] {
        std::thread::scope(|scope| {
            let served = scope.spawn(|| answer_one(&server));
            let heard = lab.ask(at(hosts.server, 80)).unwrap();
            assert_eq!(heard.answer, format!("seen {}, heard who am I?", hosts.client));
            assert_eq!(served.join().unwrap().ip(), hosts.client);
        });
    }
    // SAFETY: a child of this test.
    assert_eq!(unsafe { libc::kill(proxy.id() as i32, libc::SIGINT) }, 0);
    assert!(proxy.wait().unwrap().success());
    let mut rest = String::new();
    said.read_to_string(&mut rest).unwrap();
    assert_eq!(rest.lines().filter(|line| line.starts_with("intercepted ")).count(), 2, "{rest}");
    assert_eq!(lab.proxy.state(), before);
}
