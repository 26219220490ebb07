//! The options that say where the broker is and how to reach it: the same for qconsume and qpublish.

use super::{AMQP_TOOLS, duration_above_zero};
use crate::{
    broker::{
        ConnectOptions, Tls,
        address::{Address, AuthMechanism, Parameters, Secret, parse_list},
    },
    exit::{Exit, Failure},
};
use clap::{ArgAction, ArgMatches, Args, builder::FalseyValueParser, parser::ValueSource};
use std::{convert::Infallible, path::PathBuf, time::Duration};

/// What rabbitmq-c's own newer tools call the address; it counts where nobody says otherwise.
const AMQP_URL: &str = "AMQP_URL";

/// The longest virtual host in bytes: an AMQP short string.
const VIRTUAL_HOST_MAX: usize = 255;

/// What `--hide-url` keeps from the command: where the broker is, and what one could log in with.
pub(crate) const SECRETS: [&str; 6] = [
    "BROKER_URL",
    "BROKER_URL_FILE",
    AMQP_URL,
    "QCONSUME_PASSWORD",
    "QCONSUME_AUTHFILE",
    "QCONSUME_KEY",
];

/// Where the broker is, and how to reach it.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Broker")]
pub(crate) struct BrokerArgs {
    /// amqp://user:password@host/vhost
    ///
    /// amqps:// for TLS; the nodes of a cluster with commas between. AMQP_URL counts where this isn't set.
    #[arg(
        short,
        long,
        value_name = "URL",
        env = "BROKER_URL",
        hide_env_values = true,
        value_parser = secret
    )]
    url: Option<Secret>,

    /// A file that holds the URL
    ///
    /// Instead of --url: a mounted secret.
    #[arg(long, value_name = "FILE", env = "BROKER_URL_FILE")]
    url_file: Option<PathBuf>,

    /// How long to try to reach the broker and the queue
    ///
    /// From the first look-up of a name until messages can come, and again after a connection was lost while there was no message. A queue that isn't there is asked for again, too.
    #[arg(hide_short_help = true, long, value_name = "DURATION", env = "QCONSUME_CONNECT_TIMEOUT", default_value = "60s", value_parser = duration_above_zero)]
    connect_timeout: Duration,

    /// Heartbeat interval in seconds [default: 10]
    ///
    /// Heartbeats show each side that the other is there; a broker that has fallen silent is noticed after 2 to 2.5 intervals.
    #[arg(
        hide_short_help = true,
        long,
        value_name = "SECONDS",
        env = "QCONSUME_HEARTBEAT"
    )]
    heartbeat: Option<u16>,

    /// Trust the CAs in this file (PEM), and no others; without it those of the system, or of SSL_CERT_FILE
    #[arg(
        hide_short_help = true,
        long,
        value_name = "FILE",
        env = "QCONSUME_CACERT",
        help_heading = "TLS"
    )]
    cacert: Option<PathBuf>,

    /// The client's certificate (PEM); where no password is given it is what to log in with (EXTERNAL)
    #[arg(
        hide_short_help = true,
        long,
        value_name = "FILE",
        env = "QCONSUME_CERT",
        help_heading = "TLS"
    )]
    cert: Option<PathBuf>,

    /// The key of the client's certificate (PEM) [default: in the file of --cert]
    #[arg(
        hide_short_help = true,
        long,
        value_name = "FILE",
        env = "QCONSUME_KEY",
        help_heading = "TLS"
    )]
    key: Option<PathBuf>,

    /// The name that the broker's certificate has to be for, if it isn't the host of the address
    #[arg(
        hide_short_help = true,
        long,
        value_name = "NAME",
        env = "QCONSUME_SERVER_NAME",
        help_heading = "TLS"
    )]
    server_name: Option<String>,

    /// The broker's host, instead of a URL
    #[arg(hide_short_help = true, short, long, value_name = "HOST", env = "QCONSUME_SERVER", help_heading = AMQP_TOOLS)]
    server: Option<String>,

    /// The broker's port [default: 5672, with --ssl 5671]
    // No variable: Kubernetes would set QCONSUME_PORT for a Service named qconsume.
    #[arg(hide_short_help = true, long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..), help_heading = AMQP_TOOLS)]
    port: Option<u16>,

    /// The virtual host [default: /]
    #[arg(hide_short_help = true, long, value_name = "VHOST", env = "QCONSUME_VHOST", help_heading = AMQP_TOOLS)]
    vhost: Option<String>,

    /// The user [default: guest]
    #[arg(hide_short_help = true, long, value_name = "USER", env = "QCONSUME_USERNAME", help_heading = AMQP_TOOLS)]
    username: Option<String>,

    /// The password [default: guest]; on the command line every user of the machine can see it: better set the variable
    #[arg(hide_short_help = true,
        long,
        value_name = "PASSWORD",
        env = "QCONSUME_PASSWORD",
        hide_env_values = true,
        value_parser = secret,
        help_heading = AMQP_TOOLS
    )]
    password: Option<Secret>,

    /// A file with two lines, username:USER and password:PASSWORD
    #[arg(hide_short_help = true, long, value_name = "FILE", env = "QCONSUME_AUTHFILE", help_heading = AMQP_TOOLS)]
    authfile: Option<PathBuf>,

    /// Use TLS, with --server; beside a URL it must be an amqps:// one
    #[arg(hide_short_help = true, long, env = "QCONSUME_SSL", action = ArgAction::SetTrue, value_parser = FalseyValueParser::new(), help_heading = AMQP_TOOLS)]
    ssl: bool,

    /// Don't trust the system's CAs; with --cacert they aren't anyway
    #[arg(hide_short_help = true, long, env = "QCONSUME_NO_DEFAULT_CERT_PATHS", action = ArgAction::SetTrue, value_parser = FalseyValueParser::new(), help_heading = AMQP_TOOLS)]
    no_default_cert_paths: bool,

    /// Print help
    #[arg(hide_short_help = true, short = '?', long, action = ArgAction::HelpLong, help_heading = AMQP_TOOLS)]
    usage: Option<bool>,
}

