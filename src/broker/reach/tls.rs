//! TLS by rustls. Nothing turns the check of the broker's certificate off.

use super::{
    address::{Address, Parameters},
    file,
    tls_errors::{flaw, handshake_error},
};
use crate::{
    broker::errors::ConnectError,
    exit::{Failure, is_shortage},
};
use lapin::uri::SASLMechanism;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::net::TcpStream;
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        self, ClientConfig, InconsistentKeys, RootCertStore,
        pki_types::{
            CertificateDer, PrivateKeyDer, ServerName,
            pem::{self, PemObject},
        },
    },
};

/// The options for TLS. They override the URL's parameters.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "TLS")]
pub struct TlsOptions {
    /// Trust the CAs in this file (PEM) only [default: the system's, or SSL_CERT_FILE's]
    #[arg(long, hide_short_help = true, value_name = "FILE", env = "QCONSUME_CACERT")]
    pub cacert: Option<PathBuf>,

    /// Present this client certificate (PEM)
    ///
    /// If no password is given, also log in with it (EXTERNAL).
    #[arg(long, hide_short_help = true, value_name = "FILE", env = "QCONSUME_CERT")]
    pub cert: Option<PathBuf>,

    /// Use this key (PEM) for the client certificate [default: in the file of --cert]
    #[arg(long, hide_short_help = true, value_name = "FILE", env = "QCONSUME_KEY")]
    pub key: Option<PathBuf>,

    /// Expect this name in the broker's certificate [default: the address's host]
    #[arg(long, hide_short_help = true, value_name = "NAME", env = "QCONSUME_SERVER_NAME")]
    pub server_name: Option<String>,
}

impl TlsOptions {
    pub(super) fn apply(&self, address: &mut Address) -> Result<(), Failure> {
        let options = [
            (self.cacert.is_some(), "--cacert (QCONSUME_CACERT)"),
            (self.cert.is_some(), "--cert (QCONSUME_CERT)"),
            (self.key.is_some(), "--key (QCONSUME_KEY)"),
            (self.server_name.is_some(), "--server-name (QCONSUME_SERVER_NAME)"),
        ];
        if !address.tls
            && let Some((_, option)) = options.iter().find(|(is_set, _)| *is_set)
        {
            return Err(Failure::usage(format!(
                "{option} needs TLS: an amqps:// URL, or --ssl together with --server"
            )));
        }
        let parameters = &mut address.parameters;
        if self.cert.is_some() {
            // A key belongs to its certificate: --cert drops the URL's key, too.
            parameters.certfile.clone_from(&self.cert);
            parameters.keyfile = None;
        }
        parameters.cacertfile = self.cacert.clone().or(parameters.cacertfile.take());
        parameters.keyfile = self.key.clone().or(parameters.keyfile.take());
        let name = &mut parameters.server_name_indication;
        *name = self.server_name.clone().or(name.take());
        if parameters.certfile.is_some() && !address.password_given {
            parameters.auth_mechanism.get_or_insert(SASLMechanism::External);
        }
        Ok(())
    }
}

/// The configurations of TLS, one for each distinct set of parameters. Their files are read before connecting.
#[derive(Clone, Debug, Default)]
pub struct Tls(Vec<(Parameters, Arc<ClientConfig>)>);

impl Tls {
    /// Reads the files of all nodes that use TLS; the system's CAs only if a node trusts those.
    pub(super) fn load(nodes: &[Address]) -> Result<Self, Failure> {
        let mut loaded = Self::default();
        for address in nodes {
            let parameters = &address.parameters;
            if address.logs_in_by_certificate() && parameters.certfile.is_none() {
                return Err(Failure::usage(
                    "auth_mechanism=external logs in by a client certificate: it needs amqps:// and --cert (certfile in the URL)",
                ));
            }
            if !address.tls {
                continue;
            }
            server_name(address)?;
            if loaded.config(parameters).is_none() {
                let config = Arc::new(load_config(parameters)?);
                loaded.0.push((parameters.clone(), config));
            }
        }
        Ok(loaded)
    }

