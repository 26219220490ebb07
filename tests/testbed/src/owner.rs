//! Removes everything that a test process has created, however that process ends.
//!
//! A test process may be killed at any time, so it can't clean up by itself. Before its first resource it starts a
//! watchdog: a shell in another process group that waits for the end of its standard input. Only this process holds the
//! other end of that pipe, so the watchdog wakes when this process is gone, even by SIGKILL. It then
//! - kills every process with this owner's mark in its environment,
//! - removes every container and network with this owner's label,
//! - deletes this owner's folder.
//!
//! A resource is marked from the moment at which it exists, so the watchdog can't miss one.

use crate::{PATIENCE, eventually, exec};
use anyhow::{Context, Result};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::time::Duration;

/// The environment variable that marks processes that this process started.
pub const MARK: &str = "QCONSUME_TESTBED_OWNER";

/// The label of this process's containers and networks.
const LABEL: &str = "qconsume.testbed.owner";

/// Debian's policy for starting services. A temporary one names its owner, so that only that owner's watchdog removes
/// it.
pub(crate) const POLICY: &str = "/usr/sbin/policy-rc.d";

/// In bytes: the most that Linux allows for arguments and environment with the usual stack limit.
const ENVIRONMENT_MAX: usize = 2 << 20;

/// Looking up a program takes milliseconds.
const FIND_LIMIT: Duration = Duration::from_secs(30);

/// The watchdog's script: `sh -c WATCHDOG watchdog MARK ID FOLDER LABEL POLICY`.
const WATCHDOG: &str = r#"
trap '' HUP INT QUIT TERM
cat >/dev/null
mark="$1=$2" id="$2" folder="$3" label="$4=$2" policy="$5"
# A process may be between fork and exec, so look until nothing is found twice in a row.
clean=0 rounds=0
while [ $clean -lt 2 ] && [ $rounds -lt 100 ]; do
    clean=$((clean + 1)) rounds=$((rounds + 1))
    for file in $(grep -l -a -F "$mark" /proc/[0-9]*/environ 2>/dev/null); do
        pid=${file#/proc/} pid=${pid%/environ}
        kill -9 "$pid" 2>/dev/null && clean=0
    done
    sleep 0.05
done
if [ -e "$folder/docker" ]; then
    # The Docker daemon may still be creating a container for a killed client, so look again a little later.
    for pause in 0 1 3; do
        sleep $pause
        names=$(docker ps -aq --filter "label=$label")
        [ -z "$names" ] || docker rm -f -v $names
    done
    networks=$(docker network ls -q --filter "label=$label")
    [ -z "$networks" ] || docker network rm $networks
fi
if grep -q -s -F "$id" "$policy"; then rm -f "$policy"; fi
rm -rf "$folder"
"#;

struct Owner {
    /// Unique among all test processes; also the prefix of names.
    id: String,
    /// The folder of all files.
    folder: PathBuf,
    /// Kept for its standard input, whose end wakes the watchdog.
    _watchdog: Child,
}

/// This process's identity; the first call starts the watchdog.
fn get() -> &'static Owner {
    static OWNER: LazyLock<Owner> = LazyLock::new(|| Owner::start().unwrap_or_else(|error| panic!("{error:#}")));
    &OWNER
}

/// The value of [`MARK`] in the processes that this process starts.
pub fn id() -> &'static str {
    &get().id
}

/// A program whose environment is only `PATH` and the mark, without input and output, in a new process group.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env(MARK, id())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0);
    command
}

