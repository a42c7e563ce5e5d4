//! `include/tproxy.h` is what cbindgen generates from `src/ffi`.

use std::path::Path;

#[test]
fn header_equals_what_cbindgen_generates() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    config.after_includes = config.after_includes.map(|text| version() + &text);
    // In the order of the header.
    let mut builder = cbindgen::Builder::new().with_config(config);
    let files = [
        "ffi/sockets.rs",
        "udp/datagram.rs",
        "ffi/datagrams.rs",
        "ffi/config.rs",
        "ffi/rules.rs",
        "ffi/check.rs",
        "ffi/diagnosis.rs",
    ];
    for file in files {
        builder = builder.with_src(root.join("src").join(file));
    }
    let mut made = Vec::new();
    builder.generate().unwrap().write(&mut made);
    let made = String::from_utf8(made).unwrap();

    let committed = root.join("include/tproxy.h");
    if std::env::var_os("UPDATE_HEADER").is_some() {
        std::fs::write(&committed, &made).unwrap();
    }
    let committed = std::fs::read_to_string(&committed).unwrap_or_default();
    assert!(
        committed == made,
        "include/tproxy.h differs from src/ffi; `UPDATE_HEADER=1 cargo test --test header` regenerates it"
    );
}

/// The version of the library, as the preprocessor sees it.
fn version() -> String {
    let numbers = [
        ("MAJOR", env!("CARGO_PKG_VERSION_MAJOR")),
        ("MINOR", env!("CARGO_PKG_VERSION_MINOR")),
        ("PATCH", env!("CARGO_PKG_VERSION_PATCH")),
    ];
    let comment =
        "\n/* Version of this header. tp_version() returns the version of the library that the program runs with. */\n";
    numbers
        .iter()
        .fold(comment.to_owned(), |text, (name, number)| text + &format!("#define TP_VERSION_{name} {number}\n"))
}
