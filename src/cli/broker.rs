//! The options for reaching the broker, of qconsume and qpublish.

use super::{AMQP_TOOLS, Given, name, switch};
use crate::{
    broker::{
        ConnectOptions, Connector, Nodes, SecretFile, TlsOptions,
        reach::address::{Address, Secret, parse_list, scheme},
    },
    clock::duration_above_zero,
    exit::Failure,
};
use clap::{ArgAction, Args};
use std::{path::PathBuf, time::Duration};

/// The variable of rabbitmq-c's newer tools, used if no other address is given.
const AMQP_URL: &str = "AMQP_URL";

/// What `--hide-url` removes from the command's environment: the broker's address and what logs in.
pub(super) const SECRETS: [&str; 9] = [
    "BROKER_URL",
    "BROKER_URL_FILE",
    AMQP_URL,
    "QCONSUME_SERVER",
    "QCONSUME_USERNAME",
    "QCONSUME_PASSWORD",
    "QCONSUME_PASSWORD_FILE",
    "QCONSUME_AUTHFILE",
    "QCONSUME_KEY",
];

/// Where the broker is, and how to reach it.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Broker")]
pub struct BrokerOptions {
    /// Connect to amqp://user:password@host/vhost, or amqps:// for TLS
    ///
    /// Separate the nodes of a cluster by commas. The variable AMQP_URL is used when no other address is given.
    #[arg(short, long, value_name = "URL", env = "BROKER_URL")]
    url: Option<Secret>,

    /// Read the URL from this file, such as a mounted secret
    ///
    /// The file is read again for each new connection, so a rotated password is found.
    #[arg(long, value_name = "FILE", env = "BROKER_URL_FILE")]
    url_file: Option<PathBuf>,

    /// Read the password, such as an OAuth 2 token, from this file
    ///
    /// It takes precedence over the URL's password. The file is read again for each new connection. If it gets a new token (a JWT) while a connection is open, the broker gets that too, so a command may run longer than a token is valid.
    #[arg(long, hide_short_help = true, value_name = "FILE", env = "QCONSUME_PASSWORD_FILE")]
    password_file: Option<PathBuf>,

    /// Try this long to reach the broker and the queue
    ///
    /// A DURATION is 500ms, 10s, 5m, 1h30m, or plain seconds. The time starts with the first look-up of a name, and ends when qconsume's consumer is registered, or qpublish is connected. It starts again when qconsume loses the connection while it waits for a message. qconsume also waits for a queue that doesn't exist yet.
    #[arg(long, hide_short_help = true, value_name = "DURATION", env = "QCONSUME_CONNECT_TIMEOUT", default_value = "60s", value_parser = duration_above_zero)]
    pub connect_timeout: Duration,

    /// Propose a heartbeat interval of this many seconds; 0 leaves it to the broker [default: 10]
    ///
    /// A broker that no longer answers is noticed after 2 to 2.5 intervals. When the broker or a proxy proposes 0, there are no heartbeats.
    #[arg(long, hide_short_help = true, value_name = "SECONDS", env = "QCONSUME_HEARTBEAT")]
    heartbeat: Option<u16>,

    #[command(flatten)]
    tls: TlsOptions,

    /// Connect to this host, instead of a URL
    #[arg(short, long, hide_short_help = true, value_name = "HOST", env = "QCONSUME_SERVER", help_heading = AMQP_TOOLS)]
    server: Option<String>,

    /// Connect to this port [default: 5672, with --ssl 5671]
    // No variable: Kubernetes sets QCONSUME_PORT for a Service named qconsume.
    #[arg(long, hide_short_help = true, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..), help_heading = AMQP_TOOLS)]
    port: Option<u16>,

    /// Use this virtual host [default: /]
    #[arg(long, hide_short_help = true, value_name = "VHOST", env = "QCONSUME_VHOST", value_parser = name, help_heading = AMQP_TOOLS)]
    vhost: Option<String>,

    /// Log in as this user [default: guest]
    #[arg(long, hide_short_help = true, value_name = "USER", env = "QCONSUME_USERNAME", help_heading = AMQP_TOOLS)]
    username: Option<String>,

    /// Log in with this password [default: guest]
    ///
    /// On the command line, every user of the machine can see it. Set the variable instead.
    #[arg(long, hide_short_help = true, value_name = "PASSWORD", env = "QCONSUME_PASSWORD", help_heading = AMQP_TOOLS)]
    password: Option<Secret>,