impl Owner {
    fn start() -> Result<Self> {
        let id = format!("qc{:08x}", fastrand::u32(..));
        let folder = std::env::temp_dir().join(format!("qconsume-testbed-{id}"));
        let watchdog = Command::new("sh")
            .args(["-c", WATCHDOG, "watchdog", MARK, &id])
            .arg(&folder)
            .args([LABEL, POLICY])
            .env_clear()
            .envs(std::env::vars_os().filter(|(name, _)| {
                // Only what docker needs. In particular not an outer owner's mark, or its watchdog would kill ours.
                matches!(name.to_str(), Some("PATH" | "HOME" | "DOCKER_HOST" | "DOCKER_CONFIG"))
            }))
            .current_dir("/")
            .stdin(Stdio::piped())
            // Not inherited, as readers of this process's output would wait for the watchdog, too.
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .context("cannot start the shell that cleans up after the tests")?;
        fs::create_dir(&folder).with_context(|| format!("cannot create {} for the tests", folder.display()))?;
        Ok(Self { id, folder, _watchdog: watchdog })
    }
}

/// The label, `name=value`, by which the watchdog finds a test's containers and networks. From now on it asks Docker,
/// too.
pub fn docker_label() -> Result<String> {
    let owner = get();
    let path = owner.folder.join("docker");
    fs::write(&path, "").with_context(|| format!("cannot write {}", path.display()))?;
    Ok(format!("{LABEL}={}", owner.id))
}

/// A new, empty folder; the watchdog removes it when this process ends.
pub fn temp_folder(name: &str) -> PathBuf {
    let folder = tempfile::Builder::new()
        .prefix(&format!("{name}-"))
        // The user rabbitmq needs access to a node's folder.
        .permissions(fs::Permissions::from_mode(0o755))
        .tempdir_in(&get().folder);
    folder.expect("a folder for the tests").keep()
}

/// Whether this process has the rights of root.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// The pids of the running processes that were started with `NAME=VALUE` in the environment.
pub fn processes_with(name: &str, value: &str) -> Vec<i32> {
    let wanted = format!("{name}={value}");
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let mut buffer = vec![0; ENVIRONMENT_MAX];
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        // A zombie's environ is empty, so zombies don't count.
        .filter(|pid: &i32| {
            environment(*pid, &mut buffer).split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes())
        })
        .collect()
}

/// The variables that a process was started with, each with a final NUL; empty if it has ended or belongs to another
/// user.
fn environment(pid: i32, buffer: &mut [u8]) -> &[u8] {
    let mut size = 0;
    eventually(PATIENCE, || {
        // In one call: between two, the process may execute another program, which would mix the two environments.
        let file = File::open(format!("/proc/{pid}/environ"));
        let read = file.and_then(|mut file| file.read(buffer));
        size = *read.as_ref().unwrap_or(&0);
        read.is_err() || size > 0 || !is_in_execve(pid)
    });
    &buffer[..size]
}

/// Whether a process whose environ is empty may be within execve(2), where the old environment is gone and the new one
/// isn't there yet. Uses the fields of proc_pid_stat(5): 3 state, 9 flags, 26 `startcode`, which the kernel sets after
/// the environment, 50 and 51 `env_start` and `env_end`.
fn is_in_execve(pid: i32) -> bool {
    const PF_KTHREAD: u64 = 0x0020_0000;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The second field, a name in parentheses, may contain any character.
    let Some((_, fields)) = stat.rsplit_once(") ") else {
        return false;
    };
    let fields: Vec<&str> = fields.split(' ').collect();
    let number = |field: usize| fields.get(field - 3)?.trim().parse::<u64>().ok();
    let has_ended = matches!(fields[0], "Z" | "X");
    let is_kernel_thread = number(9).is_none_or(|flags| flags & PF_KTHREAD != 0);
    let is_without_variables = number(26) != Some(0) && number(50) == number(51);
    !has_ended && !is_kernel_thread && !is_without_variables
}

/// The first executable file with this name in `PATH`.
pub fn find_in_path(name: &str) -> Option<PathBuf> {
    // Many users' PATH lacks the folders of administrators' tools.
    let script = "PATH=$PATH:/usr/sbin:/sbin; command -v \"$0\"";
    let found = exec::run(Command::new("sh").args(["-c", script, name]), FIND_LIMIT);
    Some(found.ok()?.trim().into())
}
