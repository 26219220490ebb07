//! The options for reaching the broker, of qconsume and qpublish.

use super::{AMQP_TOOLS, Given, Precedence, amqp_name, switch};
use crate::{
    broker::{
        ConnectOptions, Connector, Nodes, SecretFile, TlsOptions,
        reach::address::{Address, Secret, parse_list, scheme},
    },
    clock::duration_above_zero,
    exit::Failure,
};
use clap::{ArgAction, Args};
use std::{cmp::Ordering, path::PathBuf, time::Duration};

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
    /// It takes precedence over the URL's password. The file is read again for each new connection. If it gets a new
    /// token (a JWT) while a connection is open, the broker gets that too, so a command may run longer than a token is
    /// valid.
    #[arg(long, hide_short_help = true, value_name = "FILE", env = "QCONSUME_PASSWORD_FILE")]
    password_file: Option<PathBuf>,

    /// Try this long to reach the broker and the queue
    ///
    /// A DURATION is 500ms, 10s, 5m, 1h30m, or plain seconds. The time starts with the first look-up of a name, and
    /// ends when qconsume's consumer is registered, or qpublish is connected. It starts again when qconsume loses the
    /// connection while it waits for a message. qconsume also waits for a queue that doesn't exist yet.
    #[arg(long, hide_short_help = true, value_name = "DURATION", env = "QCONSUME_CONNECT_TIMEOUT", default_value = "60s", value_parser = duration_above_zero)]
    pub connect_timeout: Duration,

    /// Propose a heartbeat interval of this many seconds; 0 leaves it to the broker [default: 10]
    ///
    /// A broker that no longer answers is noticed after 2 to 2.5 intervals. If the broker or a proxy proposes 0, there
    /// are no heartbeats.
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
    #[arg(long, hide_short_help = true, value_name = "VHOST", env = "QCONSUME_VHOST", value_parser = amqp_name, help_heading = AMQP_TOOLS)]
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
    /// For connections of this name. Logs the URLs' parameters that are meant for other clients.
    pub fn connector(&self, name: String) -> Connector {
        let nodes = self.nodes.addresses.iter();
        for parameter in nodes.flat_map(|node| &node.parameters.ignored) {
            tracing::debug!("the URL's parameter {parameter} is for another client: ignored");
        }
        let options = ConnectOptions { timeout: self.connect_timeout, heartbeat: self.heartbeat, name };
        Connector::new(self.nodes.clone(), options)
    }

    #[cfg(fuzzing)]
    pub fn addresses(&self) -> &[Address] {
        &self.nodes.addresses
    }

    pub(crate) fn find_nodes(&mut self, given: &Given<'_>) -> Result<(), Failure> {
        self.nodes = self.nodes_given(given)?;
        self.nodes.tls_options = self.tls.clone();
        self.nodes.read()?;
        for address in &self.nodes.addresses {
            if self.ssl && !address.tls {
                return Err(Failure::usage(format!(
                    "{} asks for TLS, but the URL says amqp://, which is without TLS: make it amqps://",
                    given.name("ssl")
                )));
            }
            if self.no_default_cert_paths && address.tls && address.parameters.cacertfile.is_none() {
                return Err(Failure::usage(format!(
                    "{} leaves no CA to trust: name the broker's with --cacert",
                    given.name("no_default_cert_paths")
                )));
            }
        }
        Ok(())
    }

    fn nodes_given(&self, given: &Given<'_>) -> Result<Nodes, Failure> {
        let amqp_url = std::env::var_os(AMQP_URL).filter(|url| !url.is_empty());
        let source = AddressSource::choose(|id| given.precedence(id), amqp_url.is_some())
            .map_err(|conflict| conflict.failure(given))?;
        let parse = |text: &str| {
            let addresses =
                parse_list(text).map_err(|error| Failure::usage(format!("{}: {error}", source.name(given))))?;
            Ok(Nodes { addresses, ..Nodes::default() })
        };
        let nodes = match source {
            AddressSource::Url => parse(self.url.as_ref().map_or("", Secret::expose))?,
            AddressSource::UrlFile => {
                Nodes { url_file: secret_file(given, "url_file", self.url_file.as_ref()), ..Nodes::default() }
            }
            AddressSource::AmqpUrl => match amqp_url.unwrap_or_default().to_str() {
                Some(text) => parse(text)?,
                None => return Err(Failure::usage("AMQP_URL isn't UTF-8")),
            },
            AddressSource::Server => return self.nodes_of_server(given),
        };
        Ok(Nodes { password_file: secret_file(given, "password_file", self.password_file.as_ref()), ..nodes })
    }

    fn nodes_of_server(&self, given: &Given<'_>) -> Result<Nodes, Failure> {
        let mut address = server_address(self.server.as_deref().unwrap_or_default(), self.ssl, self.port)?;
        if let Some(name) = self.vhost.as_ref().filter(|name| !name.is_empty()) {
            address.virtual_host.clone_from(name);
        }
        let source =
            CredentialsSource::choose(|id| given.precedence(id)).map_err(|conflict| conflict.failure(given))?;
        let (mut authfile, mut password_file) = (None, None);
        match source {
            CredentialsSource::Authfile => authfile = secret_file(given, "authfile", self.authfile.as_ref()),
            CredentialsSource::PasswordFile => {
                password_file = secret_file(given, "password_file", self.password_file.as_ref());
            }
            CredentialsSource::Password => {
                if let Some(password) = &self.password {
                    address.set_password(password.clone());
                }
            }
        }
        if source != CredentialsSource::Authfile
            && let Some(username) = &self.username
        {
            address.username.clone_from(username);
        }
        Ok(Nodes { addresses: vec![address], authfile, password_file, ..Nodes::default() })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AddressSource {
    Url,
    UrlFile,
    AmqpUrl,
    /// `--server` and the other options for parts of an address.
    Server,
}

/// Where user and password come from if the address is that of `--server`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CredentialsSource {
    Authfile,
    /// `--username` and `--password`, or their defaults.
    Password,
    /// `--username` and `--password-file`.
    PasswordFile,
}

