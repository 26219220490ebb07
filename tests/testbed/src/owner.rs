//! Nothing is left behind, however this process ends.
//!
//! A test process may be killed at any time, so it can't be relied on to clean up after itself. With its first resource it
//! starts a watchdog: a shell in a process group of its own that waits for the end of its standard input. This
//! process holds the only other end of that pipe, so the watchdog wakes when this process is gone, even by SIGKILL, and then
//! - kills every process that carries this owner's mark in its environment,
//! - removes every container and network with this owner's label,
//! - deletes this owner's folder.
//!
//! The marks are there from the moment a resource exists, so there is no window in which one is not yet registered.

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

/// The environment variable that marks what this process started.
pub const MARK: &str = "QCONSUME_TESTBED_OWNER";

/// The label of this process's containers.
const LABEL: &str = "qconsume.testbed.owner";

/// A temporary policy against starting services names its owner, so that only that owner's watchdog removes it.
pub(crate) const POLICY: &str = "/usr/sbin/policy-rc.d";

/// As much as Linux lets arguments and environment have together with a usual stack limit, in bytes.
const ENVIRONMENT_MAX: usize = 2 << 20;

/// Looking a program up takes milliseconds.
const FIND_LIMIT: Duration = Duration::from_secs(30);

/// What the watchdog runs: `sh -c WATCHDOG watchdog MARK ID FOLDER LABEL POLICY`.
const WATCHDOG: &str = r#"
trap '' HUP INT QUIT TERM
cat >/dev/null
mark="$1=$2" id="$2" folder="$3" label="$4=$2" policy="$5"
# A process may be between fork and exec while we look, so look until nothing has been found twice in a row.
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
    # The Docker daemon may still be creating what a killed client asked for: look again a little later.
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

/// This process as the owner of processes, containers and files.
struct Owner {
    /// Unique among all test processes; also the prefix of names.
    id: String,
    /// Everything on disk lives below.
    folder: PathBuf,
    /// Held for its standard input, whose closing is the signal.
    _watchdog: Child,
}

/// This process's identity, with its watchdog running.
fn get() -> &'static Owner {
    static OWNER: LazyLock<Owner> = LazyLock::new(|| Owner::start().unwrap_or_else(|error| panic!("{error:#}")));
    &OWNER
}

/// This process's mark: the value of [`MARK`] in what it starts.
pub fn id() -> &'static str {
    &get().id
}

/// A program with an environment of nothing but `PATH` and the mark, no input and no output, in a process group of its own.
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
                // What it takes to run docker; above all not the mark of an outer owner, or else its watchdog kills ours.
                matches!(name.to_str(), Some("PATH" | "HOME" | "DOCKER_HOST" | "DOCKER_CONFIG"))
            }))
            .current_dir("/")
            .stdin(Stdio::piped())
            // Not inherited: whoever reads this process's output would wait for the watchdog too.
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .context("cannot start the shell that cleans up after the tests")?;
        fs::create_dir(&folder).with_context(|| format!("cannot create {} for the tests", folder.display()))?;
        Ok(Self { id, folder, _watchdog: watchdog })
    }
}

/// The label, `name=value`, with which a test's own containers and networks are removed should this process be killed; from
/// now on the watchdog asks Docker, too.
pub fn docker_label() -> Result<String> {
    let owner = get();
    let path = owner.folder.join("docker");
    fs::write(&path, "").with_context(|| format!("cannot write {}", path.display()))?;
    Ok(format!("{LABEL}={}", owner.id))
}

/// A new, empty folder, gone when this process ends: the watchdog removes it with the others.
pub fn temp_folder(name: &str) -> PathBuf {
    let folder = tempfile::Builder::new()
        .prefix(&format!("{name}-"))
        // The user rabbitmq must get at a node's folder.
        .permissions(fs::Permissions::from_mode(0o755))
        .tempdir_in(&get().folder);
    folder.expect("a folder for the tests").keep()
}

/// Whether this process has the rights of root.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// The pids of the living processes that have `NAME=VALUE` in the environment they were started with.
pub fn processes_with(name: &str, value: &str) -> Vec<i32> {
    let wanted = format!("{name}={value}");
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let mut buffer = vec![0; ENVIRONMENT_MAX];
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        // A zombie's environ reads as empty, so what has ended but isn't reaped doesn't count.
        .filter(|pid: &i32| {
            environment(*pid, &mut buffer).split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes())
        })
        .collect()
}

/// The variables that a process was started with, each ended by a NUL; empty for one that has ended, or is none of ours.
fn environment(pid: i32, buffer: &mut [u8]) -> &[u8] {
    let mut size = 0;
    eventually(PATIENCE, || {
        // In one call: between two the process may become another program, and what was read is a part.
        let file = File::open(format!("/proc/{pid}/environ"));
        let read = file.and_then(|mut file| file.read(buffer));
        size = *read.as_ref().unwrap_or(&0);
        read.is_err() || size > 0 || !is_in_execve(pid)
    });
    &buffer[..size]
}

/// Whether a process whose environ reads as empty may only be becoming another program: within execve(2) the old environment
/// is gone and the new one not yet there. By the fields of proc_pid_stat(5): 3 state, 9 flags, 26 `startcode`, which the
/// kernel sets behind the environment, 50 and 51 `env_start` and `env_end`.
fn is_in_execve(pid: i32) -> bool {
    const PF_KTHREAD: u64 = 0x0020_0000;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The second field is a name in parentheses, and may contain any character.
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

/// The first executable file of that name in `PATH`.
pub fn find_in_path(name: &str) -> Option<PathBuf> {
    // The tools of an administrator are missing from many users' PATH.
    let script = "PATH=$PATH:/usr/sbin:/sbin; command -v \"$0\"";
    let found = exec::run(Command::new("sh").args(["-c", script, name]), FIND_LIMIT);
    Some(found.ok()?.trim().into())
}
