//! TLS failures in words: what is wrong, and what to do about it.

use super::address::{Address, Parameters};
use crate::{broker::errors::ConnectError, exit::Failure};
use std::{
    fmt::Display,
    io,
    time::{Duration, SystemTime},
};
use tokio_rustls::rustls::{self, AlertDescription, CertificateError, PeerIncompatible, pki_types::UnixTime};

/// The keys that rustls 0.23 with ring checks signatures with (measured: see docs/tls.md).
const KEYS: &str = "RSA with 2048 to 8192 bits, ECDSA with the curve P-256 or P-384, and Ed25519";

/// An object identifier, and how error texts name the algorithm or the curve.
type Algorithm = (&'static str, &'static str);

const USABLE_KEYS: [Algorithm; 4] = [
    ("1.2.840.113549.1.1.1", "RSA"),
    ("1.2.840.10045.3.1.7", "ECDSA with the curve P-256"),
    ("1.3.132.0.34", "ECDSA with the curve P-384"),
    ("1.3.101.112", "Ed25519"),
];

const OTHER_ALGORITHMS: [Algorithm; 17] = [
    ("1.3.132.0.35", "ECDSA with the curve P-521"),
    ("1.3.132.0.33", "ECDSA with the curve P-224"),
    ("1.3.132.0.10", "ECDSA with the curve secp256k1"),
    ("1.3.36.3.3.2.8.1.1.7", "ECDSA with the curve brainpoolP256r1"),
    ("1.2.840.10045.2.1", "ECDSA with a curve that is spelled out instead of named"),
    ("1.3.101.113", "Ed448"),
    ("1.2.840.10040.4.1", "DSA"),
    ("1.2.840.10040.4.3", "DSA with SHA-1"),
    ("2.16.840.1.101.3.4.3.2", "DSA with SHA-256"),
    ("1.2.840.113549.1.1.4", "RSA with MD5"),
    ("1.2.840.113549.1.1.5", "RSA with SHA-1"),
    ("1.2.840.113549.1.1.14", "RSA with SHA-224"),
    ("1.2.840.10045.4.1", "ECDSA with SHA-1"),
    ("1.2.840.10045.4.3.1", "ECDSA with SHA-224"),
    ("1.2.840.10045.4.3.4", "ECDSA with SHA-512"),
    (
        "1.2.840.113549.1.1.10",
        "RSA-PSS with SHA-1, with a salt that isn't as long as the hash, or by a key for RSA-PSS only",
    ),
    ("1.2.156.10197.1.501", "SM2 with SM3"),
];

pub(super) fn handshake_error(error: &io::Error, parameters: &Parameters) -> ConnectError {
    use PeerIncompatible as P;
    match tls_error(error) {
        Some(rustls::Error::InvalidCertificate(error)) => Failure::config(untrusted(error, parameters)).into(),
        Some(rustls::Error::InvalidMessage(_)) => Failure::config(
            "what answers isn't TLS: is the port right (5671 is usual), or should the URL begin with amqp://?",
        )
        .into(),
        Some(rustls::Error::AlertReceived(alert)) => alert_meaning(*alert, parameters),
        Some(rustls::Error::PeerIncompatible(
            P::ServerDoesNotSupportTls12Or13 | P::ServerTlsVersionIsDisabledByOurConfig,
        )) => alert_meaning(AlertDescription::ProtocolVersion, parameters),
        Some(error) => Failure::config(format!("the TLS handshake failed: {}", spelled_out(&error.to_string()))).into(),
        None if error.kind() == io::ErrorKind::UnexpectedEof => {
            ConnectError::transient("the connection was closed during the TLS handshake; is this a port for TLS?")
        }
        None => ConnectError::transient(format!("the TLS handshake failed: {error}")),
    }
}

/// With TLS 1.3, a broker that refuses our certificate says so only after the handshake.
pub(in crate::broker) fn alert_after_handshake(error: &io::Error, address: &Address) -> Option<ConnectError> {
    match tls_error(error)? {
        rustls::Error::AlertReceived(alert) => Some(alert_meaning(*alert, &address.parameters)),
        _ => None,
    }
}

fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

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
        E::UnknownIssuer => format!(
            "{NAME} is signed by an unknown issuer, none of {}: name the broker's CA with --cacert FILE (QCONSUME_CACERT)",
            trusted(parameters)
        ),
        E::NotValidForNameContext { expected, presented } => {
            not_for(&expected.to_str(), presented.iter().filter_map(|name| plain_name(name)).collect())
        }
        E::InvalidPurposeContext { .. } => {
            format!("{NAME} is not one for servers: its extended key usage lacks serverAuth")
        }
        E::BadSignature => unverified(&trusted(parameters)),
        E::UnsupportedSignatureAlgorithmForPublicKeyContext { public_key_algorithm_id: id, .. }
            if is_usable_key(id) =>
        {
            unverified(&trusted(parameters))
        }
        error if webpki_name(error).as_deref() == Some("CaUsedAsEndEntity") => format!(
            "{NAME} is that of a CA itself (CA:TRUE), which a server must not use: sign one for the broker with it"
        ),
        error => format!("{NAME}, or one that vouches for it, can't be used: {}", flaw(error)),
    }
}

/// A wrong signature, or a key that is too short for ring: rustls doesn't tell them apart.
fn unverified(trusted: &str) -> String {
    format!(
        "the broker's certificate can't be verified with {trusted}: if the CA was created again under the same name, give its current certificate with --cacert (QCONSUME_CACERT); if the broker or the CA has an RSA key below 2048 bits, replace that key"
    )
}

fn trusted(parameters: &Parameters) -> String {
    match (&parameters.cacertfile, std::env::var_os("SSL_CERT_FILE")) {
        (Some(file), _) => file.display().to_string(),
        (None, Some(file)) => format!("{} (SSL_CERT_FILE)", file.display()),
        (None, None) => "the system's CA certificates".to_owned(),
    }
}

fn not_for(expected: &str, names: Vec<&str>) -> String {
    if names.contains(&expected) {
        return format!(
            "the broker's certificate has {expected} among its DNS names, which doesn't count for an IP address: issue it with subjectAltName=IP:{expected}, or connect by a name that it is for"
        );
    }
    let names = match names.as_slice() {
        [] => "no name at all (a common name alone doesn't count)".to_owned(),
        names => names.join(", "),
    };
    format!(
        "the broker's certificate is for {names}, not for {expected}: connect by a name that it is for, or give that name with --server-name (QCONSUME_SERVER_NAME)"
    )
}

/// What is wrong with a certificate ("it"), and what to do about that.
pub(super) fn flaw(error: &CertificateError) -> String {
    use CertificateError as E;
    match error {
        E::BadEncoding => "it is damaged, or not a valid X.509 certificate".to_owned(),
        // webpki's InvalidCertValidity. A certificate that has expired is ExpiredContext.
        E::Expired => "its validity ends before it begins".to_owned(),
        E::UnsupportedSignatureAlgorithmContext { signature_algorithm_id: id, .. } => format!(
            "it is signed with {}, which qconsume doesn't accept: sign it with SHA-256 or SHA-384, by a CA whose key is one of {KEYS}",
            algorithm(id)
        ),
        E::UnsupportedSignatureAlgorithmForPublicKeyContext { public_key_algorithm_id: id, .. } => format!(
            "its key or its CA's is {}, which qconsume doesn't support: replace that key by one of {KEYS}",
            algorithm(id)
        ),
        error => match webpki_name(error).as_deref() {
            Some("UnsupportedCertVersion") => {
                "it is an X.509 version 1 certificate: issue a version 3 one (`openssl x509 -req` with -extfile)"
            }
            Some("UnsupportedCriticalExtension") => {
                "it has a critical extension that qconsume doesn't know: issue it without, or with the extension not critical"
            }
            Some("EmptyEkuExtension") => "its extended key usage is empty: issue it with serverAuth in it, or without it",
            Some("EndEntityUsedAsCa") => {
                "it is signed by a certificate that is not a CA's: issue that one with basicConstraints=critical,CA:TRUE"
            }
            Some("PathLenConstraintViolated") => {
                "a CA above it allows fewer intermediate CAs than there are (pathlen): issue that CA's certificate with a higher one"
            }
            Some("NameConstraintViolation") => {
                "a CA above it isn't allowed to issue certificates for its names (nameConstraints)"
            }
            Some("MalformedNameConstraint" | "InvalidNetworkMaskConstraint") => {
                "the name constraints of a CA above it are malformed"
            }
            Some("MaximumPathDepthExceeded") => "there are more than six intermediate CAs above it",
            Some(
                "MaximumSignatureChecksExceeded"
                | "MaximumPathBuildCallsExceeded"
                | "MaximumNameConstraintComparisonsExceeded",
            ) => "there are too many certificates or name constraints above it to check",
            Some("ExtensionValueInvalid" | "MalformedExtensions" | "MalformedDnsIdentifier") => {
                "one of its extensions is malformed, or there twice"
            }
            Some("InvalidSerialNumber") => "its serial number is malformed",
            Some("SignatureAlgorithmMismatch") => "it names two different signature algorithms",
            Some(name) => return spelled_out(name),
            None => return spelled_out(&error.to_string()),
        }
        .to_owned(),
    }
}

