//! The nodes of the broker: given once, or in a file that is read again for each new connection.

use super::{
    address::{Address, parse_list},
    tls::Tls,
};
use crate::exit::Failure;
use lapin::uri::SASLMechanism;
use std::path::PathBuf;

/// The options for TLS, which go over the URL's own parameters.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "TLS")]
pub struct TlsOptions {
    /// Trust the CAs in this file (PEM) only [default: the system's, or SSL_CERT_FILE's]
    #[arg(long, hide_short_help = true, value_name = "FILE", env = "QCONSUME_CACERT")]
    pub cacert: Option<PathBuf>,

    /// Present this client certificate (PEM)
    ///
    /// Where no password is given, also log in with it (EXTERNAL).
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
    fn apply(&self, address: &mut Address) -> Result<(), Failure> {
        let options = [
            (self.cacert.is_some(), "--cacert (QCONSUME_CACERT)"),
            (self.cert.is_some(), "--cert (QCONSUME_CERT)"),
            (self.key.is_some(), "--key (QCONSUME_KEY)"),
            (self.server_name.is_some(), "--server-name (QCONSUME_SERVER_NAME)"),
        ];
        if let Some((_, option)) = options.iter().find(|(set, _)| *set && !address.tls) {
            return Err(Failure::usage(format!("{option} needs TLS: an amqps:// URL, or --ssl beside --server")));
        }
        let parameters = &mut address.parameters;
        if self.cert.is_some() {
            // The key belongs to its certificate: the URL's goes with the URL's.
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

/// The nodes of one cluster.
#[derive(Clone, Debug, Default)]
pub struct Nodes {
    /// Their addresses, as they were when they were read last.
    pub known: Vec<Address>,
    /// The file that these are in, a mounted secret, which may change; and the option or variable that names it.
    pub file: Option<(PathBuf, String)>,
    /// What goes for all of them.
    pub options: TlsOptions,
    /// What TLS needs for them.
    pub tls: Tls,
}

impl Nodes {
    /// Whether they are in a file that may have changed; a pipe, as of a shell's `<(…)`, can be read only once.
    pub(super) fn may_change(&self) -> bool {
        self.file.as_ref().is_some_and(|(path, _)| path.is_file())
    }

    /// Makes ready to connect to the nodes, at least one, as they are now.
    ///
    /// # Errors
    /// 78 for a file that can't be read or used, 64 for a malformed address or one that contradicts the options.
    pub fn read(&mut self) -> Result<(), Failure> {
        if let Some((path, option)) = &self.file {
            let text = std::fs::read_to_string(path).map_err(|error| {
                let path = path.display();
                Failure::config(format!("{option}: {path} can't be read: {error}"))
            })?;
            // Some editors begin a file with a byte order mark.
            self.known = parse_list(text.strip_prefix('\u{feff}').unwrap_or(&text))
                .map_err(|error| Failure::usage(format!("{option}: {error}")))?;
        }
        for address in &mut self.known {
            self.options.apply(address)?;
        }
        self.tls = Tls::load(&self.known)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Exit;

    #[test]
    fn a_file_is_read_again_and_may_begin_with_a_byte_order_mark() {
        let path = std::env::temp_dir().join(format!("qconsume-nodes-{}", std::process::id()));
        let mut nodes = Nodes { file: Some((path.clone(), "--url-file".to_owned())), ..Nodes::default() };
        for (text, password) in [("amqp://u:one@h\n", "one"), ("\u{feff}amqp://u:two@h", "two")] {
            std::fs::write(&path, text).unwrap();
            nodes.read().unwrap();
            assert_eq!(nodes.known[0].password.expose(), password);
        }
        std::fs::remove_file(&path).unwrap();
        assert_eq!(nodes.read().unwrap_err().exit, Exit::Config);
    }
}
