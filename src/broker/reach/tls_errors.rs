//! What went wrong when TLS did, in words.

use super::address::{Address, Parameters};
use crate::{broker::errors::ConnectError, exit::Failure};
use std::{
    fmt::Display,
    io,
    time::{Duration, SystemTime},
};
use tokio_rustls::rustls::{self, AlertDescription, CertificateError, pki_types::UnixTime};

/// What an error during the TLS handshake means.
pub(super) fn in_handshake(error: &io::Error, parameters: &Parameters) -> ConnectError {
    match tls_error(error) {
        Some(rustls::Error::InvalidCertificate(error)) => Failure::config(untrusted(error, parameters)).into(),
        Some(rustls::Error::InvalidMessage(_)) => Failure::config(
            "what answers isn't TLS: is the port right (5671 is usual), or should the URL begin with amqp://?",
        )
        .into(),
        Some(rustls::Error::AlertReceived(alert)) => refused(*alert, parameters),
        Some(error) => Failure::config(format!("the TLS handshake failed: {error}")).into(),
        None if error.kind() == io::ErrorKind::UnexpectedEof => {
            ConnectError::transient("the connection was closed during the TLS handshake; is this a port for TLS?")
        }
        None => ConnectError::transient(format!("the TLS handshake failed: {error}")),
    }
}

/// What an error on a connection means that TLS was agreed on for: with TLS 1.3 a broker's refusal of the client's
/// certificate comes when the handshake is over for us.
pub(in crate::broker) fn refusal(error: &io::Error, address: &Address) -> Option<ConnectError> {
    match tls_error(error)? {
        rustls::Error::AlertReceived(alert) => Some(refused(*alert, &address.parameters)),
        _ => None,
    }
}

fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

/// Why the broker's certificate isn't good enough.
fn untrusted(error: &CertificateError, parameters: &Parameters) -> String {
    use CertificateError as E;
    const NAME: &str = "the broker's certificate";
    match error {
        E::ExpiredContext { time, not_after } => format!(
            "{NAME}, or one that vouches for it, expired at {}; it is {} now, by the clock here",
            date(*not_after),
            date(*time)
        ),
        E::NotValidYetContext { time, not_before } => format!(
            "{NAME}, or one that vouches for it, is not valid before {}; it is {} now, by the clock here",
            date(*not_before),
            date(*time)
        ),
        E::UnknownIssuer => {
            let trusted = match (&parameters.cacertfile, std::env::var_os("SSL_CERT_FILE")) {
                (Some(file), _) => file.display().to_string(),
                (None, Some(file)) => format!("{} (SSL_CERT_FILE)", file.display()),
                (None, None) => "the system's CA certificates".to_owned(),
            };
            format!(
                "{NAME} is signed by an unknown issuer, none of {trusted}: name the broker's CA with --cacert FILE (QCONSUME_CACERT)"
            )
        }
        E::NotValidForNameContext { expected, presented } => {
            let names: Vec<_> = presented.iter().map(|name| plain_name(name)).collect();
            let names = match names.join(", ") {
                none if none.is_empty() => "no name at all (a common name alone doesn't count)".to_owned(),
                names => names,
            };
            format!(
                "{NAME} is for {names}, not for {}: use a name that it is for, or tell the one to check with --server-name (QCONSUME_SERVER_NAME)",
                expected.to_str()
            )
        }
        E::InvalidPurposeContext { .. } => {
            format!("{NAME} is not one for servers: its extended key usage lacks serverAuth")
        }
        error if is_webpki(error, "CaUsedAsEndEntity") => format!(
            "{NAME} is that of a CA itself (CA:TRUE), which a server must not use: sign one for the broker with it"
        ),
        error => format!("{NAME} can't be trusted: {error}"),
    }
}

/// Whether webpki's error of this name is in there; its type isn't ours to name.
pub(super) fn is_webpki(error: &CertificateError, name: &str) -> bool {
    matches!(error, CertificateError::Other(other) if format!("{other:?}").contains(name))
}

/// `DnsName("a.example")` and `IpAddress(127.0.0.1)` as people write them.
fn plain_name(name: &str) -> &str {
    let inner = name.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')'));
    inner.unwrap_or(name).trim_matches('"')
}

fn date(time: UnixTime) -> impl Display {
    humantime::format_rfc3339_seconds(SystemTime::UNIX_EPOCH + Duration::from_secs(time.as_secs()))
}

/// What the broker's refusal means.
fn refused(alert: AlertDescription, parameters: &Parameters) -> ConnectError {
    use AlertDescription as A;
    let cert = parameters.certfile.as_ref();
    let ours = match (cert, alert) {
        // These concern no certificate of ours.
        (_, A::UnrecognisedName | A::ProtocolVersion) => "TLS".to_owned(),
        (Some(file), _) => format!("the client certificate in {}", file.display()),
        (None, A::HandshakeFailure | A::CertificateRequired | A::BadCertificate) => {
            "a connection without a client certificate".to_owned()
        }
        (None, _) => "TLS".to_owned(),
    };
    let why = match alert {
        A::HandshakeFailure => {
            ": it asks for another client certificate (--cert and --key), or has no cipher or curve in common with qconsume, which knows TLS 1.3, and TLS 1.2 with ECDHE and AES-GCM or ChaCha20, on X25519, P-256 and P-384".to_owned()
        }
        A::CertificateExpired => ": it has expired".to_owned(),
        A::UnknownCA => ": it is signed by none of the CAs that the broker trusts".to_owned(),
        A::UnrecognisedName => ": it doesn't know the server name; see --server-name".to_owned(),
        A::ProtocolVersion => ": they have no version of TLS in common (1.2 or 1.3)".to_owned(),
        A::InternalError | A::UserCanceled | A::CloseNotify => {
            return ConnectError::transient(format!("the broker ended TLS ({alert:?})"));
        }
        A::CertificateRequired | A::BadCertificate if cert.is_none() => {
            format!(" ({alert:?}): if it asks for one, name it with --cert and --key")
        }
        _ => format!(" ({alert:?}); its log says why"),
    };
    Failure::config(format!("the broker refused {ours}{why}")).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_certificates_read_as_people_write_them() {
        assert_eq!(plain_name("DnsName(\"a.example\")"), "a.example");
        assert_eq!(plain_name("IpAddress(127.0.0.1)"), "127.0.0.1");
        assert_eq!(plain_name("a.example"), "a.example");
    }
}
