//! `BROKER_URL`: any text is either accepted or an error, and neither shows a password.
//!
//! - An address's printed form doesn't depend on its password.
//! - No message shows a piece of a password, even if its special characters aren't percent-encoded.
//! - Messages are one line, without control characters.
//! - Parsing a printed address, or a printed list, gives the same broker or brokers.

#![no_main]

use libfuzzer_sys::fuzz_target;
use qconsume::broker::reach::address::{Address, Parameters, Secret, parse_list};
use std::fmt::{Debug, Display};

const MARK: &str = "S3CRET";

fuzz_target!(|text: &str| {
    match parse_list(text) {
        Err(error) => check_line(&error),
        Ok(addresses) => {
            addresses.iter().for_each(check_address);
            check_list(text, &addresses);
        }
    }
    if let Some(marked) = mark_password(text) {
        for text in [format!("amqp://a,{marked}"), marked] {
            match parse_list(&text) {
                Err(error) => check_no_mark(&error, &text),
                Ok(addresses) => addresses.iter().for_each(|address| check_no_mark(address, &text)),
            }
        }
    }
});

fn shown(of: &(impl Debug + Display)) -> [String; 2] {
    [of.to_string(), format!("{of:?}")]
}

fn check_line(of: &(impl Debug + Display)) {
    for text in shown(of) {
        assert!(!text.contains(char::is_control), "{text:?}");
    }
}

fn check_no_mark(of: &(impl Debug + Display), input: &str) {
    check_line(of);
    for text in shown(of) {
        assert!(!text.contains(MARK), "{text:?} of {input:?}");
    }
}

fn check_address(address: &Address) {
    check_line(address);
    let other = Address { password: Secret::from(format!("not {}", address.password.expose())), ..address.clone() };
    assert_eq!(shown(address), shown(&other));
    assert!((1..=255).contains(&address.virtual_host.len()));
    assert!(!address.host.is_empty() && address.port > 0);

    let printed = Address::parse(&address.to_string()).expect("a printed address is a URL");
    assert_eq!(printed, without_password(address));
}

fn check_list(text: &str, addresses: &[Address]) {
    if !text.ends_with(['\n', '\r']) {
        for end in ["\n", "\r\n"] {
            let list = parse_list(&format!("{text}{end}"));
            assert_eq!(list.as_deref(), Ok(addresses), "{end:?}");
        }
    }
    let printed: Vec<_> = addresses.iter().map(Address::to_string).collect();
    let expected: Vec<_> = addresses.iter().map(without_password).collect();
    assert_eq!(parse_list(&printed.join(",")), Ok(expected));
}

/// The address that its printed form parses to: without password and query.
fn without_password(address: &Address) -> Address {
    Address {
        password: Secret::from("guest".to_owned()),
        password_given: false,
        parameters: Parameters::default(),
        ..address.clone()
    }
}

/// The URL with the mark in each piece that a parser could cut its password into. The password is taken to reach from
/// the user's `:` to the last `@`, as a person would read it.
fn mark_password(text: &str) -> Option<String> {
    let start = text.find("://")? + 3;
    let start = start + text[start..].find(':')? + 1;
    let end = text.rfind('@').filter(|end| start <= *end)?;
    // A password that contains the list's separator can't be told from a list.
    if text.to_ascii_lowercase().contains(",amqp") || text.contains(MARK) {
        return None;
    }
    let mut marked = text[..start].to_owned() + MARK;
    for c in text[start..end].chars() {
        marked.push(c);
        // After a `%`, it would break the escape.
        if !c.is_ascii_alphanumeric() && c != '%' {
            marked += MARK;
        }
    }
    Some(marked + &text[end..])
}