/// webpki's error type isn't public in rustls, so its name is taken from its `Debug` text.
fn webpki_name(error: &CertificateError) -> Option<String> {
    let CertificateError::Other(rustls::OtherError(inner)) = error else {
        return None;
    };
    let debug = format!("{inner:?}");
    debug.split(|c: char| !c.is_ascii_alphanumeric()).next().map(str::to_owned)
}

fn algorithm(id: &[u8]) -> String {
    let oid = last_object_identifier(id);
    match USABLE_KEYS.iter().chain(&OTHER_ALGORITHMS).find(|(known, _)| *known == oid) {
        Some((_, name)) => (*name).to_owned(),
        None => format!("the algorithm {oid}"),
    }
}

fn is_usable_key(id: &[u8]) -> bool {
    let oid = last_object_identifier(id);
    USABLE_KEYS.iter().any(|(known, _)| *known == oid)
}

/// Of an `AlgorithmIdentifier`'s content (RFC 5280, 4.1.1.2): the algorithm or, for a key on a named curve, the curve.
fn last_object_identifier(mut id: &[u8]) -> String {
    const OBJECT_IDENTIFIER: u8 = 6;
    let mut last = String::new();
    while let [OBJECT_IDENTIFIER, size, rest @ ..] = id
        && let Some((oid, rest)) = rest.split_at_checked(usize::from(*size))
    {
        last = dotted(oid);
        id = rest;
    }
    last
}

/// Writes an object identifier (X.690, 8.19) with dots. Numbers of more than 32 bits come out wrong.
fn dotted(oid: &[u8]) -> String {
    let mut numbers = Vec::new();
    let mut number = 0_u32;
    for byte in oid {
        number = number << 7 | u32::from(byte & 0x7f);
        if byte & 0x80 == 0 {
            numbers.push(std::mem::take(&mut number));
        }
    }
    // The first two numbers are encoded as one.
    if let Some(both) = numbers.first().copied() {
        let first = (both / 40).min(2);
        numbers.splice(..1, [first, both - 40 * first]);
    }
    numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(".")
}

/// Turns Rust's names in an error of rustls into words, without fields: "handshake failure" for `HandshakeFailure`.
fn spelled_out(text: &str) -> String {
    let text = text.split(['{', '(', '[']).next().unwrap_or_default().trim_end();
    let mut words = String::new();
    let mut characters = text.chars().peekable();
    let mut before = ' ';
    while let Some(c) = characters.next() {
        let begins_word = c.is_ascii_uppercase() && characters.peek().is_some_and(char::is_ascii_lowercase);
        if begins_word && before.is_ascii_alphanumeric() {
            words.push(' ');
        }
        words.push(if begins_word { c.to_ascii_lowercase() } else { c });
        before = c;
    }
    words
}

/// `a.example` for `DnsName("a.example")`. `None` for a kind that isn't for a broker, such as a URI.
fn plain_name(name: &str) -> Option<&str> {
    let (kind, rest) = name.split_once('(').unwrap_or(("DnsName", name));
    let inner = rest.strip_suffix(')').unwrap_or(rest).trim_matches('"');
    matches!(kind, "DnsName" | "IpAddress").then_some(inner)
}

