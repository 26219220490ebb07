//! TLS by rustls: which certificates are trusted, and what went wrong when one wasn't.
//!
//! There is no way to leave the check of the broker's certificate out.

use super::{
    address::{Address, AuthMechanism},
    errors::ConnectError,
};
use crate::exit::{Exit, Failure};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, InconsistentKeys, RootCertStore,
    pki_types::{
        CertificateDer, PrivateKeyDer, ServerName, UnixTime,
        pem::{self, PemObject},
    },
};
use std::{
    fmt::Display,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

/// What TLS needs, for each node that wants it: read before anything is connected.
#[derive(Clone, Debug, Default)]
pub struct Tls(Vec<(Files, Arc<ClientConfig>)>);

/// The files that an address names.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Files {
    cacert: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
}

impl Files {
    fn of(address: &Address) -> Self {
        let parameters = &address.parameters;
        Self {
            cacert: parameters.cacertfile.clone(),
            cert: parameters.certfile.clone(),
            key: parameters.keyfile.clone(),
        }
    }

    /// Where the CAs come from, for messages.
    fn trusted(&self) -> String {
        match (&self.cacert, std::env::var_os("SSL_CERT_FILE")) {
            (Some(file), _) => file.display().to_string(),
            (None, Some(file)) => format!("{} (SSL_CERT_FILE)", file.display()),
            (None, None) => "the system's CA certificates".to_owned(),
        }
    }
}

impl Tls {
    /// Reads the files of all nodes that want TLS; the system's CAs only if one of them trusts those.
    ///
    /// # Errors
    /// 78 for a file that isn't as it should be, 64 for what contradicts itself.
    pub fn load(nodes: &[Address]) -> Result<Self, Failure> {
        let mut loaded = Self::default();
        for address in nodes {
            let files = Files::of(address);
            let external = address.parameters.auth_mechanism == Some(AuthMechanism::External);
            if external && files.cert.is_none() {
                return Err(Failure::new(
                    Exit::Usage,
                    "auth_mechanism=external logs in by a client certificate: it needs amqps:// and --cert (certfile in the URL)",
                ));
            }
            if !address.tls {
                continue;
            }
            server_name(address).map_err(|trouble| trouble.failure)?;
            if !loaded.0.iter().any(|(known, _)| *known == files) {
                let config = Arc::new(config(&files)?);
                loaded.0.push((files, config));
            }
        }
        Ok(loaded)
    }

    /// Makes a connected socket a safe one.
    pub(super) async fn handshake(
        &self,
        socket: TcpStream,
        address: &Address,
    ) -> Result<TlsStream<TcpStream>, ConnectError> {
        let files = Files::of(address);
        let (_, config) = self
            .0
            .iter()
            .find(|(known, _)| *known == files)
            .ok_or_else(|| ConnectError::permanent(Exit::Software, "TLS was not loaded"))?;
        TlsConnector::from(Arc::clone(config))
            .connect(server_name(address)?, socket)
            .await
            .map_err(|error| in_handshake(&error, &files))
    }
}

/// The name, or the IP address, that the broker's certificate has to be for.
fn server_name(address: &Address) -> Result<ServerName<'static>, ConnectError> {
    let given = address.parameters.server_name_indication.as_deref();
    let name = given.unwrap_or(&address.host);
    // No certificate has an IPv6 zone, nor the dot that keeps a resolver from trying search domains.
    let name = name.split_once('%').map_or(name, |(ip, _)| ip);
    let name = name.strip_suffix('.').unwrap_or(name);
    ServerName::try_from(name.to_owned()).map_err(|_| {
        let what = if given.is_some() {
            "the server name"
        } else {
            "the host"
        };
        ConnectError::permanent(
            Exit::Usage,
            format!("{what} {name:?} is neither a DNS name nor an IP address, so no certificate can be for it; see --server-name"),
        )
    })
}

