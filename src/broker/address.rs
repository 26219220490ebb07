//! `BROKER_URL`: read by RabbitMQ's rules, its defaults filled in, printed without the password.

use std::{error::Error, fmt, net::Ipv6Addr, path::PathBuf, str::FromStr, time::Duration};

use percent_encoding::{
    AsciiSet, NON_ALPHANUMERIC, PercentEncode, percent_decode_str, utf8_percent_encode,
};

/// What stays as it is when an address is printed: RFC 3986's unreserved characters.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// The same between the brackets of an IPv6 address.
const RESERVED_IN_IPV6: &AsciiSet = &RESERVED.remove(b':');

/// The longest virtual host in bytes: connection.open sends it as an AMQP short string.
const VIRTUAL_HOST_MAX: usize = 255;

/// The smallest limit on a frame that AMQP 0-9-1 allows (its `frame-min-size`), in bytes.
const FRAME_MIN_SIZE: u32 = 4096;

/// The longest name of an unknown query parameter that a message repeats, in bytes.
const QUOTED_KEY_MAX: usize = 40;

/// What each IPv6 mistake is answered with.
const IPV6_HINT: &str = "an IPv6 address goes in square brackets, as in amqp://[::1]:5672";

/// A password: printing it, in whatever way, gives `***`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The password itself, for the broker and nobody else.
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

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// One node of the broker, and who asks for what there.
///
/// `Display` is a URL for messages: without the password and the query parameters, everything else
/// written out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// `amqps`: TLS from the first byte.
    pub tls: bool,
    /// A name or an IP address, an IPv6 one without its brackets, its zone after a `%`; `localhost`
    /// if the URL has none.
    pub host: String,
    /// Whether the URL names a host.
    pub host_given: bool,
    /// 1 to 65535; 5672, or 5671 with TLS, if the URL has none.
    pub port: u16,
    /// `guest` if the URL has no user name; an empty one is empty.
    pub username: String,
    /// `guest` if the URL has no password; an empty one (`user:@host`) is empty.
    pub password: Secret,
    /// Whether the URL has a password, be it an empty one. `user@host` has none: the default takes
    /// its place, as in RabbitMQ's Erlang client and rabbitmq-c (the specification leaves it open),
    /// unless there is a client certificate to log in with.
    pub password_given: bool,
    /// Decoded, at most 255 bytes, never empty.
    pub virtual_host: String,
    /// The query.
    pub parameters: Parameters,
}

/// The query of an address: <https://www.rabbitmq.com/docs/uri-query-parameters>. `None` is: not in
/// the URL.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// Seconds between heartbeats; 0 asks for none.
    pub heartbeat: Option<u16>,
    /// How long one TCP connect may take; in the URL milliseconds, at least one.
    pub connection_timeout: Option<Duration>,
    /// The highest channel number to agree on; 0 is no limit.
    pub channel_max: Option<u16>,
    /// The largest frame to agree on, in bytes, at least 4096; 0 is no limit.
    pub frame_max: Option<u32>,
    /// How to log in.
    pub auth_mechanism: Option<AuthMechanism>,
    /// Certificates to trust (PEM). Only with TLS, as are the next three.
    pub cacertfile: Option<PathBuf>,
    /// The client's certificate (PEM).
    pub certfile: Option<PathBuf>,
    /// The key of the client's certificate (PEM).
    pub keyfile: Option<PathBuf>,
    /// The name that the broker's certificate must bear, where it isn't the host.
    pub server_name_indication: Option<String>,
}

/// How to log in: a SASL mechanism.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuthMechanism {
    /// User name and password.
    Plain,
    /// User name and password, in AMQP's own encoding.
    AmqPlain,
    /// The client's certificate.
    External,
}

/// What is wrong with an address and what to do about it, in one line.
///
/// The only text it repeats is the name of a query parameter, never what could be a piece of a
/// password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressError(String);

impl fmt::Display for AddressError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for AddressError {}

/// The nodes of one cluster, at least one: URLs separated by commas, perhaps a newline at the end.
///
/// Only a comma that `amqp://` or `amqps://` follows separates: a password may contain others.
///
/// # Errors
/// The first mistake, with the number of its URL if there are several.
pub fn parse_list(text: &str) -> Result<Vec<Address>, AddressError> {
    let text = match text.strip_suffix('\n') {
        Some(line) => line.strip_suffix('\r').unwrap_or(line),
        None => text,
    };
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
            count => AddressError(format!("URL {} of {count}: {error}", index + 1)),
        })
    });
    parsed.collect()
}