/// Why there is no source. Options are named by their ids.
#[derive(Debug, PartialEq, Eq)]
enum Conflict {
    NoAddress,
    BothSet(&'static str, &'static str),
    PartOfAddress(&'static str, AddressSource),
}

impl AddressSource {
    /// A flag takes precedence over variables, and all of them over `AMQP_URL`. An option for a part of the address
    /// conflicts with a whole address that doesn't take precedence over it.
    fn choose(precedence: impl Fn(&str) -> Precedence, amqp_url_is_set: bool) -> Result<Self, Conflict> {
        const PARTS: [&str; 6] = ["server", "port", "vhost", "username", "password", "authfile"];
        let (url, url_file) = (precedence("url"), precedence("url_file"));
        let whole = url.max(url_file);
        if precedence("server") > whole {
            return Ok(Self::Server);
        }
        let source = match url.cmp(&url_file) {
            Ordering::Greater => Self::Url,
            Ordering::Less => Self::UrlFile,
            Ordering::Equal if whole > Precedence::Default => return Err(Conflict::BothSet("url", "url_file")),
            Ordering::Equal if amqp_url_is_set => Self::AmqpUrl,
            Ordering::Equal => return Err(Conflict::NoAddress),
        };
        let conflicting = |part: &&str| precedence(part) >= whole.max(Precedence::Variable);
        match PARTS.into_iter().find(conflicting) {
            Some(part) => Err(Conflict::PartOfAddress(part, source)),
            None => Ok(source),
        }
    }