/// The same, read and checked.
#[derive(Clone, Debug)]
pub(crate) struct BrokerOptions {
    /// The nodes, of which there is at least one.
    pub(crate) nodes: Vec<Address>,
    /// How to connect to them.
    pub(crate) connect: ConnectOptions,
}

/// How a setting was given, the weaker first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Given {
    Not,
    Variable,
    Flag,
}

impl Given {
    fn of(matches: &ArgMatches, id: &str) -> Self {
        match matches.value_source(id) {
            Some(ValueSource::CommandLine) => Self::Flag,
            Some(ValueSource::EnvVariable) => Self::Variable,
            _ => Self::Not,
        }
    }

    /// What the user knows the setting by.
    fn name(self, flag: &'static str, variable: &'static str) -> &'static str {
        if self == Self::Variable {
            variable
        } else {
            flag
        }
    }
}

impl BrokerArgs {
    /// Finds the address that counts, and reads it and the files that TLS needs.
    ///
    /// # Errors
    /// 64 for what isn't as it should be, 78 for a file that can't be read or used.
    pub(crate) fn resolve(self, matches: &ArgMatches) -> Result<BrokerOptions, Failure> {
        let mut nodes = self.nodes(matches)?;
        for address in &mut nodes {
            self.add_tls(address)?;
        }
        let tls = Tls::load(&nodes)?;
        Ok(BrokerOptions {
            nodes,
            connect: ConnectOptions {
                timeout: self.connect_timeout,
                heartbeat: self.heartbeat,
                name: String::new(),
                tls,
            },
        })
    }

