//! The options that say where the broker is and how to reach it: the same for qconsume and qpublish.

use super::{AMQP_TOOLS, Given, name, switch};
use crate::{
    broker::{
        Broker, ConnectOptions, Nodes, SecretFile, TlsOptions,
        reach::address::{Address, Secret, parse_list},
    },
    clock::duration_above_zero,
    exit::Failure,
};
use clap::{ArgAction, Args};
use std::{path::PathBuf, time::Duration};

/// What rabbitmq-c's own newer tools call the address; it counts where nobody says otherwise.
const AMQP_URL: &str = "AMQP_URL";

/// What `--hide-url` keeps from the command: where the broker is, and what one could log in with.
pub(super) const SECRETS: [&str; 7] = [
    "BROKER_URL",
    "BROKER_URL_FILE",
    AMQP_URL,
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
    /// A DURATION is 500ms, 10s, 5m, 1h30m, or plain seconds. The time starts with the first look-up of a name, and ends when qconsume's consumer is registered, or qpublish's channel is open. It starts anew when qconsume loses the connection while it waits for a message. qconsume also waits for a queue that doesn't exist yet.
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
    // No variable: Kubernetes would set QCONSUME_PORT for a Service named qconsume.
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

    /// Use TLS; a URL must begin with amqps:// then
    #[arg(long, hide_short_help = true, env = "QCONSUME_SSL", value_parser = switch, help_heading = AMQP_TOOLS)]
    ssl: bool,

    /// Don't trust the system's CAs: --cacert says so, too
    #[arg(long, hide = true, env = "QCONSUME_NO_DEFAULT_CERT_PATHS", value_parser = switch, help_heading = AMQP_TOOLS)]
    no_default_cert_paths: bool,

    /// Print help
    #[arg(short = '?', long, hide = true, action = ArgAction::HelpLong, help_heading = AMQP_TOOLS)]
    usage: Option<bool>,

    /// The nodes, once the options are checked.
    #[arg(skip)]
    nodes: Nodes,
}

impl BrokerOptions {
    /// The broker, for connections of this name; tells what the URLs have for other clients only.
    pub fn broker(&self, name: String) -> Broker {
        let nodes = self.nodes.known.iter();
        for parameter in nodes.flat_map(|node| &node.parameters.ignored) {
            tracing::debug!("the URL's parameter {parameter} is for another client: ignored");
        }
        let options = ConnectOptions { timeout: self.connect_timeout, heartbeat: self.heartbeat, name };
        Broker::new(self.nodes.clone(), options)
    }

    /// The nodes, once the options are checked.
    #[cfg(fuzzing)]
    pub fn addresses(&self) -> &[Address] {
        &self.nodes.known
    }

    /// Finds the nodes, and reads the files that they need: a flag goes over a variable; a URL and the parts of one
    /// contradict each other.
    ///
    /// # Errors
    /// 64 for what isn't as it should be, 78 for a file that can't be read or used.
    pub(crate) fn find_nodes(&mut self, given: &Given<'_>) -> Result<(), Failure> {
        self.nodes = self.source(given)?;
        self.nodes.options = self.tls.clone();
        self.nodes.read()?;
        for address in &self.nodes.known {
            if self.ssl && !address.tls {
                return Err(Failure::usage(
                    "--ssl asks for TLS, but the URL says amqp://, which is without: make it amqps://",
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

    fn source(&self, given: &Given<'_>) -> Result<Nodes, Failure> {
        let nodes = |known| Nodes { known, ..Nodes::default() };
        let (url, file) = (given.level("url"), given.level("url_file"));
        if given.level("server") > url.max(file) {
            return self.server(given);
        }
        if url > 0 && url == file {
            return Err(Failure::usage(format!(
                "{} and {} are both set; only one of them can count",
                given.name("url"),
                given.name("url_file")
            )));
        }
        let (option, source) = match (&self.url, &self.url_file) {
            (Some(url_given), _) if url > file => {
                let name = given.name("url");
                (name, parse_list(url_given.expose()).map(nodes))
            }
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
        for part in ["server", "port", "vhost", "username", "password", "authfile"] {
            if given.level(part) > 0 && given.level(part) >= url.max(file) {
                return Err(Failure::usage(format!(
                    "{} and {option} can't be used at the same time: write it into the URL",
                    given.name(part)
                )));
            }
        }
        let nodes = source.map_err(|error| Failure::usage(format!("{option}: {error}")))?;
        Ok(Nodes { password_file: secret_file(given, "password_file", self.password_file.as_ref()), ..nodes })
    }

    /// The node that `--server` and the other parts make, and its authfile, if that is what counts.
    fn server(&self, given: &Given<'_>) -> Result<Nodes, Failure> {
        let mut address = server_address(self.server.as_deref().unwrap_or_default(), self.ssl, self.port)?;
        if let Some(name) = self.vhost.as_ref().filter(|name| !name.is_empty()) {
            address.virtual_host.clone_from(name);
        }
        let file = given.level("authfile");
        let (password, password_file) = (given.level("password"), given.level("password_file"));
        let by_name = given.level("username").max(password).max(password_file);
        if file > 0 && file == by_name {
            return Err(Failure::usage(
                "--authfile can't be used together with --username, --password or --password-file",
            ));
        }
        if password > 0 && password == password_file {
            return Err(Failure::usage(format!(
                "{} and {} are both set; only one of them can count",
                given.name("password"),
                given.name("password_file")
            )));
        }
        let mut nodes = Nodes::default();
        if file > by_name {
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

/// The file that an option names, if it is given.
fn secret_file(given: &Given<'_>, id: &str, path: Option<&PathBuf>) -> Option<SecretFile> {
    path.map(|path| SecretFile::new(path.clone(), given.name(id)))
}

/// The address of a host, or an IPv6 address with or without brackets, perhaps with a port.
fn server_address(server: &str, tls: bool, port: Option<u16>) -> Result<Address, Failure> {
    // A URL's password must not be taken for a port and printed.
    if server.contains(['/', '@', '?']) {
        return Err(Failure::usage("--server names a host; a whole URL goes to --url"));
    }
    let bare_ipv6 = server.matches(':').count() > 1 && !server.starts_with('[');
    let host = if bare_ipv6 { format!("[{server}]") } else { server.to_owned() };
    let mut after = host.rsplit(']');
    if port.is_some() && after.next().is_some_and(|after| after.contains(':')) {
        return Err(Failure::usage("--server and --port both name the port"));
    }
    let scheme = if tls { "amqps" } else { "amqp" };
    let port = port.map_or(String::new(), |port| format!(":{port}"));
    // In a URL the `%` before an IPv6 address's zone is encoded.
    let host = host.replace('%', "%25");
    let address = Address::parse(&format!("{scheme}://{host}{port}"))
        .map_err(|error| Failure::usage(format!("--server: {error}")))?;
    if server.is_empty() || server.starts_with(':') && !bare_ipv6 {
        return Err(Failure::usage("--server names no host"));
    }
    Ok(address)
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
