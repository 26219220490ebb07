//! The query of a URL.

use super::{AddressError, decode, error};
use lapin::uri::SASLMechanism;
use std::{path::PathBuf, str::FromStr, time::Duration};

/// The smallest limit on a frame that AMQP 0-9-1 allows (its `frame-min-size`), in bytes.
const AMQP_FRAME_MIN: u32 = 4096;

/// Longest key that an error quotes, in bytes.
const QUOTED_KEY_MAX: usize = 40;

const UNKNOWN: &str = "is unknown (known: heartbeat, connection_timeout, channel_max, frame_max, auth_mechanism, \
                       cacertfile, certfile, keyfile, server_name_indication, verify)";

/// For other clients: pika up to 1.4 (`URLParameters`), and kombu 5.7 (`Connection`) with py-amqp 5.4.
#[rustfmt::skip]
const IGNORED: [&str; 20] = [
    "backpressure_detection", "blocked_connection_timeout", "client_properties", "connection_attempts",
    "heartbeat_interval", "locale", "retry_delay", "socket_timeout", "stack_timeout", "tcp_options",
    "alternates", "confirm_publish", "connect_timeout", "failover_strategy", "insist", "login_method", "read_timeout",
    "transport_options", "uri_prefix", "write_timeout",
];

/// <https://www.rabbitmq.com/docs/uri-query-parameters>; `None` for those that the URL doesn't have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// Seconds between heartbeats; 0 leaves it to the broker.
    pub heartbeat: Option<u16>,
    /// How long one TCP connect may take; in the URL milliseconds, at least one.
    pub connection_timeout: Option<Duration>,
    /// The highest channel number to agree on; 0 is no limit.
    pub channel_max: Option<u16>,
    /// The largest frame to agree on, in bytes, at least 4096; 0 is the default. See `Address::frame_max`.
    pub frame_max: Option<u32>,
    pub auth_mechanism: Option<SASLMechanism>,
    /// This and the next three need TLS.
    pub cacertfile: Option<PathBuf>,
    pub certfile: Option<PathBuf>,
    pub keyfile: Option<PathBuf>,
    /// To expect in the broker's certificate, instead of the host.
    pub server_name_indication: Option<String>,
    /// The keys of parameters for other clients.
    pub ignored: Vec<String>,
}

impl Parameters {
    pub(in crate::broker) fn parse(query: &str, tls: bool) -> Result<Self, AddressError> {
        let mut parameters = Self::default();
        let mut seen = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let name = parameter_name(key);
            if seen.contains(&key) && key != "auth_mechanism" {
                return error(format!("{name} is there twice"));
            }
            seen.push(key);
            // `ssl=true` and `ssl_options` ask pika and kombu for TLS, even with amqp://. Don't use plain text then.
            let asks_for_tls = key.starts_with("ssl") && !matches!(value, "false" | "False" | "0" | "");
            if asks_for_tls && !tls {
                return error(format!("{name} needs TLS: an amqps:// URL"));
            }
            if IGNORED.contains(&key) || key == "ssl" || key.starts_with("ssl_") {
                parameters.ignored.push(key.to_owned());
                continue;
            }
            let value = decode(value, &name)?;
            let set = parameters.set(key, value, tls);
            set.or_else(|problem| error(format!("{name} {problem}")))?;
        }
        Ok(parameters)
    }

    fn set(&mut self, key: &str, value: String, tls: bool) -> Result<(), &'static str> {
        match key {
            "heartbeat" => match number(&value) {
                None => return Err("must be a number of seconds from 0 (the broker's proposal) to 65535"),
                seconds => self.heartbeat = seconds,
            },
            "connection_timeout" => match number(&value) {
                None | Some(0) => return Err("must be a number of milliseconds from 1"),
                limit => self.connection_timeout = limit.map(Duration::from_millis),
            },
            "channel_max" => match number(&value) {
                None => return Err("must be a number from 0 (no limit) to 65535"),
                max => self.channel_max = max,
            },
            "frame_max" => match number(&value) {
                None | Some(1..AMQP_FRAME_MIN) => {
                    return Err("must be 0 (the default, 131072) or a number of bytes from 4096");
                }
                max => self.frame_max = max,
            },
            "auth_mechanism" => {
                let mechanism = match value.to_ascii_lowercase().as_str() {
                    "plain" => SASLMechanism::Plain,
                    "amqplain" => SASLMechanism::AMQPlain,
                    "external" => SASLMechanism::External,
                    _ => return Err("must be plain, amqplain or external"),
                };
                // The first one counts, as in RabbitMQ's Erlang client.
                self.auth_mechanism.get_or_insert(mechanism);
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
            // `disable` turns the check of the name off in RabbitMQ's Erlang client.
            "server_name_indication" if value.is_empty() || value == "disable" => {
                return Err("must be a name: the broker's certificate is always checked");
            }
            "server_name_indication" => self.server_name_indication = Some(value),
            "verify" if value == "verify_peer" => {}
            "verify" => {
                return Err("must be verify_peer: the broker's certificate is always checked");
            }
            _ => return Err(UNKNOWN),
        }
        Ok(())
    }
}

/// How an error names a query parameter: by its key, if that looks like one. It could still be a piece of a password if
/// the URL's `@` is missing or encoded: `Address::parse` doesn't notice that.
fn parameter_name(key: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    if (1..=QUOTED_KEY_MAX).contains(&key.len()) && key.bytes().all(is_plain) {
        format!("the query parameter {key}")
    } else {
        "a query parameter".to_owned()
    }
}

/// Takes digits only; `FromStr` would take a `+`, too.
pub(super) fn number<T: FromStr>(text: &str) -> Option<T> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}