fn config(files: &Files) -> Result<ClientConfig, Failure> {
    let roots = match &files.cacert {
        Some(file) => roots(file)?,
        None => system_roots()?,
    };
    let builder = ClientConfig::builder().with_root_certificates(roots);
    let cert = match (&files.cert, &files.key) {
        (Some(cert), _) => cert,
        (None, None) => return Ok(builder.with_no_client_auth()),
        (None, Some(key)) => {
            return Err(Failure::new(
                Exit::Usage,
                format!(
                    "there is a key, {}, but no client certificate: --cert",
                    key.display()
                ),
            ));
        }
    };
    let chain = certificates(cert, "client certificate")?;
    let key_file = files.key.as_ref().unwrap_or(cert);
    let key = key(key_file, files.key.is_some())?;
    builder.with_client_auth_cert(chain, key).map_err(|error| {
        let (cert, key) = (cert.display(), key_file.display());
        match error {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => config_failure(
                format!("the key in {key} is not the one of the client certificate in {cert}"),
            ),
            rustls::Error::InvalidCertificate(error) if is_webpki(&error, "UnsupportedCertVersion") => {
                config_failure(format!(
                    "the client certificate in {cert} is an X.509 version 1 certificate: issue a version 3 one (`openssl x509 -req` with -extfile)"
                ))
            }
            rustls::Error::InvalidCertificate(error) => config_failure(format!(
                "the client certificate in {cert} is damaged: {error}"
            )),
            _ => config_failure(format!(
                "the key in {key} is none that can be used: it has to be RSA, ECDSA with the curve P-256 or P-384 (P-521 is not supported), or Ed25519"
            )),
        }
    })
}

/// The CAs of a file, and no others.
fn roots(file: &Path) -> Result<RootCertStore, Failure> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(file, "CA certificate")? {
        roots.add(certificate).map_err(|error| {
            config_failure(format!(
                "a CA certificate in {} is damaged: {error}",
                file.display()
            ))
        })?;
    }
    Ok(roots)
}

/// The system's CAs, or those of `SSL_CERT_FILE` and `SSL_CERT_DIR`.
fn system_roots() -> Result<RootCertStore, Failure> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(found.certs);
    if added > 0 {
        return Ok(roots);
    }
    const HELP: &str = "name the broker's CA with --cacert FILE (QCONSUME_CACERT)";
    let variables = ["SSL_CERT_FILE", "SSL_CERT_DIR"];
    let set: Vec<_> = variables
        .iter()
        .filter_map(|name| Some((name, std::env::var_os(name)?)))
        .map(|(name, value)| format!("{name}={}", value.display()))
        .collect();
    Err(config_failure(if set.is_empty() {
        format!(
            "there are no CA certificates on this system to check the broker's with: {HELP}, or install the package ca-certificates"
        )
    } else {
        let why = found.errors.first().map(|error| format!(" ({error})"));
        format!(
            "there are no CA certificates in {}{}: correct that, or {HELP}",
            set.join(", "),
            why.unwrap_or_default()
        )
    }))
}

/// All certificates of a file, of which there is at least one.
fn certificates(file: &Path, what: &str) -> Result<Vec<CertificateDer<'static>>, Failure> {
    let text = read(file, what)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(config_failure(format!(
            "there is no {what} in {}: {}",
            file.display(),
            what_is_there(&text)
        ))),
        Err(error) => Err(damaged(file, &error)),
    }
}

/// The first key of a file: PKCS#8, PKCS#1 or SEC1.
fn key(file: &Path, own_file: bool) -> Result<PrivateKeyDer<'static>, Failure> {
    let text = read(file, "key")?;
    let contains = |words: &str| {
        text.windows(words.len())
            .any(|part| part == words.as_bytes())
    };
    if contains("BEGIN ENCRYPTED PRIVATE KEY") || contains("Proc-Type: 4,ENCRYPTED") {
        return Err(config_failure(format!(
            "the key in {} is encrypted with a passphrase, which nobody could type in here: take the passphrase away with `openssl pkey`",
            file.display()
        )));
    }
    match PrivateKeyDer::from_pem_slice(&text) {
        Ok(key) => Ok(key),
        Err(pem::Error::NoItemsFound) if !own_file => Err(config_failure(format!(
            "there is no key beside the client certificate in {}: name its file with --key (QCONSUME_KEY)",
            file.display()
        ))),
        Err(pem::Error::NoItemsFound) => Err(config_failure(format!(
            "there is no key in {}: {}",
            file.display(),
            what_is_there(&text)
        ))),
        Err(error) => Err(damaged(file, &error)),
    }
}