    fn name(self, given: &Given<'_>) -> String {
        match self {
            Self::Url => given.name("url"),
            Self::UrlFile => given.name("url_file"),
            Self::AmqpUrl => AMQP_URL.to_owned(),
            Self::Server => given.name("server"),
        }
    }
}

impl CredentialsSource {
    fn choose(precedence: impl Fn(&str) -> Precedence) -> Result<Self, Conflict> {
        let (password, password_file) = (precedence("password"), precedence("password_file"));
        let authfile = precedence("authfile");
        let others = precedence("username").max(password).max(password_file);
        if authfile > Precedence::Default && authfile == others {
            let is_equal = |other: &&str| precedence(other) == authfile;
            let other = ["password_file", "password"].into_iter().find(is_equal).unwrap_or("username");
            Err(Conflict::BothSet("authfile", other))
        } else if password > Precedence::Default && password == password_file {
            Err(Conflict::BothSet("password", "password_file"))
        } else if authfile > others {
            Ok(Self::Authfile)
        } else if password_file > password {
            Ok(Self::PasswordFile)
        } else {
            Ok(Self::Password)
        }
    }
}

impl Conflict {
    fn failure(self, given: &Given<'_>) -> Failure {
        Failure::usage(match self {
            Self::NoAddress => {
                "no broker: set BROKER_URL (amqp://user:password@host/vhost) or BROKER_URL_FILE, or use --url, or --server"
                    .to_owned()
            }
            Self::BothSet(one, other) => {
                format!("{} and {} are both set: leave one out", given.name(one), given.name(other))
            }
            Self::PartOfAddress(part, source) => format!(
                "{name} and {source} can't be used at the same time: leave {name} out, and write its {what} into the URL",
                name = given.name(part),
                source = source.name(given),
                what = if part == "authfile" { "user and password" } else { "value" },
            ),
        })
    }
}

fn secret_file(given: &Given<'_>, id: &str, path: Option<&PathBuf>) -> Option<SecretFile> {
    path.map(|path| SecretFile::new(path.clone(), given.name(id)))
}

/// `server` is a host or an IPv6 address, with or without brackets and a port.
fn server_address(server: &str, tls: bool, port: Option<u16>) -> Result<Address, Failure> {
    // Otherwise a part of a URL's password might be taken for a port, and printed.
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

    fn given(flags: &str, variables: &str) -> impl Fn(&str) -> Precedence {
        let [flags, variables] = [flags, variables].map(|ids| ids.split(' ').map(str::to_owned).collect::<Vec<_>>());
        move |id| match id {
            id if flags.iter().any(|flag| flag == id) => Precedence::Flag,
            id if variables.iter().any(|variable| variable == id) => Precedence::Variable,
            _ => Precedence::Default,
        }
    }

    #[test]
    fn a_flag_precedes_a_variable_and_a_whole_address_conflicts_with_parts_of_one() {
        use {
            AddressSource::{AmqpUrl, Server, Url, UrlFile},
            Conflict::{BothSet, NoAddress, PartOfAddress},
        };
        for (flags, variables, expected) in [
            // One source.
            ("url", "", Ok(Url)),
            ("", "url", Ok(Url)),
            ("url_file", "", Ok(UrlFile)),
            ("", "url_file", Ok(UrlFile)),
            ("server", "", Ok(Server)),
            ("", "server", Ok(Server)),
            ("", "AMQP_URL", Ok(AmqpUrl)),
            ("", "", Err(NoAddress)),
            // Flags, then variables, then AMQP_URL.
            ("url", "url_file AMQP_URL", Ok(Url)),
            ("url_file", "url AMQP_URL", Ok(UrlFile)),
            ("server", "url url_file AMQP_URL", Ok(Server)),
            ("url", "server port vhost username password authfile", Ok(Url)),
            ("url_file", "server port vhost username password authfile", Ok(UrlFile)),
            ("", "url AMQP_URL", Ok(Url)),
            ("", "url_file AMQP_URL", Ok(UrlFile)),
            ("", "server AMQP_URL", Ok(Server)),
            // Two of the same precedence.
            ("url url_file", "", Err(BothSet("url", "url_file"))),
            ("", "url url_file", Err(BothSet("url", "url_file"))),
            ("url server", "", Err(PartOfAddress("server", Url))),
            ("", "url server", Err(PartOfAddress("server", Url))),
            ("", "url_file server", Err(PartOfAddress("server", UrlFile))),
            // Parts beside --server, or beside a whole address that they don't yield to.
            ("port", "server vhost username password authfile", Ok(Server)),
            ("port", "url", Err(PartOfAddress("port", Url))),
            ("vhost", "url_file", Err(PartOfAddress("vhost", UrlFile))),
            ("", "username url", Err(PartOfAddress("username", Url))),
            ("password url", "", Err(PartOfAddress("password", Url))),
            ("", "authfile AMQP_URL", Err(PartOfAddress("authfile", AmqpUrl))),
            ("username", "", Err(NoAddress)),
            // A whole address may have the password in a file.
            ("password_file", "url", Ok(Url)),
            ("url", "password_file", Ok(Url)),
        ] {
            let chosen = AddressSource::choose(given(flags, variables), variables.contains(AMQP_URL));
            assert_eq!(chosen, expected, "flags: {flags}; variables: {variables}");
        }
    }

    #[test]
    fn beside_a_server_the_credentials_of_the_greatest_precedence_count() {
        use {
            Conflict::BothSet,
            CredentialsSource::{Authfile, Password, PasswordFile},
        };
        for (flags, variables, expected) in [
            ("", "", Ok(Password)),
            ("username", "", Ok(Password)),
            ("", "password", Ok(Password)),
            ("", "password_file", Ok(PasswordFile)),
            ("password", "password_file", Ok(Password)),
            ("password_file", "password", Ok(PasswordFile)),
            ("username", "password_file", Ok(PasswordFile)),
            ("password password_file", "", Err(BothSet("password", "password_file"))),
            ("", "authfile", Ok(Authfile)),
            ("authfile", "username password", Ok(Authfile)),
            ("username", "authfile", Ok(Password)),
            ("password_file", "authfile", Ok(PasswordFile)),
            ("authfile username", "password", Err(BothSet("authfile", "username"))),
            ("", "authfile password_file", Err(BothSet("authfile", "password_file"))),
        ] {
            let chosen = CredentialsSource::choose(given(flags, variables));
            assert_eq!(chosen, expected, "flags: {flags}; variables: {variables}");
        }
    }

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