    fn config(&self, parameters: &Parameters) -> Option<Arc<ClientConfig>> {
        let found = self.0.iter().find(|(known, _)| known == parameters);
        found.map(|(_, config)| Arc::clone(config))
    }

    pub(super) async fn handshake(
        &self,
        socket: TcpStream,
        address: &Address,
    ) -> Result<TlsStream<TcpStream>, ConnectError> {
        let config = self.config(&address.parameters).expect("it was loaded");
        TlsConnector::from(config)
            .connect(server_name(address)?, socket)
            .await
            .map_err(|error| handshake_error(&error, &address.parameters))
    }
}

fn server_name(address: &Address) -> Result<ServerName<'static>, Failure> {
    let given = address.parameters.server_name_indication.as_deref();
    let name = given.unwrap_or(&address.host);
    // Certificates contain neither IPv6 zones nor the final dot that keeps a resolver from trying search domains.
    let name = name.split_once('%').map_or(name, |(ip, _)| ip);
    let name = name.strip_suffix('.').unwrap_or(name);
    ServerName::try_from(name.to_owned()).map_err(|_| {
        Failure::usage(format!(
            "{name:?} is neither a DNS name nor an IP address, so no certificate can be for it; see --server-name"
        ))
    })
}

fn load_config(parameters: &Parameters) -> Result<ClientConfig, Failure> {
    let roots = match &parameters.cacertfile {
        Some(file) => roots(file)?,
        None => system_roots()?,
    };
    let builder = ClientConfig::builder().with_root_certificates(roots);
    let Some(cert) = &parameters.certfile else {
        return match &parameters.keyfile {
            None => Ok(builder.with_no_client_auth()),
            Some(key) => Err(Failure::usage(format!(
                "the key {} has no client certificate: name that with --cert",
                key.display()
            ))),
        };
    };
    let chain = certificates(cert, "client certificate")?;
    let key_file = parameters.keyfile.as_ref().unwrap_or(cert);
    let key = key(key_file, parameters.keyfile.is_some())?;
    builder.with_client_auth_cert(chain, key).map_err(|error| unusable_client_certificate(error, cert, key_file))
}

fn unusable_client_certificate(error: rustls::Error, cert: &Path, key_file: &Path) -> Failure {
    Failure::config(match error {
        rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
            format!("the key in {} is not the one of the client certificate in {}", key_file.display(), cert.display())
        }
        rustls::Error::InvalidCertificate(error) => {
            format!("the client certificate in {} can't be used: {}", cert.display(), flaw(&error))
        }
        // Any other error is the key's. rustls gives no reason. ring verifies RSA up to 8192 bits, but signs only up to
        // 4096.
        _ => format!(
            "the key in {} can't be used: it has to be RSA with 2048 to 4096 bits, ECDSA with the curve P-256 or P-384 (P-521 is not supported), or Ed25519",
            key_file.display()
        ),
    })
}

fn roots(file: &Path) -> Result<RootCertStore, Failure> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(file, "CA certificate")? {
        roots.add(certificate).map_err(|error| {
            let why = match error {
                rustls::Error::InvalidCertificate(error) => flaw(&error),
                error => error.to_string(),
            };
            Failure::config(format!("a CA certificate in {} can't be used: {why}", file.display()))
        })?;
    }
    Ok(roots)
}