fn read(file: &Path, what: &str) -> Result<Vec<u8>, Failure> {
    let text = std::fs::read(file).map_err(|error| {
        let file = file.display();
        config_failure(format!("the {what} {file} can't be read: {error}"))
    })?;
    // Some editors begin a file with a byte order mark.
    Ok(text
        .strip_prefix("\u{feff}".as_bytes())
        .map(<[u8]>::to_vec)
        .unwrap_or(text))
}

/// The error's details are left out: some of them contain pieces of the file, which may be a key.
fn damaged(file: &Path, error: &pem::Error) -> Failure {
    let what = match error {
        pem::Error::MissingSectionEnd { .. } => "its end is missing",
        pem::Error::Base64Decode(_) => "its base64 can't be decoded",
        _ => "its form is wrong",
    };
    config_failure(format!("{} is damaged PEM: {what}", file.display()))
}

fn what_is_there(text: &[u8]) -> &'static str {
    /// An ASN.1 sequence, with which everything in DER begins.
    const SEQUENCE: u8 = 0x30;
    if text.is_empty() {
        "the file is empty"
    } else if text.windows(11).any(|part| part == b"-----BEGIN ") {
        "the PEM in it is of something else"
    } else if text.first() == Some(&SEQUENCE) {
        "it isn't PEM but looks like DER, which `openssl x509 -inform der` or `openssl pkey -inform der` turns into PEM"
    } else {
        "it isn't PEM (-----BEGIN …)"
    }
}

fn config_failure(message: String) -> Failure {
    Failure::new(Exit::Config, message)
}

/// What an error during the TLS handshake means.
fn in_handshake(error: &io::Error, files: &Files) -> ConnectError {
    let permanent = |message: String| ConnectError::permanent(Exit::Config, message);
    match tls_error(error) {
        Some(rustls::Error::InvalidCertificate(error)) => permanent(untrusted(error, files)),
        Some(rustls::Error::InvalidMessage(_)) => permanent(
            "what answers isn't TLS: is the port right (5671 is usual), or should the URL begin with amqp://?".to_owned(),
        ),
        Some(rustls::Error::PeerIncompatible(why)) => {
            permanent(format!("the broker and qconsume have no kind of TLS in common: {why:?}"))
        }
        Some(rustls::Error::AlertReceived(alert)) => refused(*alert, files),
        Some(error) => permanent(format!("the TLS handshake failed: {error}")),
        None if error.kind() == io::ErrorKind::UnexpectedEof => ConnectError::transient(
            "the connection was closed during the TLS handshake; is this a port for TLS?",
        ),
        None => ConnectError::transient(format!("the TLS handshake failed: {error}")),
    }
}

/// What an error on a connection means that TLS was agreed on for: with TLS 1.3 a broker's refusal of the client's
/// certificate comes when the handshake is over for us.
pub(super) fn refusal(error: &io::Error, address: &Address) -> Option<ConnectError> {
    match tls_error(error)? {
        rustls::Error::AlertReceived(alert) => Some(refused(*alert, &Files::of(address))),
        _ => None,
    }
}

fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

/// Why the broker's certificate isn't good enough.
fn untrusted(error: &CertificateError, files: &Files) -> String {
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
        E::Expired => format!("{NAME}, or one that vouches for it, has expired"),
        E::NotValidYet => format!("{NAME}, or one that vouches for it, is not valid yet"),
        E::UnknownIssuer => format!(
            "{NAME} is signed by an unknown issuer, none of {}: name the broker's CA with --cacert FILE (QCONSUME_CACERT)",
            files.trusted()
        ),
        E::NotValidForNameContext {
            expected,
            presented,
        } => {
            let names: Vec<_> = presented.iter().map(|name| plain_name(name)).collect();
            let names = if names.is_empty() {
                "no name at all (a common name alone doesn't count)".to_owned()
            } else {
                names.join(", ")
            };
            format!(
                "{NAME} is for {names}, not for {}: use a name that it is for, or tell the one to check with --server-name (QCONSUME_SERVER_NAME)",
                expected.to_str()
            )
        }
        E::InvalidPurpose | E::InvalidPurposeContext { .. } => {
            format!("{NAME} is not one for servers: its extended key usage lacks serverAuth")
        }
        error if is_webpki(error, "CaUsedAsEndEntity") => format!(
            "{NAME} is that of a CA itself (CA:TRUE), which a server must not use: sign one for the broker with it"
        ),
        error => format!("{NAME} can't be trusted: {error}"),
    }
}