impl Address {
    /// One URL: <https://www.rabbitmq.com/docs/uri-spec>.
    ///
    /// Wider than the specification in that `amqp://host/` means the virtual host `/`, and in that
    /// a `:` in a password and characters without a meaning of their own may stand unencoded;
    /// narrower in that an `@` in a virtual host or query may not.
    ///
    /// # Errors
    /// The first mistake, never with text that could be a piece of the password.
    pub fn parse(url: &str) -> Result<Self, AddressError> {
        check_characters(url)?;
        let Some((tls, rest)) = strip_scheme(url) else {
            return error("the URL must start with amqp:// or amqps://");
        };
        let (authority, after) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        // An `@` out here most likely ends a password with a bare `/` or `?` in it. With those
        // refused, as rabbitmq-c does, nothing right of the authority's `@` can be a piece of a
        // password, and all of that may be printed.
        if after.contains('@') {
            return error(
                "there is an '@' after the first '/' or '?': in a user name or password write '/' \
                 as %2F and '?' as %3F, in a virtual host or query parameter write '@' as %40",
            );
        }
        let (userinfo, host_and_port) = match authority.rsplit_once('@') {
            Some((userinfo, _)) if userinfo.contains('@') => {
                return error(
                    "there is more than one '@': in a user name or password write it as %40",
                );
            }
            Some((userinfo, host_and_port)) => (Some(userinfo), host_and_port),
            None => (None, authority),
        };
        let (username, password) = match userinfo.map(|text| text.split_once(':')) {
            Some(Some((username, password))) => (Some(username), Some(password)),
            _ => (userinfo, None),
        };
        let (host, port) = split_host_and_port(host_and_port)?;
        let (path, query) = after.split_once('?').unwrap_or((after, ""));
        Ok(Self {
            tls,
            host_given: !host.is_empty(),
            host: if host.is_empty() {
                "localhost".to_owned()
            } else {
                host
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
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "amqps" } else { "amqp" };
        write!(f, "{scheme}://{}@", encode(&self.username))?;
        if is_ipv6(&self.host) {
            let address = utf8_percent_encode(&self.host, RESERVED_IN_IPV6);
            write!(f, "[{address}]")?;
        } else {
            write!(f, "{}", encode(&self.host))?;
        }
        write!(f, ":{}/{}", self.port, encode(&self.virtual_host))
    }
}

impl Parameters {
    /// What follows the `?`. Empty pairs (`?`, `a=1&`) are nothing.
    fn parse(query: &str, tls: bool) -> Result<Self, AddressError> {
        let mut parameters = Self::default();
        let mut seen = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let name = parameter_name(key);
            if seen.contains(&key) {
                return error(format!("{name} is there twice"));
            }
            seen.push(key);
            let value = decode(value, &name)?;
            let set = parameters.set(key, value, tls);
            set.or_else(|problem| error(format!("{name} {problem}")))?;
        }
        Ok(parameters)
    }

    /// Takes one parameter, or says what is wrong with it.
    fn set(&mut self, key: &str, value: String, tls: bool) -> Result<(), &'static str> {
        match key {
            "heartbeat" => {
                let seconds = number(&value);
                self.heartbeat =
                    Some(seconds.ok_or("must be a number of seconds from 0 (none) to 65535")?);
            }
            "connection_timeout" => match number(&value) {
                None | Some(0) => return Err("must be a number of milliseconds from 1"),
                limit => self.connection_timeout = limit.map(Duration::from_millis),
            },
            "channel_max" => {
                let max = number(&value);
                self.channel_max = Some(max.ok_or("must be a number from 0 (no limit) to 65535")?);
            }
            "frame_max" => match number(&value) {
                None | Some(1..FRAME_MIN_SIZE) => {
                    return Err("must be 0 (no limit) or a number of bytes from 4096");
                }
                max => self.frame_max = max,
            },
            "auth_mechanism" => {
                self.auth_mechanism = Some(match value.to_ascii_lowercase().as_str() {
                    "plain" => AuthMechanism::Plain,
                    "amqplain" => AuthMechanism::AmqPlain,
                    "external" => AuthMechanism::External,
                    _ => return Err("must be plain, amqplain or external"),
                });
            }
            "cacertfile" | "certfile" | "keyfile" | "server_name_indication" | "verify" if !tls => {
                return Err("needs TLS: an amqps:// URL");
            }
            "cacertfile" | "certfile" | "keyfile" if value.is_empty() => {
                return Err("must be the path of a file");
            }
            "cacertfile" => self.cacertfile = Some(value.into()),
            "certfile" => self.certfile = Some(value.into()),
            "keyfile" => self.keyfile = Some(value.into()),
            // In RabbitMQ's Erlang client `disable` turns the check of the name off.
            "server_name_indication" if value.is_empty() || value == "disable" => {
                return Err("must be a name: the broker's certificate is always checked");
            }
            "server_name_indication" => self.server_name_indication = Some(value),
            "verify" if value == "verify_peer" => {}
            "verify" => {
                return Err("must be verify_peer: the broker's certificate is always checked");
            }
            "customize_hostname_check" | "depth" | "fail_if_no_peer_cert" | "password" => {
                return Err("is not supported");
            }
            _ => {
                return Err(
                    "is unknown (known: heartbeat, connection_timeout, channel_max, frame_max, \
                     auth_mechanism, cacertfile, certfile, keyfile, server_name_indication, \
                     verify)",
                );
            }
        }
        Ok(())
    }
}

