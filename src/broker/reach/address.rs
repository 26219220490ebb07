//! `BROKER_URL`: parsed by RabbitMQ's rules, with its defaults; printed without the password.

mod parameters;

pub use parameters::Parameters;

use super::{file::without_newline, tap::FRAME_MAX};
use lapin::uri::SASLMechanism;
use parameters::number;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, PercentEncode, percent_decode_str, utf8_percent_encode};
use std::{fmt, net::Ipv6Addr};

/// Everything except RFC 3986's unreserved characters.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Longest name in AMQP 0-9-1, in bytes: a short string.
pub const NAME_MAX: usize = 255;

/// # Errors
/// How long the name is, if it is too long for AMQP.
pub fn amqp_name(text: &str) -> Result<String, String> {
    if text.len() > NAME_MAX {
        return Err(format!("has {} bytes; AMQP allows {NAME_MAX}", text.len()));
    }
    Ok(text.to_owned())
}

const IPV6_HINT: &str = "an IPv6 address goes in square brackets, as in amqp://[::1]:5672";

/// A password. It has no `Display`, and its `Debug` is `***`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// A URL's parts, decoded, with the defaults. `Display` is a URL without password and query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    pub tls: bool,
    /// A name or an IP address. IPv6 has no brackets, and perhaps a zone after `%`.
    pub host: String,
    pub port: u16,
    pub username: String,
    pub password: Secret,
    /// Whether the URL or an option gives a password, even an empty one. If not, it is `guest`, unless a client
    /// certificate logs in.
    pub password_given: bool,
    pub virtual_host: String,
    pub parameters: Parameters,
}

/// What is wrong with an address, and what to do about it: one line, without any part of a password.
pub type AddressError = String;

/// One or more URLs, separated by commas before `amqp://` or `amqps://`: a password may contain other commas.
///
/// # Errors
/// The first mistake, with the number of its URL if there are several.
pub fn parse_list(text: &str) -> Result<Vec<Address>, AddressError> {
    let text = without_newline(text);
    let mut urls = Vec::new();
    let mut start = 0;
    for (comma, _) in text.match_indices(',') {
        if strip_scheme(&text[comma + 1..]).is_some() {
            urls.push(&text[start..comma]);
            start = comma + 1;
        }
    }
    urls.push(&text[start..]);

    let parsed = urls.iter().enumerate().map(|(index, url)| {
        Address::parse(url).map_err(|error| match urls.len() {
            1 => error,
            count => format!("URL {} of {count}: {error}", index + 1),
        })
    });
    parsed.collect()
}

impl Address {
    /// One URL, by <https://www.rabbitmq.com/docs/uri-spec>, with three differences: `amqp://host/` and Celery's
    /// `amqp://host//` mean the virtual host `/`, a password may contain `:`, and every `@` in a name must be encoded.
    pub fn parse(url: &str) -> Result<Self, AddressError> {
        check_characters(url)?;
        let Some((tls, rest)) = strip_scheme(url) else {
            return error("the URL must start with amqp:// or amqps://");
        };
        let (authority, after) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        // The `@` probably ends a password that contains a `/` or `?`. It is refused here, because later errors may
        // quote the path or the query, and with it a part of the password.
        if after.contains('@') {
            return error(
                "there is an '@' after the first '/' or '?': in a user name or password write '/' \
                 as %2F and '?' as %3F, in a virtual host or query parameter write '@' as %40",
            );
        }
        let (userinfo, host_and_port) = match authority.rsplit_once('@') {
            Some((userinfo, host_and_port)) => (Some(userinfo), host_and_port),
            None => (None, authority),
        };
        if userinfo.is_some_and(|text| text.contains('@')) {
            return error("there is more than one '@': in a user name or password write it as %40");
        }
        let (username, password) = match userinfo.and_then(|text| text.split_once(':')) {
            Some((username, password)) => (Some(username), Some(password)),
            None => (userinfo, None),
        };
        let (host, port) = split_host_and_port(host_and_port)?;
        let (path, query) = after.split_once('?').unwrap_or((after, ""));
        Ok(Self {
            tls,
            host: match host.as_str() {
                "" => "localhost".to_owned(),
                _ => host,
            },
            port: match port {
                None if tls => 5671,
                None => 5672,
                Some(text) => match number(text) {
                    None | Some(0) => return error("the port must be a number from 1 to 65535"),
                    Some(port) => port,
                },
            },
            username: decode(username.unwrap_or("guest"), "the user name")?,
            password: Secret(decode(password.unwrap_or("guest"), "the password")?),
            password_given: password.is_some(),
            virtual_host: parse_virtual_host(path)?,
            parameters: Parameters::parse(query, tls)?,
        })
    }

    pub fn set_password(&mut self, password: Secret) {
        self.password = password;
        self.password_given = true;
    }

    /// The largest frame to propose, in bytes.
    pub(in crate::broker) fn frame_max(&self) -> u32 {
        self.parameters.frame_max.filter(|bytes| *bytes > 0).unwrap_or(FRAME_MAX)
    }

