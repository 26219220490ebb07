//! The settings of a private node, the same for a process and a container.

use super::{Source, container};
use crate::ports::{Port, reserve_port};
use anyhow::{Context, Result};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

/// The ports of the command line tools. RabbitMQ's default range has eleven, too few for parallel tests.
const CLI_PORTS: (u16, u16) = (7000, 9999);

/// One scheduler of each kind is enough for tests, starts faster and leaves the cores to the workers.
pub(super) const ERL_ARGS: (&str, &str) =
    ("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", "+S 1:1 +SDcpu 1:1 +SDio 2 +sbwt none");

/// The variable that marks a node's processes, also in its container; its value is the node's port.
pub(super) const PORT_MARK: &str = "QCONSUME_TESTBED_PORT";

/// The settings that all nodes of a cluster share (a single node is a cluster of one).
pub(crate) struct Group {
    cookie: String,
    epmd_port: Port,
    /// A separate port mapper, stopped when dropped; without it, a node would start one as a daemon, which would stay.
    /// `None` for a single container, which runs its own.
    _epmd: Option<Box<dyn Send + Sync>>,
}

pub(crate) struct Settings {
    pub(crate) name: String,
    pub(crate) port: Port,
    pub(crate) dist_port: Port,
    pub(crate) config: String,
    pub(crate) plugins: String,
    pub(crate) files: Vec<(String, String)>,
    pub(crate) group: Arc<Group>,
}

impl Group {
    pub(super) fn start(source: &Source, several: bool) -> Result<Arc<Self>> {
        let epmd_port = reserve_port()?;
        let port = epmd_port.number();
        let epmd: Option<Box<dyn Send + Sync>> = match source {
            Source::Local(installation) => Some(Box::new(installation.start_epmd(port)?)),
            Source::Image(image) if several => Some(Box::new(container::start_epmd(image, port)?)),
            Source::Image(_) => None,
        };
        Ok(Arc::new(Self { cookie: format!("{:016x}", fastrand::u64(..)), epmd_port, _epmd: epmd }))
    }
}

impl Settings {
    /// Writes the node's files into a folder, which is `home` from the node's view.
    pub(super) fn write_files(&self, folder: &Path, home: &str) -> Result<()> {
        let config = self.config.replace("$folder", home);
        write_files(folder, &self.group.cookie, &config, &self.plugins)?;
        for (name, content) in &self.files {
            write_file(folder, name, content)?;
        }
        Ok(())
    }

    /// The environment that separates this node from all others and keeps its files in its folder.
    pub(super) fn environment(&self, home: &str) -> Vec<(&'static str, String)> {
        let loopback = "-kernel inet_dist_use_interface {127,0,0,1}";
        let mut environment = in_folder(home);
        environment.extend([
            (PORT_MARK, self.port.number().to_string()),
            ("ERL_EPMD_PORT", self.group.epmd_port.number().to_string()),
            ("ERL_EPMD_ADDRESS", "127.0.0.1".into()),
            ("RABBITMQ_NODENAME", self.name.clone()),
            ("RABBITMQ_DIST_PORT", self.dist_port.number().to_string()),
            ("RABBITMQ_CTL_DIST_PORT_MIN", CLI_PORTS.0.to_string()),
            ("RABBITMQ_CTL_DIST_PORT_MAX", CLI_PORTS.1.to_string()),
            ("RABBITMQ_CTL_ERL_ARGS", loopback.into()),
            (ERL_ARGS.0, format!("{loopback} {}", ERL_ARGS.1)),
        ]);
        environment
    }
}

/// Writes the files that every node has.
pub(super) fn write_files(folder: &Path, cookie: &str, config: &str, plugins: &str) -> Result<()> {
    write_file(folder, ".erlang.cookie", cookie)?;
    // Erlang refuses a cookie that others may read.
    let private = fs::Permissions::from_mode(0o400);
    fs::set_permissions(folder.join(".erlang.cookie"), private)?;
    write_file(folder, "rabbitmq.conf", config)?;
    write_file(folder, "enabled_plugins", plugins)?;
    // Used instead of the one in /etc, which belongs to this machine's broker.
    write_file(folder, "rabbitmq-env.conf", "")
}

fn write_file(folder: &Path, name: &str, text: &str) -> Result<()> {
    let path = folder.join(name);
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// The environment that keeps a node's files in its folder.
pub(super) fn in_folder(home: &str) -> Vec<(&'static str, String)> {
    let path = |name: &str| format!("{home}/{name}");
    vec![
        ("HOME", home.into()),
        ("LANG", "C.UTF-8".into()),
        ("LC_ALL", "C.UTF-8".into()),
        ("ERL_CRASH_DUMP_BYTES", "0".into()),
        ("RABBITMQ_MNESIA_BASE", path("data")),
        ("RABBITMQ_LOG_BASE", path("logs")),
        ("RABBITMQ_CONFIG_FILE", path("rabbitmq.conf")),
        // Otherwise the image's conf.d would apply, too.
        ("RABBITMQ_CONFIG_FILES", path("conf.d")),
        ("RABBITMQ_ADVANCED_CONFIG_FILE", path("advanced.config")),
        ("RABBITMQ_CONF_ENV_FILE", path("rabbitmq-env.conf")),
        ("RABBITMQ_ENABLED_PLUGINS_FILE", path("enabled_plugins")),
        ("RABBITMQ_FEATURE_FLAGS_FILE", path("feature_flags")),
        ("RABBITMQ_GENERATED_CONFIG_DIR", path("generated")),
        ("RABBITMQ_PID_FILE", path("pid")),
    ]
}
