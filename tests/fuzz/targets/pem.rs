//! Certificates and keys: the same file is tried as the CA's, as the client's certificate, and as its key.
//!
//! - A file that can't be used leads to status 78, and to one line that names the file.
//! - No message shows a piece of a file, as it may be a piece of a key.
//! - A byte order mark and the line ends of Windows change nothing; a CA file may hold several CAs.
//! - A file is accepted as a certificate or a key only if its PEM label says that it is one.

#![no_main]

use libfuzzer_sys::fuzz_target;
use qconsume::{
    broker::{Nodes, reach::address::Address},
    exit::{Exit, Failure},
};
use std::{fs, path::PathBuf, sync::LazyLock};

const CA: &[u8] = include_bytes!("../seeds/pem/ca.pem");
const CERT: &[u8] = include_bytes!("../seeds/pem/cert.pem");
const KEY: &[u8] = include_bytes!("../seeds/pem/key.pem");
const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// In bytes: base64 of this length in a message can't be one of the message's own words.
const PIECE: usize = 24;

/// A message has no more consecutive numbers of its own than this.
const NUMBERS: usize = 8;

struct Files {
    ca: PathBuf,
    cert: PathBuf,
    key: PathBuf,
    /// Holds the fuzzed content.
    file: PathBuf,
}

static FILES: LazyLock<Files> = LazyLock::new(|| {
    let folder = std::env::temp_dir();
    let path = |name: &str| folder.join(format!("qconsume-fuzz-{}-{name}", std::process::id()));
    let files = Files { ca: path("ca"), cert: path("cert"), key: path("key"), file: path("file") };
    for (path, content) in [(&files.ca, CA), (&files.cert, CERT), (&files.key, KEY)] {
        fs::write(path, content).expect("the file can be written");
    }
    // The other files are intact, so a refusal is about the fuzzed one.
    load(&files.ca, Some(&files.cert), Some(&files.key)).expect("the intact files belong together");
    files
});

fuzz_target!(|content: &[u8]| {
    let results = roles(content);
    for result in &results {
        if let Err(error) = result {
            check_error(error, content);
        }
    }
    let has = |text: &str| content.windows(text.len()).any(|part| part == text.as_bytes());
    let [as_ca, as_client, as_cert, as_key] = &results;
    assert!(as_ca.is_err() || has("BEGIN CERTIFICATE"));
    assert!(as_cert.is_err() || has("BEGIN CERTIFICATE"));
    assert!(as_key.is_err() || has("PRIVATE KEY"));
    assert!(as_client.is_err() || as_cert.is_ok() && as_key.is_ok());

    if as_ca.is_ok() {
        for bundle in [[content, b"\n", CA].concat(), [CA, content].concat()] {
            roles(&bundle)[0].as_ref().expect("a file of two CAs is accepted");
        }
    }
    let shown = |results: &[Result<(), Failure>; 4]| format!("{results:?}");
    if !content.starts_with(BYTE_ORDER_MARK) {
        let marked = [BYTE_ORDER_MARK, content].concat();
        assert_eq!(shown(&roles(&marked)), shown(&results));
    }
    if !content.contains(&b'\r') {
        let lines: Vec<_> = content.split(|byte| *byte == b'\n').collect();
        assert_eq!(shown(&roles(&lines.join(&b"\r\n"[..]))), shown(&results));
    }
});

/// Loads this content as the CA's file, as the client's certificate and key in one, as its certificate, and as its key.
fn roles(content: &[u8]) -> [Result<(), Failure>; 4] {
    let Files { ca, cert, key, file } = &*FILES;
    fs::write(file, content).expect("the file can be written");
    [
        load(file, None, None),
        load(ca, Some(file), None),
        load(ca, Some(file), Some(key)),
        load(ca, Some(cert), Some(file)),
    ]
}

fn load(ca: &PathBuf, cert: Option<&PathBuf>, key: Option<&PathBuf>) -> Result<(), Failure> {
    let mut address = Address::parse("amqps://h").expect("a URL");
    address.parameters.cacertfile = Some(ca.clone());
    address.parameters.certfile = cert.cloned();
    address.parameters.keyfile = key.cloned();
    let mut nodes = Nodes { addresses: vec![address], ..Nodes::default() };
    nodes.read()
}

fn check_error(error: &Failure, content: &[u8]) {
    let message = &error.message;
    assert_eq!(error.exit, Exit::Config, "{message}");
    let file = FILES.file.to_string_lossy();
    assert!(message.contains(&*file), "{message}");
    assert!(!message.contains(char::is_control), "{message:?}");
    let is_base64 = |byte: &u8| byte.is_ascii_alphanumeric() || b"+/=".contains(byte);
    let mut pieces = message.as_bytes().windows(PIECE);
    let shown = pieces.find(|piece| piece.iter().all(is_base64) && content.windows(PIECE).any(|part| part == *piece));
    assert_eq!(shown, None, "{message}");
    // Nor does it show a piece as numbers, the values of its bytes; rustls does that for certificates, which aren't
    // secret.
    let numbers = |part: &[&str]| part.iter().all(|part| part.parse::<u8>().is_ok());
    let words = message.split(|c: char| !c.is_ascii_alphanumeric());
    let words: Vec<_> = words.filter(|word| !word.is_empty()).collect();
    let mut parts = words.windows(NUMBERS);
    assert!(message.contains("certificate") || !parts.any(numbers), "{message}");
}