/// Whether webpki's error of this name is in there; its type isn't ours to name.
fn is_webpki(error: &CertificateError, name: &str) -> bool {
    matches!(error, CertificateError::Other(other) if format!("{other:?}").contains(name))
}

/// `DnsName("a.example")` and `IpAddress(127.0.0.1)` as people write them.
fn plain_name(name: &str) -> &str {
    let inner = name
        .split_once('(')
        .and_then(|(_, rest)| rest.strip_suffix(')'));
    inner.unwrap_or(name).trim_matches('"')
}

fn date(time: UnixTime) -> impl Display {
    humantime::format_rfc3339_seconds(SystemTime::UNIX_EPOCH + Duration::from_secs(time.as_secs()))
}

/// What the broker's refusal means.
fn refused(alert: AlertDescription, files: &Files) -> ConnectError {
    use AlertDescription as A;
    let ours = match &files.cert {
        Some(file) => format!("the client certificate in {}", file.display()),
        None => "a connection without a client certificate".to_owned(),
    };
    let message = match (alert, &files.cert) {
        (A::HandshakeFailure, _) => format!(
            "the broker refused the TLS handshake of {ours}: it asks for another client certificate (--cert and --key), or has no cipher or curve in common with qconsume, which knows TLS 1.3, and TLS 1.2 with ECDHE and AES-GCM or ChaCha20, on X25519, P-256 and P-384"
        ),
        (A::CertificateRequired, _) | (A::BadCertificate, None) => {
            format!(
                "the broker refused {ours} ({alert:?}): if it asks for one, name it with --cert and --key"
            )
        }
        (A::CertificateExpired, _) => format!("the broker refused {ours}: it has expired"),
        (A::UnknownCA, _) => {
            format!(
                "the broker refused {ours}: it is signed by none of the CAs that the broker trusts"
            )
        }
        (A::UnrecognisedName, _) => {
            "the broker doesn't know the server name that it was asked for; see --server-name"
                .to_owned()
        }
        (A::ProtocolVersion, _) => {
            "the broker and qconsume have no version of TLS in common (1.2 or 1.3)".to_owned()
        }
        (
            A::BadCertificate
            | A::UnsupportedCertificate
            | A::CertificateRevoked
            | A::CertificateUnknown
            | A::AccessDenied
            | A::DecryptError,
            Some(_),
        ) => format!("the broker refused {ours} ({alert:?}); its log says why"),
        (A::InternalError | A::UserCanceled | A::CloseNotify, _) => {
            return ConnectError::transient(format!("the broker ended TLS ({alert:?})"));
        }
        _ => format!("the broker refused TLS ({alert:?}); its log says why"),
    };
    ConnectError::permanent(Exit::Config, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_certificates() {
        let name = |url: &str| {
            let address = Address::parse(url).unwrap();
            server_name(&address).map(|name| name.to_str().into_owned())
        };
        for (url, expected) in [
            ("amqps://rabbit.example", "rabbit.example"),
            ("amqps://rabbit.example.", "rabbit.example"),
            ("amqps://rabbit_mq", "rabbit_mq"),
            ("amqps://10.0.0.1", "10.0.0.1"),
            ("amqps://[::1]", "::1"),
            ("amqps://[fe80::1%25eth0]", "fe80::1"),
            ("amqps://10.0.0.1?server_name_indication=rabbit", "rabbit"),
        ] {
            assert_eq!(name(url).unwrap(), expected, "{url}");
        }
        assert!(name("amqps://a%20b").is_err());
    }

    #[test]
    fn names_of_certificates_read_as_people_write_them() {
        assert_eq!(plain_name("DnsName(\"a.example\")"), "a.example");
        assert_eq!(plain_name("IpAddress(127.0.0.1)"), "127.0.0.1");
        assert_eq!(plain_name("a.example"), "a.example");
    }
}