    /// The address: a flag goes over a variable; a URL and the parts of one contradict each other.
    fn nodes(&self, matches: &ArgMatches) -> Result<Vec<Address>, Failure> {
        let given = |id| Given::of(matches, id);
        let url = given("url").max(given("url_file"));
        let server = given("server");
        if server > url {
            return Ok(vec![self.server_address(matches)?]);
        }
        let (text, source) = match self.url(matches)? {
            Some(found) => found,
            None => match std::env::var_os(AMQP_URL).filter(|url| !url.is_empty()) {
                Some(text) => {
                    let text = text
                        .into_string()
                        .map_err(|_| usage(format!("{AMQP_URL} isn't UTF-8")))?;
                    (Secret::from(text), AMQP_URL)
                }
                None => {
                    return Err(usage(
                        "no broker: set BROKER_URL (amqp://user:password@host/vhost) or BROKER_URL_FILE, or use --url, or --server",
                    ));
                }
            },
        };
        let parts = [
            ("server", "--server", "QCONSUME_SERVER"),
            ("port", "--port", ""),
            ("vhost", "--vhost", "QCONSUME_VHOST"),
            ("username", "--username", "QCONSUME_USERNAME"),
            ("password", "--password", "QCONSUME_PASSWORD"),
            ("authfile", "--authfile", "QCONSUME_AUTHFILE"),
        ];
        for (id, flag, variable) in parts {
            let part = given(id);
            if part > Given::Not && part >= url {
                return Err(usage(format!(
                    "{} and {source} can't be used at the same time: write it into the URL",
                    part.name(flag, variable)
                )));
            }
        }
        let nodes =
            parse_list(text.expose()).map_err(|error| usage(format!("{source}: {error}")))?;
        if self.ssl && !nodes.iter().all(|address| address.tls) {
            return Err(usage(format!(
                "--ssl asks for TLS, but {source} says amqp://, which is without: make it amqps://"
            )));
        }
        Ok(nodes)
    }

    /// The URL, and what named it; two of the same kind contradict each other.
    fn url(&self, matches: &ArgMatches) -> Result<Option<(Secret, &'static str)>, Failure> {
        let (url, file) = (Given::of(matches, "url"), Given::of(matches, "url_file"));
        let url_source = url.name("--url", "BROKER_URL");
        let file_source = file.name("--url-file", "BROKER_URL_FILE");
        match (&self.url, &self.url_file) {
            (Some(_), Some(_)) if url == file => Err(usage(format!(
                "{url_source} and {file_source} are both set; only one of them can count"
            ))),
            (Some(text), _) if url > file => Ok(Some((text.clone(), url_source))),
            (_, Some(file)) => match std::fs::read_to_string(file) {
                Ok(text) => Ok(Some((text.into(), file_source))),
                Err(error) => Err(Failure::new(
                    Exit::Config,
                    format!("{file_source}: {} can't be read: {error}", file.display()),
                )),
            },
            _ => Ok(None),
        }
    }

    /// The address that `--server` and the other parts make.
    fn server_address(&self, matches: &ArgMatches) -> Result<Address, Failure> {
        let server = self.server.as_deref().unwrap_or_default();
        let (host, port) = host_and_port(server)?;
        if port.is_some() && self.port.is_some() {
            return Err(usage("--server and --port both name the port"));
        }
        let virtual_host = match self.vhost.as_deref() {
            None | Some("") => "/",
            Some(name) if name.len() > VIRTUAL_HOST_MAX => {
                return Err(usage(
                    "--vhost is longer than 255 bytes, the most that AMQP allows",
                ));
            }
            Some(name) => name,
        };
        let (username, password) = self.login(matches)?;
        Ok(Address {
            tls: self.ssl,
            host: host.to_owned(),
            host_given: true,
            port: port
                .or(self.port)
                .unwrap_or(if self.ssl { 5671 } else { 5672 }),
            username: username.unwrap_or_else(|| "guest".to_owned()),
            password_given: password.is_some(),
            password: password.unwrap_or_else(|| "guest".to_owned().into()),
            virtual_host: virtual_host.to_owned(),
            parameters: Parameters::default(),
        })
    }

    /// The user and the password, as far as they are given.
    fn login(&self, matches: &ArgMatches) -> Result<(Option<String>, Option<Secret>), Failure> {
        let given = |id| Given::of(matches, id);
        let file = given("authfile");
        let by_name = given("username").max(given("password"));
        let path = match &self.authfile {
            Some(path) if file > by_name => path,
            Some(_) if file == by_name => {
                return Err(usage(
                    "--authfile can't be used together with --username or --password",
                ));
            }
            _ => return Ok((self.username.clone(), self.password.clone())),
        };
        let text = std::fs::read_to_string(path).map_err(|error| {
            Failure::new(
                Exit::Config,
                format!("the authfile {} can't be read: {error}", path.display()),
            )
        })?;
        let mut lines = text.lines();
        let mut line = |prefix| lines.next().and_then(|line| line.strip_prefix(prefix));
        match (line("username:"), line("password:"), lines.next()) {
            (Some(username), Some(password), None) => {
                Ok((Some(username.to_owned()), Some(password.to_owned().into())))
            }
            _ => Err(usage(format!(
                "the authfile {} has to consist of two lines, username:USER and password:PASSWORD",
                path.display()
            ))),
        }
    }