    /// Read two lines, username:USER and password:PASSWORD, from this file
    #[arg(long, hide_short_help = true, value_name = "FILE", env = "QCONSUME_AUTHFILE", help_heading = AMQP_TOOLS)]
    authfile: Option<PathBuf>,

    /// Use TLS (implied by amqps://)
    #[arg(long, hide_short_help = true, env = "QCONSUME_SSL", value_parser = switch, help_heading = AMQP_TOOLS)]
    ssl: bool,

    /// Don't trust the system's CAs; --cacert has the same effect
    #[arg(long, hide = true, env = "QCONSUME_NO_DEFAULT_CERT_PATHS", value_parser = switch, help_heading = AMQP_TOOLS)]
    no_default_cert_paths: bool,

    /// Print help
    #[arg(short = '?', long, hide = true, action = ArgAction::HelpLong, help_heading = AMQP_TOOLS)]
    usage: Option<bool>,

    /// Set by [`find_nodes`](Self::find_nodes).
    #[arg(skip)]
    nodes: Nodes,
}

impl BrokerOptions {
    /// A connector to these nodes, for a connection of this name. Logs the URLs' parameters for other clients.
    pub fn connector(&self, name: String) -> Connector {
        let nodes = self.nodes.known.iter();
        for parameter in nodes.flat_map(|node| &node.parameters.ignored) {
            tracing::debug!("the URL's parameter {parameter} is for another client: ignored");
        }
        let options = ConnectOptions { timeout: self.connect_timeout, heartbeat: self.heartbeat, name };
        Connector::new(self.nodes.clone(), options)
    }

    /// The nodes, once the options are checked.
    #[cfg(fuzzing)]
    pub fn addresses(&self) -> &[Address] {
        &self.nodes.known
    }

    /// Finds the nodes and reads their files.
    ///
    /// # Errors
    /// 64 for wrong options, 78 for a file that can't be used, 71 if the system is short of something.
    pub(crate) fn find_nodes(&mut self, given: &Given<'_>) -> Result<(), Failure> {
        self.nodes = self.nodes_given(given)?;
        self.nodes.tls_options = self.tls.clone();
        self.nodes.read()?;
        for address in &self.nodes.known {
            if self.ssl && !address.tls {
                return Err(Failure::usage(
                    "--ssl asks for TLS, but the URL says amqp://, which is without TLS: make it amqps://",
                ));
            }
            if self.no_default_cert_paths && address.tls && address.parameters.cacertfile.is_none() {
                return Err(Failure::usage(
                    "--no-default-cert-paths leaves no CA to trust: name the broker's with --cacert",
                ));
            }
        }
        Ok(())
    }

    fn nodes_given(&self, given: &Given<'_>) -> Result<Nodes, Failure> {
        let nodes = |known| Nodes { known, ..Nodes::default() };
        let (url, url_file) = (given.precedence("url"), given.precedence("url_file"));
        let address = url.max(url_file);
        if given.precedence("server") > address {
            return self.server(given);
        }
        if given.is_given("url") && url == url_file {
            return Err(both_set(given, "url", "url_file"));
        }
        let (option, parsed) = match (&self.url, &self.url_file) {
            (Some(text), _) if url > url_file => (given.name("url"), parse_list(text.expose()).map(nodes)),
            (_, Some(path)) => {
                let url_file = secret_file(given, "url_file", Some(path));
                (given.name("url_file"), Ok(Nodes { url_file, ..Nodes::default() }))
            }
            _ => {
                let text = std::env::var_os(AMQP_URL).unwrap_or_default();
                let text = text.to_str().ok_or_else(|| Failure::usage("AMQP_URL isn't UTF-8"))?;
                if text.is_empty() {
                    return Err(Failure::usage(
                        "no broker: set BROKER_URL (amqp://user:password@host/vhost) or BROKER_URL_FILE, or use --url, or --server",
                    ));
                }
                (AMQP_URL.to_owned(), parse_list(text).map(nodes))
            }
        };
        // Before the URL's own mistakes, so that the conflict is reported first.
        for part in ["server", "port", "vhost", "username", "password", "authfile"] {
            if given.is_given(part) && given.precedence(part) >= address {
                let part = given.name(part);
                return Err(Failure::usage(format!(
                    "{part} and {option} can't be used at the same time: leave {part} out, and write its value into the URL"
                )));
            }
        }
        let nodes = parsed.map_err(|error| Failure::usage(format!("{option}: {error}")))?;
        Ok(Nodes { password_file: secret_file(given, "password_file", self.password_file.as_ref()), ..nodes })
    }