fn date(time: UnixTime) -> impl Display {
    humantime::format_rfc3339_seconds(SystemTime::UNIX_EPOCH + Duration::from_secs(time.as_secs()))
}

fn alert_meaning(alert: AlertDescription, parameters: &Parameters) -> ConnectError {
    use AlertDescription as A;
    let cert = parameters.certfile.as_ref();
    let what = match (cert, alert) {
        // These two have nothing to do with a client certificate.
        (_, A::UnrecognisedName | A::ProtocolVersion) => "TLS".to_owned(),
        (Some(file), _) => format!("the client certificate in {}", file.display()),
        (None, A::HandshakeFailure | A::InsufficientSecurity | A::CertificateRequired | A::BadCertificate) => {
            "a connection without a client certificate".to_owned()
        }
        (None, _) => "TLS".to_owned(),
    };
    let name = spelled_out(&format!("{alert:?}"));
    let why = match alert {
        A::HandshakeFailure | A::InsufficientSecurity => {
            let asks = if cert.is_some() { "it asks for another one" } else { "it asks for one" };
            format!(
                ": {asks} (--cert and --key), or it has no cipher, curve, key or signature in common with qconsume, which knows TLS 1.3, and TLS 1.2 with ECDHE and AES-GCM or ChaCha20, on X25519, P-256 and P-384, and certificates with keys of {KEYS}, signed with SHA-256 or SHA-384 (with RSA also SHA-512)"
            )
        }
        A::CertificateExpired if cert.is_some() => ": it has expired".to_owned(),
        A::UnknownCA if cert.is_some() => ": it is signed by none of the CAs that the broker trusts".to_owned(),
        A::UnrecognisedName => ": it doesn't know the server name; see --server-name".to_owned(),
        A::ProtocolVersion => ": it has no version in common with qconsume, which knows 1.2 and 1.3".to_owned(),
        A::InternalError | A::UserCanceled | A::CloseNotify => {
            return ConnectError::transient(format!("the broker ended TLS ({name})"));
        }
        A::CertificateRequired | A::BadCertificate if cert.is_none() => {
            format!(" ({name}): name one with --cert and --key")
        }
        _ => format!(" ({name}); its log says why"),
    };
    Failure::config(format!("the broker refused {what}{why}")).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_certificates_are_printed_without_their_kind() {
        assert_eq!(plain_name("DnsName(\"a.example\")"), Some("a.example"));
        assert_eq!(plain_name("IpAddress(127.0.0.1)"), Some("127.0.0.1"));
        assert_eq!(plain_name("a.example"), Some("a.example"));
        assert_eq!(plain_name("UniformResourceIdentifier(\"spiffe://a\")"), None);
    }

    #[test]
    fn algorithms_have_names_or_at_least_numbers() {
        // As RFC 5480 and RFC 8017 encode them.
        let p521 = [6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1, 6, 5, 0x2b, 0x81, 4, 0, 35];
        assert_eq!(algorithm(&p521), "ECDSA with the curve P-521");
        assert!(!is_usable_key(&p521));
        let p256 = [6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7];
        assert!(is_usable_key(&p256));
        let sha1 = [6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 5, 5, 0];
        assert_eq!(algorithm(&sha1), "RSA with SHA-1");
        assert_eq!(algorithm(&[6, 3, 0x55, 4, 3]), "the algorithm 2.5.4.3");
        for damaged in [&[][..], &[6], &[6, 9, 1], &[6, 0], &[6, 1, 0xff]] {
            let _ = algorithm(damaged);
        }
    }

    #[test]
    fn an_error_without_words_of_ours_is_no_dump() {
        for (text, words) in [
            ("UnknownRevocationStatus", "unknown revocation status"),
            ("peer is incompatible: NoKxGroupsInCommon", "peer is incompatible: no kx groups in common"),
            ("TrailingData(CertificateExtensions)", "trailing data"),
            ("Unsupported { fields: [1, 2] }", "unsupported"),
        ] {
            assert_eq!(spelled_out(text), words);
        }
    }
}