    /// Whether the client certificate logs in (EXTERNAL), instead of user name and password.
    pub(in crate::broker) fn logs_in_by_certificate(&self) -> bool {
        self.parameters.auth_mechanism == Some(SASLMechanism::External)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = scheme(self.tls);
        let mut host = encode(&self.host).to_string();
        if ipv6(&self.host).is_some() {
            host = format!("[{}]", host.replace("%3A", ":"));
        }
        let (username, virtual_host) = (encode(&self.username), encode(&self.virtual_host));
        write!(f, "{scheme}://{username}@{host}:{}/{virtual_host}", self.port)
    }
}

fn check_characters(url: &str) -> Result<(), AddressError> {
    // Unicode doesn't count the byte order mark as white space.
    let is_blank = |c: char| c.is_whitespace() || c.is_control() || c == '\u{feff}';
    if url.is_empty() {
        error("the URL is empty")
    } else if url.starts_with(is_blank) {
        error("the URL starts with a blank or another invisible character: leave it out")
    } else if url.ends_with(is_blank) {
        error("the URL ends with a blank, a newline or another invisible character: leave it out")
    } else if url.contains(is_blank) {
        error("the URL contains a blank or another invisible character: write a blank as %20")
    } else if url.contains('#') {
        error("the URL contains a '#': write it as %23")
    } else {
        Ok(())
    }
}

pub const fn scheme(tls: bool) -> &'static str {
    if tls { "amqps" } else { "amqp" }
}

/// Whether an AMQP URL asks for TLS, and what follows its `://`.
pub fn strip_scheme(url: &str) -> Option<(bool, &str)> {
    [false, true].into_iter().find_map(|tls| {
        let (start, rest) = url.split_at_checked(scheme(tls).len())?;
        let rest = rest.strip_prefix("://")?;
        start.eq_ignore_ascii_case(scheme(tls)).then_some((tls, rest))
    })
}

fn split_host_and_port(text: &str) -> Result<(String, Option<&str>), AddressError> {
    if let Some(literal) = text.strip_prefix('[') {
        let Some((address, after)) = literal.split_once(']') else {
            return error(format!("the host's '[' has no ']': {IPV6_HINT}"));
        };
        let Some(host) = ipv6(&decode(address, "the host")?) else {
            return error("the host in square brackets is not an IPv6 address");
        };
        return match after.strip_prefix(':') {
            None if !after.is_empty() => error("only ':' and the port may follow the host's square brackets"),
            port => Ok((host, port)),
        };
    }
    let (host, port) = match text.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (text, None),
    };
    if text.contains(['[', ']']) || port.is_some_and(|port| port.contains(':')) {
        return error(format!("the host contains a ':' or a square bracket: {IPV6_HINT}"));
    }
    if host.contains(',') {
        return error(
            "the host contains a ',': several nodes are several whole URLs, as in \
             amqp://a,amqp://b",
        );
    }
    // An IPv6 address whose colons are encoded needs no brackets.
    let host = decode(host, "the host")?;
    Ok((ipv6(&host).unwrap_or(host), port))
}

/// In canonical form, so that `0::1` equals `::1`. A zone may follow (`fe80::1%eth0`, RFC 6874).
fn ipv6(host: &str) -> Option<String> {
    let (address, zone) = host.split_at(host.find('%').unwrap_or(host.len()));
    let address: Ipv6Addr = address.parse().ok()?;
    (zone != "%").then(|| format!("{address}{zone}"))
}

/// In the specification `amqp://host/` means a virtual host with an empty name, which no broker has.
fn parse_virtual_host(path: &str) -> Result<String, AddressError> {
    let name = path.strip_prefix('/').unwrap_or(path);
    if matches!(name, "" | "/") {
        return Ok("/".to_owned());
    }
    if name.contains('/') {
        return error("the virtual host contains a '/': write it as %2F");
    }
    let name = decode(name, "the virtual host")?;
    if name.len() > NAME_MAX {
        return error("the virtual host is longer than 255 bytes, the most that AMQP allows");
    }
    Ok(name)
}

fn decode(part: &str, name: &str) -> Result<String, AddressError> {
    // `percent_decode_str` would leave a stray `%` as it is.
    let mut escapes = part.as_bytes().split(|byte| *byte == b'%').skip(1);
    if !escapes.all(|text| matches!(text, [a, b, ..] if a.is_ascii_hexdigit() && b.is_ascii_hexdigit())) {
        return error(format!("{name} contains a '%' without two hexadecimal digits: write '%' as %25"));
    }
    match percent_decode_str(part).decode_utf8() {
        Ok(text) => Ok(text.into_owned()),
        Err(_) => error(format!("{name} is not UTF-8 once it is percent-decoded")),
    }
}

fn encode(text: &str) -> PercentEncode<'_> {
    utf8_percent_encode(text, ENCODED)
}

fn error<T>(message: impl Into<String>) -> Result<T, AddressError> {
    Err(message.into())
}

#[cfg(test)]
mod tests;