    /// Puts the options about TLS where the URL's own parameters are; the options go over those.
    fn add_tls(&self, address: &mut Address) -> Result<(), Failure> {
        let options = [
            (self.cacert.is_some(), "--cacert (QCONSUME_CACERT)"),
            (self.cert.is_some(), "--cert (QCONSUME_CERT)"),
            (self.key.is_some(), "--key (QCONSUME_KEY)"),
            (
                self.server_name.is_some(),
                "--server-name (QCONSUME_SERVER_NAME)",
            ),
        ];
        if let Some((_, option)) = options.iter().find(|(set, _)| *set && !address.tls) {
            return Err(usage(format!(
                "{option} needs TLS: an amqps:// URL, or --ssl beside --server"
            )));
        }
        let parameters = &mut address.parameters;
        if let Some(file) = &self.cacert {
            parameters.cacertfile = Some(file.clone());
        }
        if let Some(file) = &self.cert {
            parameters.certfile = Some(file.clone());
            // The key belongs to its certificate: the URL's goes with the URL's.
            parameters.keyfile = None;
        }
        if let Some(file) = &self.key {
            parameters.keyfile = Some(file.clone());
        }
        if let Some(name) = &self.server_name {
            parameters.server_name_indication = Some(name.clone());
        }
        if self.no_default_cert_paths && address.tls && parameters.cacertfile.is_none() {
            return Err(usage(
                "--no-default-cert-paths leaves no CA to trust: name the broker's with --cacert",
            ));
        }
        let parameters = &mut address.parameters;
        if parameters.certfile.is_some() && !address.password_given {
            parameters
                .auth_mechanism
                .get_or_insert(AuthMechanism::External);
        }
        Ok(())
    }
}

fn usage(message: impl Into<String>) -> Failure {
    Failure::new(Exit::Usage, message)
}

/// Unlike a `String`, it never shows in anything that is printed.
fn secret(text: &str) -> Result<Secret, Infallible> {
    Ok(text.to_owned().into())
}

/// What `--server` says: a host, an IPv6 address with or without brackets, perhaps a port.
fn host_and_port(server: &str) -> Result<(&str, Option<u16>), Failure> {
    let (host, port) = match server
        .strip_prefix('[')
        .and_then(|rest| rest.split_once(']'))
    {
        Some((host, "")) => (host, None),
        // Without the colon it is no port, but nothing else either.
        Some((host, rest)) => (host, Some(rest.strip_prefix(':').unwrap_or_default())),
        // More than one colon is an IPv6 address without brackets.
        None => match server.split_once(':') {
            Some((host, port)) if !port.contains(':') => (host, Some(port)),
            _ => (server, None),
        },
    };
    // A URL's password must not be taken for a port and printed.
    if server.contains(['/', '@']) {
        return Err(usage("--server names a host; a whole URL goes to --url"));
    }
    if host.is_empty() {
        return Err(usage("--server names no host"));
    }
    let port = port.map(|port| match port.parse::<u16>() {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(usage(
            "the port in --server must be a number from 1 to 65535",
        )),
    });
    Ok((host, port.transpose()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_a_host_and_perhaps_a_port() {
        for (server, host, port) in [
            ("rabbit", "rabbit", None),
            ("rabbit:5673", "rabbit", Some(5673)),
            ("::1", "::1", None),
            ("[::1]", "::1", None),
            ("[::1]:5673", "::1", Some(5673)),
        ] {
            assert_eq!(host_and_port(server).unwrap(), (host, port), "{server}");
        }
        for server in [
            "",
            ":5672",
            "rabbit:",
            "rabbit:0",
            "rabbit:x",
            "[::1]5",
            "amqp://u:p@h",
        ] {
            assert!(host_and_port(server).is_err(), "{server}");
        }
    }
}