/// The system's CAs, or those of `SSL_CERT_FILE` and `SSL_CERT_DIR`.
fn system_roots() -> Result<RootCertStore, Failure> {
    const HELP: &str = "name the broker's CA with --cacert FILE (QCONSUME_CACERT)";
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    if roots.add_parsable_certificates(found.certs).0 > 0 {
        return Ok(roots);
    }
    for error in &found.errors {
        if let rustls_native_certs::ErrorKind::Io { inner, path } = &error.kind
            && is_shortage(inner)
        {
            return Err(file::read_failure(&path.display().to_string(), inner));
        }
    }
    let set: Vec<_> = ["SSL_CERT_FILE", "SSL_CERT_DIR"]
        .into_iter()
        .filter_map(|name| Some((name, std::env::var_os(name)?)))
        .map(|(name, value)| format!("{name}={}", value.display()))
        .collect();
    if set.is_empty() {
        return Err(Failure::config(format!(
            "there are no CA certificates on this system to check the broker's with: {HELP}, or install the package ca-certificates"
        )));
    }
    let why = found.errors.first().map(|error| format!(" ({error})"));
    Err(Failure::config(format!(
        "there are no CA certificates in {}{}: correct that, or {HELP}",
        set.join(", "),
        why.unwrap_or_default()
    )))
}

fn certificates(file: &Path, what: &str) -> Result<Vec<CertificateDer<'static>>, Failure> {
    let text = read(file, what)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(not_in(file, what, &text)),
        Err(error) => Err(damaged(file, &error)),
    }
}

/// The first key in a file: PKCS#8, PKCS#1 or SEC1.
fn key(file: &Path, own_file: bool) -> Result<PrivateKeyDer<'static>, Failure> {
    let text = read(file, "key")?;
    let shown = String::from_utf8_lossy(&text);
    if shown.contains("BEGIN ENCRYPTED PRIVATE KEY") || shown.contains("Proc-Type: 4,ENCRYPTED") {
        return Err(Failure::config(format!(
            "the key in {} is encrypted with a passphrase, which nobody can type in here: remove it with `openssl pkey`",
            file.display()
        )));
    }
    PrivateKeyDer::from_pem_slice(&text).map_err(|error| match error {
        pem::Error::NoItemsFound if own_file => not_in(file, "key", &text),
        pem::Error::NoItemsFound => Failure::config(format!(
            "there is no key beside the client certificate in {}: name its file with --key (QCONSUME_KEY)",
            file.display()
        )),
        error => damaged(file, &error),
    })
}

fn read(file: &Path, what: &str) -> Result<Vec<u8>, Failure> {
    file::read(file).map_err(|error| file::read_failure(&format!("the {what} {}", file.display()), &error))
}

/// Leaves out the error's details: some of them contain pieces of the file, which may be a key.
fn damaged(file: &Path, error: &pem::Error) -> Failure {
    let what = match error {
        pem::Error::MissingSectionEnd { .. } => "its end is missing",
        pem::Error::Base64Decode(_) => "its base64 can't be decoded",
        _ => "its form is wrong",
    };
    Failure::config(format!("{} is damaged PEM: {what}", file.display()))
}

/// Says what the file contains instead.
fn not_in(file: &Path, what: &str, text: &[u8]) -> Failure {
    /// The tag of an ASN.1 sequence, with which everything in DER begins.
    const SEQUENCE: u8 = 0x30;
    if let Some(label) = pem_label(text) {
        return Failure::config(format!("there is no {what} in {}, only PEM of another kind: {label}", file.display()));
    }
    let instead = match text {
        [] => "the file is empty",
        // Two bytes of length, and its version, which is 3 (RFC 7292, 4).
        [SEQUENCE, 0x82, _, _, 2, 1, 3, ..] => {
            "it is PKCS#12 (.p12, .pfx), which `openssl pkcs12 -nodes` turns into PEM"
        }
        [SEQUENCE, ..] => {
            "it isn't PEM but looks like DER, which `openssl x509 -inform der` or `openssl pkey -inform der` turns into PEM"
        }
        _ => "it isn't PEM (-----BEGIN …)",
    };
    Failure::config(format!("there is no {what} in {}: {instead}", file.display()))
}

fn pem_label(text: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(text);
    let (_, after) = text.split_once("-----BEGIN ")?;
    let (label, _) = after.split_once("-----")?;
    let is_label = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == ' ';
    (label.len() < 24 && label.chars().all(is_label)).then(|| label.to_owned())
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
}
