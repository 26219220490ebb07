//! Files that hold credentials, read as the command line reads them: `--authfile`, `--password-file`, and `--url-file`
//! (`BROKER_URL_FILE`).
//!
//! - An authfile is accepted if and only if a simple parser finds its two lines, and yields the same user and password.
//! - A URL file means the same as its URL on the command line; a password file contains the password.
//! - Each file may begin with a byte order mark. One newline at the end of a URL or a password is dropped.
//! - An error about an authfile shows none of its lines (the target broker_url checks this for URLs).
//! - The options' `Debug` output doesn't depend on the password.

#![no_main]

use libfuzzer_sys::fuzz_target;
use qconsume::{
    broker::reach::address::Address,
    cli::{QconsumeOptions, Request, parse},
    exit::{Exit, Failure},
};
use std::{ffi::OsString, fs, path::PathBuf, sync::LazyLock};

/// Holds the fuzzed content.
static FILE: LazyLock<PathBuf> =
    LazyLock::new(|| std::env::temp_dir().join(format!("qconsume-fuzz-authfile-{}", std::process::id())));

fuzz_target!(|content: &[u8]| {
    check_authfile(content);
    check_password_file(content);
    // A TLS URL reads the system's CAs or the files that it names, which would take most of the time.
    let text = String::from_utf8_lossy(content).to_ascii_lowercase();
    if !text.contains("amqps://") {
        check_url_file(content);
    }
});

fn check_authfile(content: &[u8]) {
    let read = run(content, &["--server", "h", "--authfile"]);
    let Some((username, password)) = credentials(content) else {
        let error = read.expect_err("the file isn't an authfile");
        let unreadable = std::str::from_utf8(content).is_err();
        let exit = if unreadable { Exit::Config } else { Exit::Usage };
        assert_eq!(error.exit, exit, "{error}");
        check_secret(&error.message, content);
        return;
    };
    let (addresses, shown) = read.expect("the file is an authfile");
    let [address] = &addresses[..] else {
        panic!("{addresses:?}");
    };
    assert_eq!(address.username, username);
    assert_eq!(address.password.expose(), password);
    assert!(address.password_given);

    // A name may end with a carriage return, of which one is left out at the end of a line.
    let other = format!("username:{username}\r\npassword:not {password}\r\n");
    let (_, shown_of_other) =
        run(other.as_bytes(), &["--server", "h", "--authfile"]).expect("the other file is an authfile, too");
    assert_eq!(shown, shown_of_other);
}

fn check_password_file(content: &[u8]) {
    let read = run(content, &["--url", "amqp://user:other@h", "--password-file"]);
    let text = std::str::from_utf8(content).ok().map(|text| text.strip_prefix('\u{feff}').unwrap_or(text));
    let password = text.map(|text| match text.strip_suffix('\n') {
        Some(line) => line.strip_suffix('\r').unwrap_or(line),
        None => text,
    });
    match password {
        None | Some("") => assert_eq!(read.expect_err("the file has no password").exit, Exit::Config),
        Some(password) => assert_eq!(read.expect("the file has a password").0[0].password.expose(), password),
    }
}

fn check_url_file(content: &[u8]) {
    let read = run(content, &["--url-file"]);
    let Ok(text) = std::str::from_utf8(content) else {
        assert_eq!(read.expect_err("the file isn't text").exit, Exit::Config);
        return;
    };
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let expected = qconsume::broker::reach::address::parse_list(text);
    match (read, expected) {
        (Ok((read, _)), Ok(expected)) => assert_eq!(read, expected),
        (Err(read), Err(expected)) => {
            assert_eq!(read.exit, Exit::Usage);
            assert_eq!(read.message, format!("--url-file: {expected}"));
        }
        // It logs in by a certificate, which needs amqps://.
        (Err(read), Ok(addresses)) if format!("{addresses:?}").contains("External") => {
            assert_eq!(read.exit, Exit::Usage);
        }
        (read, expected) => panic!("{read:?} instead of {expected:?}"),
    }
}

/// Parses a command line that names the file; returns the addresses and the options' `Debug` output.
fn run(content: &[u8], options: &[&str]) -> Result<(Vec<Address>, String), Failure> {
    fs::write(&*FILE, content).expect("the file can be written");
    let mut words: Vec<OsString> = ["qconsume", "--queue", "q"].map(OsString::from).into();
    words.extend(options.iter().map(OsString::from));
    words.extend([FILE.clone().into(), "true".into()]);
    match parse::<QconsumeOptions>(&words)? {
        Request::Run(options) => Ok((options.broker.addresses().to_vec(), format!("{options:?}"))),
        Request::Show(text) => panic!("{text}"),
    }
}

/// The user and the password in an authfile of rabbitmq-c's tools.
fn credentials(content: &[u8]) -> Option<(&str, &str)> {
    let text = std::str::from_utf8(content).ok()?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let (first, rest) = text.split_once('\n')?;
    let second = match rest.strip_suffix('\n') {
        Some(line) => line.strip_suffix('\r').unwrap_or(line),
        None => rest,
    };
    if second.contains('\n') {
        return None;
    }
    let first = first.strip_suffix('\r').unwrap_or(first);
    Some((first.strip_prefix("username:")?, second.strip_prefix("password:")?))
}

/// Checks that the message contains no line of the file. Lines of up to 8 bytes could be there by chance.
fn check_secret(message: &str, content: &[u8]) {
    // The message consists of these words and the file's path.
    let fixed =
        "--authfile: has to consist of two lines, username:USER and password:PASSWORD can't be read: it isn't UTF-8";
    for line in String::from_utf8_lossy(content).lines().filter(|line| line.len() > 8) {
        let is_fixed = fixed.contains(line) || FILE.to_string_lossy().contains(line);
        assert!(is_fixed || !message.contains(line), "{message}");
    }
}