/// What a message calls a query parameter: by its name only if it looks like one.
fn parameter_name(key: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    if (1..=QUOTED_KEY_MAX).contains(&key.len()) && key.bytes().all(is_plain) {
        format!("the query parameter {key}")
    } else {
        "a query parameter".to_owned()
    }
}

/// What no URL may contain. Most of it comes from files, templates, and secrets nobody encoded.
fn check_characters(url: &str) -> Result<(), AddressError> {
    // A byte order mark is as invisible as a blank, and not one to Unicode.
    let is_blank = |c: char| c.is_whitespace() || c.is_control() || c == '\u{feff}';
    if url.is_empty() {
        error("the URL is empty")
    } else if url.starts_with(is_blank) {
        error("the URL starts with a blank or another invisible character: leave it out")
    } else if url.ends_with(is_blank) {
        error("the URL ends with a blank, a newline or another invisible character: leave it out")
    } else if url.contains(is_blank) {
        error(
            "the URL contains a blank or another invisible character: write a blank as \
             %20, and none between URLs",
        )
    } else if url.contains('#') {
        error("the URL contains a '#': write it as %23")
    } else {
        Ok(())
    }
}

/// Whether a URL's scheme stands for TLS, and what follows its `://`; `None` if it isn't AMQP's.
fn strip_scheme(url: &str) -> Option<(bool, &str)> {
    [("amqp://", false), ("amqps://", true)]
        .into_iter()
        .find_map(|(scheme, tls)| {
            let (start, rest) = url.split_at_checked(scheme.len())?;
            start.eq_ignore_ascii_case(scheme).then_some((tls, rest))
        })
}

/// The decoded host, which may be empty, and the text of the port, if there is one.
fn split_host_and_port(text: &str) -> Result<(String, Option<&str>), AddressError> {
    if let Some(literal) = text.strip_prefix('[') {
        let Some((address, after)) = literal.split_once(']') else {
            return error(format!("the host's '[' has no ']': {IPV6_HINT}"));
        };
        let host = decode(address, "the host")?;
        if !is_ipv6(&host) {
            return error("the host in square brackets is not an IPv6 address");
        }
        return match after.strip_prefix(':') {
            None if !after.is_empty() => {
                error("only ':' and the port may follow the host's square brackets")
            }
            port => Ok((host, port)),
        };
    }
    if text.contains(['[', ']']) {
        return error(format!("the host contains a square bracket: {IPV6_HINT}"));
    }
    let (host, port) = match text.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (text, None),
    };
    if port.is_some_and(|port| port.contains(':')) {
        return error(format!("the host contains a ':': {IPV6_HINT}"));
    }
    // No host has one, but a list of hosts does, and so does one URL too few in a list.
    if host.contains(',') {
        return error(
            "the host contains a ',': several nodes are several whole URLs, as in \
             amqp://a,amqp://b",
        );
    }
    Ok((decode(host, "the host")?, port))
}

/// Whether a host is an IPv6 address, with or without a zone (`fe80::1%eth0`, RFC 6874).
fn is_ipv6(host: &str) -> bool {
    let (address, zone) = match host.split_once('%') {
        Some((address, zone)) => (address, Some(zone)),
        None => (host, None),
    };
    zone != Some("") && address.parse::<Ipv6Addr>().is_ok()
}

/// The virtual host that a path stands for. The specification reads `amqp://host/` as the virtual
/// host with the empty name, which nobody has: who writes it means `/`.
fn parse_virtual_host(path: &str) -> Result<String, AddressError> {
    let name = path.strip_prefix('/').unwrap_or(path);
    if name.contains('/') {
        return error("the virtual host contains a '/': write it as %2F");
    }
    match decode(name, "the virtual host")? {
        name if name.is_empty() => Ok("/".to_owned()),
        name if name.len() > VIRTUAL_HOST_MAX => {
            error("the virtual host is longer than 255 bytes, the most that AMQP allows")
        }
        name => Ok(name),
    }
}

/// A whole number in digits alone: `FromStr` would take a `+` too.
fn number<T: FromStr>(text: &str) -> Option<T> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

/// `part` without its percent-encoding; the error calls it `name`.
fn decode(part: &str, name: &str) -> Result<String, AddressError> {
    // `percent_decode_str` would leave a stray `%` as it is.
    let mut escapes = part.split('%').skip(1);
    let is_escape = |text: &str| {
        let digits = text.as_bytes().get(..2);
        digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    };
    if !escapes.all(is_escape) {
        return error(format!(
            "{name} contains a '%' without two hexadecimal digits: write '%' as %25"
        ));
    }
    match percent_decode_str(part).decode_utf8() {
        Ok(text) => Ok(text.into_owned()),
        Err(_) => error(format!("{name} is not UTF-8 once it is percent-decoded")),
    }
}

fn encode(text: &str) -> PercentEncode<'_> {
    utf8_percent_encode(text, RESERVED)
}

fn error<T>(message: impl Into<String>) -> Result<T, AddressError> {
    Err(AddressError(message.into()))
}

#[cfg(test)]
mod tests;
