//! A private node in a container.
//!
//! The container of a single node shares this machine's network, so its ports are loopback ports like a local node's.
//! A node's files are copied into its container and used instead of the image's, so nothing needs to be mounted.

use super::settings::Settings;
use super::{CTL_LIMIT, Node};
use crate::Signal;
use crate::exec;
use crate::owner::{self, docker_label, find_in_path};
use crate::program::Program;
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

/// For everything that the Docker daemon does, except pulling.
const DOCKER_LIMIT: Duration = Duration::from_secs(300);

const PULL_LIMIT: Duration = Duration::from_secs(600);

/// Docker's option to share this machine's network.
const HOST: [&str; 2] = ["--network", "host"];

/// The folder of a node's files in its container.
pub(super) const FOLDER: &str = "/testbed";

/// Finds RabbitMQ's scripts in the container: those that Debian's wrappers call or, in the official image, those in
/// PATH.
const SCRIPTS: &str = r#"[ -x /usr/lib/rabbitmq/bin/rabbitmq-server ] && PATH="/usr/lib/rabbitmq/bin:$PATH"
"#;

/// Sends a signal to the emulator. It isn't the container's first process, but a child of RabbitMQ's script.
const SIGNAL: &str = r#"sent=
for file in /proc/[0-9]*/comm; do
    read -r name <"$file" || continue
    case "$name" in
        beam*) pid=${file#/proc/}; kill -"$1" "${pid%/comm}" && sent=yes ;;
    esac
done
[ "$sent" ]
"#;

/// Whether a Docker daemon answers.
pub fn docker_works() -> bool {
    static WORKS: OnceLock<bool> = OnceLock::new();
    *WORKS.get_or_init(|| {
        find_in_path("docker").is_some() && docker(&["version", "--format", "{{.Server.Version}}"]).is_ok()
    })
}

/// Whether the Docker daemon has the image already.
pub fn image_present(image: &str) -> bool {
    docker_works() && docker(&["image", "inspect", "--format", "{{.Id}}", image]).is_ok()
}

/// Pulls the image if it isn't here.
pub(crate) fn provide_image(image: &str) -> Result<()> {
    if image_present(image) {
        return Ok(());
    }
    exec::run(Command::new("docker").args(["pull", "--quiet", image]), PULL_LIMIT)
        .with_context(|| format!("the image {image} is not here and can't be pulled"))?;
    Ok(())
}

/// A container on this machine's network; removed when dropped.
pub struct Container {
    name: String,
}

impl Container {
    /// Creates a container from an image that is here, with `options` of `docker create` and a command; the test starts
    /// it.
    pub fn create(image: &str, options: &[&str], command: &[&str]) -> Self {
        let options = [&HOST, &["--pull", "never"][..], options, &[image], command].concat();
        Self::make("create", &options).unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// Runs `docker create` or `docker run --detach` with options, the image and its command.
    fn make(how: &str, arguments: &[&str]) -> Result<Self> {
        let label = docker_label()?;
        let container = Self { name: format!("{}-{:08x}", owner::id(), fastrand::u32(..)) };
        let mut command = Command::new("docker");
        command.args(how.split(' '));
        command.args(["--name", &container.name, "--label", &label]);
        command.args(arguments);
        exec::run(&mut command, DOCKER_LIMIT).context("cannot start a container")?;
        Ok(container)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Copies a file of this machine, or a folder's content, into it, with permissions.
    pub fn copy_in(&self, file: &Path, to: &str) {
        let (from, to) = (file.display().to_string(), format!("{}:{to}", self.name));
        docker(&["cp", &from, &to]).unwrap_or_else(|error| panic!("{error:#}"));
    }

    /// The program `docker start`, whose output and exit status are those of the container.
    pub fn start(&self) -> Program {
        Program::new("docker").args(["start", "--attach", &self.name])
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // -v, as the image declares a volume for its data.
        let _ = docker(&["rm", "-f", "-v", &self.name]);
    }
}

/// Runs docker with these arguments; returns its standard output.
pub fn docker(args: &[&str]) -> Result<String> {
    exec::run(Command::new("docker").args(args), DOCKER_LIMIT)
}

/// A cluster's port mapper, in a separate container, so that it survives the death of any node.
pub(super) fn start_epmd(image: &str, port: u16) -> Result<Container> {
    let epmd = ["--init", "--entrypoint", "epmd", image];
    let listen = ["-address", "127.0.0.1", "-port", &port.to_string()];
    Container::make("run --detach", &[&HOST[..], &epmd, &listen].concat())
}

pub(super) struct ContainerNode {
    container: Container,
    /// Kept because it reserves the ports, if the container shares this machine's network.
    _settings: Option<Settings>,
}

impl ContainerNode {
    pub(super) fn launch(image: &str, settings: Settings) -> Result<Self> {
        let files = owner::temp_folder("node");
        settings.write_files(&files, FOLDER)?;
        let mut node = Self::start(image, &HOST, &settings.environment(FOLDER), &files)?;
        node._settings = Some(settings);
        Ok(node)
    }

    /// Starts a node with more `options` of `docker create`; its [`FOLDER`] gets the content of the folder `files`.
    pub(super) fn start(image: &str, options: &[&str], environment: &[(&str, String)], files: &Path) -> Result<Self> {
        let env = environment.iter();
        let env: Vec<String> = env.map(|(name, value)| format!("--env={name}={value}")).collect();
        let script = format!("{SCRIPTS}exec rabbitmq-server");
        let mut arguments = options.to_vec();
        arguments.extend(env.iter().map(String::as_str));
        arguments.extend(["--entrypoint", "sh", image, "-c", &script]);
        let container = Container::make("create", &arguments)?;
        container.copy_in(&files.join("."), FOLDER);
        docker(&["start", container.name()])?;
        Ok(Self { container, _settings: None })
    }

    /// Runs one of RabbitMQ's tools in it; returns its output.
    pub(super) fn tool(&self, name: &str, args: &[&str]) -> Result<String> {
        let script = format!("{SCRIPTS}exec {name} -q \"$@\"");
        let mut command = Command::new("docker");
        command.args(["exec", &self.container.name, "sh", "-c", &script, "sh"]).args(args);
        exec::run(&mut command, CTL_LIMIT)
    }

    /// Runs a program of this machine in the container's network namespace; needs root.
    pub(super) fn in_its_network(&self, arguments: &[&str]) -> Result<String> {
        let pid = docker(&["inspect", "--format", "{{.State.Pid}}", &self.container.name])?;
        let mut command = Command::new("nsenter");
        command.args(["--target", pid.trim(), "--net", "--"]).args(arguments);
        exec::run(&mut command, CTL_LIMIT)
    }
}

impl Node for ContainerNode {
    fn folder(&self) -> PathBuf {
        FOLDER.into()
    }

    fn is_running(&self) -> bool {
        let state = "{{.State.Running}}";
        docker(&["inspect", "--format", state, &self.container.name]).is_ok_and(|answer| answer.trim() == "true")
    }

    fn log(&self) -> String {
        // Through a shell, to get both output streams.
        let script = "docker logs \"$1\" 2>&1";
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh", &self.container.name]);
        exec::run(&mut command, DOCKER_LIMIT).unwrap_or_else(|error| format!("{error:#}"))
    }

    fn ctl(&self, args: &[&str]) -> Result<String> {
        self.tool("rabbitmqctl", args)
    }

    fn start_again(&self) -> Result<()> {
        docker(&["start", &self.container.name]).map(drop)
    }

    fn stop(&self) -> Result<()> {
        docker(&["stop", "--time", "240", &self.container.name])?;
        let format = "{{.State.ExitCode}}";
        let status = docker(&["inspect", "--format", format, &self.container.name])?;
        // If a container doesn't stop, Docker kills it and reports success.
        ensure!(status.trim() != "137", "the node hadn't stopped after 240 s");
        Ok(())
    }

    fn kill(&self) -> Result<()> {
        docker(&["kill", &self.container.name]).map(drop)
    }

    /// Not by Docker's pause, which sometimes fails while a node writes to the disk.
    fn signal(&self, signal: Signal) -> Result<()> {
        let name = signal.as_str().trim_start_matches("SIG");
        docker(&["exec", &self.container.name, "sh", "-c", SIGNAL, "sh", name]).map(drop)
    }
}