    /// The login is the authfile's, unless `--username`, `--password` or `--password-file` takes precedence.
    fn server(&self, given: &Given<'_>) -> Result<Nodes, Failure> {
        let mut address = server_address(self.server.as_deref().unwrap_or_default(), self.ssl, self.port)?;
        if let Some(name) = self.vhost.as_ref().filter(|name| !name.is_empty()) {
            address.virtual_host.clone_from(name);
        }
        let authfile = given.precedence("authfile");
        let (password, password_file) = (given.precedence("password"), given.precedence("password_file"));
        let login = given.precedence("username").max(password).max(password_file);
        if given.is_given("authfile") && authfile == login {
            return Err(Failure::usage(
                "--authfile can't be used together with --username, --password or --password-file",
            ));
        }
        if given.is_given("password") && password == password_file {
            return Err(both_set(given, "password", "password_file"));
        }
        let mut nodes = Nodes::default();
        if authfile > login {
            nodes.authfile = secret_file(given, "authfile", self.authfile.as_ref());
        } else {
            if let Some(username) = &self.username {
                address.username.clone_from(username);
            }
            if let Some(password) = &self.password {
                address.set_password(password.clone());
            }
            if password_file > password {
                nodes.password_file = secret_file(given, "password_file", self.password_file.as_ref());
            }
        }
        nodes.known = vec![address];
        Ok(nodes)
    }
}

fn both_set(given: &Given<'_>, one: &str, other: &str) -> Failure {
    let (one, other) = (given.name(one), given.name(other));
    Failure::usage(format!("{one} and {other} are both set: leave one out"))
}

fn secret_file(given: &Given<'_>, id: &str, path: Option<&PathBuf>) -> Option<SecretFile> {
    path.map(|path| SecretFile::new(path.clone(), given.name(id)))
}

/// The address for a host or an IPv6 address, with or without brackets and a port.
fn server_address(server: &str, tls: bool, port: Option<u16>) -> Result<Address, Failure> {
    // So that no part of a URL's password is taken for a port and printed.
    if server.contains(['/', '@', '?']) {
        return Err(Failure::usage("--server names a host; a whole URL goes to --url"));
    }
    let bare_ipv6 = server.matches(':').count() > 1 && !server.starts_with('[');
    let host = if bare_ipv6 { format!("[{server}]") } else { server.to_owned() };
    if server.is_empty() || server.starts_with(':') && !bare_ipv6 {
        return Err(Failure::usage("--server names no host"));
    }
    let after_brackets = host.rsplit(']').next().unwrap_or_default();
    if port.is_some() && after_brackets.contains(':') {
        return Err(Failure::usage("--server and --port both name the port"));
    }
    let port = port.map_or(String::new(), |port| format!(":{port}"));
    // In a URL the `%` before an IPv6 address's zone is encoded.
    let host = host.replace('%', "%25");
    let url = format!("{}://{host}{port}", scheme(tls));
    Address::parse(&url).map_err(|error| Failure::usage(format!("--server: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_a_host_and_perhaps_a_port() {
        for (server, host, port) in [
            ("rabbit", "rabbit", 5672),
            ("rabbit:5673", "rabbit", 5673),
            ("::1", "::1", 5672),
            ("0::1", "::1", 5672),
            ("[::1]", "::1", 5672),
            ("[::1]:5673", "::1", 5673),
            ("fe80::1%eth0", "fe80::1%eth0", 5672),
        ] {
            let address = server_address(server, false, None).unwrap();
            assert_eq!((address.host.as_str(), address.port), (host, port), "{server}");
        }
        for server in ["", ":5672", "rabbit:", "rabbit:0", "rabbit:x", "[::1]5", "amqp://u:p@h"] {
            assert!(server_address(server, false, None).is_err(), "{server}");
        }
        assert_eq!(server_address("::1", true, None).unwrap().port, 5671);
        assert_eq!(server_address("::1", true, Some(1)).unwrap().port, 1);
        assert!(server_address("[::1]:2", true, Some(1)).is_err());
    }
}
