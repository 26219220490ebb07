//! qconsume as the first process of a container, and below another one; compared with tini.

use crate::common::{MESSAGE, assert_back, assert_gone, worker};
use nix::{sys::signal::kill, unistd::Pid};
use std::time::Duration;
use testbed::{
    Broker, Container, Finished, PATIENCE, Program, Queue, Running, Signal, docker, eventually, image_present, missing,
    owner,
};

/// Images with a shell, of which one is enough.
const IMAGES: [&str; 6] = [
    "python:3-slim",
    "debian:bookworm-slim",
    "rabbitmq:4.3-management",
    "rabbitmq:4-management",
    "rabbitmq:3-management",
    "rabbitmq:3.10-management",
];

/// Longest time to end after a `docker stop`; less than the 30 s after which that kills.
const PROMPT: Duration = Duration::from_secs(20);

/// Waits until only PID 1 and the shell itself are left. A zombie would count; globbing starts no new process.
const ALONE: &str = "while set -- /proc/[0-9]*; [ $# -gt 2 ]; do :; done";

/// Leaves ten orphans to PID 1, some of which end at once and some later.
const DOUBLE_FORKS: &str = "for i in 1 2 3 4 5; do
        (sh -c : & sh -c 'exec sleep 0.1' &)
    done";

/// The image to run in; `None` without Docker or without any of the images.
fn image() -> Option<&'static str> {
    let found = IMAGES.into_iter().find(|image| image_present(image));
    if found.is_none() {
        missing("Docker and an image with a shell, such as debian:bookworm-slim");
    }
    found
}

/// The first process (PID 1) of the container's PID namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum First {
    Qconsume,
    /// Docker's tini, by `docker run --init`.
    Init,
    /// A process of another container, whose PID namespace it shares.
    Other,
}

struct Worker {
    container: Container,
    running: Running,
    // Dropped after the container that shares its namespace.
    _other: Option<Container>,
}

impl Worker {
    fn start(image: &str, first: First, queue: &Queue, options: &[&str], script: &str) -> Self {
        let other = (first == First::Other).then(|| {
            let other = Container::create(image, &["--entrypoint", "sleep"], &["1000"]);
            docker(&["start", other.name()]).unwrap();
            other
        });
        let url = format!("BROKER_URL={}", Broker::shared().url());
        let name = format!("QUEUE={}", queue.name());
        let namespace = other.as_ref().map(|other| format!("container:{}", other.name()));
        let mut settings = vec!["--env", &url, "--env", &name, "--entrypoint", "/qconsume"];
        match (&namespace, first) {
            (Some(namespace), _) => settings.extend(["--pid", namespace]),
            (None, First::Init) => settings.push("--init"),
            (None, _) => {}
        }
        let mut command = options.to_vec();
        command.extend(["--", "sh", "-c", script]);
        let container = Container::create(image, &settings, &command);
        container.copy_in(&crate::common::qconsume_path(), "/qconsume");
        let running = container.start().spawn();
        Self { container, running, _other: other }
    }

    /// `docker stop`, with 30 seconds until SIGKILL, as in Kubernetes.
    fn stop(&self) -> Finished {
        self.stop_within("30")
    }

    fn stop_within(&self, seconds: &str) -> Finished {
        docker(&["stop", "--time", seconds, self.container.name()]).unwrap();
        self.running.finish(PROMPT)
    }

    /// Runs a script in the container; returns its output.
    fn look(&self, script: &str) -> String {
        docker(&["exec", self.container.name(), "sh", "-c", script]).unwrap()
    }
}

fn one_message(name: &str) -> Queue {
    let queue = Broker::shared().queue(name);
    queue.publish(MESSAGE);
    queue
}

#[test]
fn an_idle_container_stops_at_once() {
    let Some(image) = image() else { return };
    for first in [First::Qconsume, First::Init, First::Other] {
        let queue = Broker::shared().queue("idle");
        let worker = Worker::start(image, first, &queue, &[], "echo ran");
        queue.wait_consumers(1);
        // Orphans are reaped also while no command runs: here those of a `docker exec`.
        if first == First::Qconsume {
            worker.look(&format!("{DOUBLE_FORKS}; {ALONE}"));
        }
        let finished = worker.stop();
        finished.assert_status(143).assert_stderr("before a command was started");
        assert_eq!(finished.stdout_text(), "", "{first:?}");
        queue.wait_consumers(0);
    }
}

#[test]
fn a_busy_container_passes_the_stop_on() {
    let Some(image) = image() else { return };
    for first in [First::Qconsume, First::Init, First::Other] {
        for (script, status) in [
            ("echo running; exec sleep 1000", 143),
            ("trap 'exit 0' TERM; echo running; sleep 1000 & wait", 0),
            ("trap 'exit 9' TERM; echo running; sleep 1000 & wait", 9),
        ] {
            let queue = one_message("busy");
            let worker = Worker::start(image, first, &queue, &[], script);
            worker.running.wait_for_stdout("running", PATIENCE);
            worker.stop().assert_status(status);
            if status == 0 {
                assert_gone(&queue);
            } else {
                assert_back(&queue);
            }
        }
    }
}

#[test]
fn a_command_that_ignores_the_stop_is_killed_by_the_platform() {
    let Some(image) = image() else { return };
    for first in [First::Qconsume, First::Init, First::Other] {
        let queue = one_message("deaf");
        let script = "trap 'echo got TERM' TERM; echo running; while :; do sleep 0.05; done";
        let worker = Worker::start(image, first, &queue, &[], script);
        worker.running.wait_for_stdout("running", PATIENCE);
        let finished = worker.stop_within("10");
        finished.assert_status(137);
        assert!(finished.stdout_text().contains("got TERM"));
        assert_back(&queue);
    }
}

#[test]
fn a_status_passes_through_a_container() {
    let Some(image) = image() else { return };
    for (script, status) in [("exit 3", 3), ("kill -KILL $$", 137), ("kill -TERM $$", 143)] {
        let queue = one_message("status");
        let worker = Worker::start(image, First::Qconsume, &queue, &[], script);
        worker.running.finish(PATIENCE).assert_status(status);
        assert_back(&queue);
    }
}

#[test]
fn the_orphans_of_a_command_are_reaped_all_along() {
    let Some(image) = image() else { return };
    // If a zombie stayed, the script would wait until the time limit.
    let script = format!("{DOUBLE_FORKS}; {ALONE}; exit 5");
    let queue = one_message("orphans");
    let limit = ["--timeout", "60s"];
    let worker = Worker::start(image, First::Qconsume, &queue, &limit, &script);
    worker.running.finish(3 * PATIENCE).assert_status(5);
    assert_back(&queue);
}

#[test]
fn a_container_in_a_shared_pid_namespace_leaves_no_process_behind() {
    let Some(image) = image() else { return };
    // In a shared PID namespace, the container's end kills only its own first process.
    let queue = one_message("left");
    let script = "sleep 1000 & sleep 1000 & echo running; wait";
    let worker = Worker::start(image, First::Other, &queue, &[], script);
    worker.running.wait_for_stdout("running", PATIENCE);
    let other = worker._other.as_ref().unwrap().name().to_owned();
    let count = || {
        let seen = docker(&[
            "exec",
            &other,
            "sh",
            "-c",
            // grep fails if a process ends before it is read.
            "grep -las ^sleep /proc/[0-9]*/cmdline || :",
        ]);
        seen.unwrap().lines().count()
    };
    // The namespace's first process is a sleep, too. It doesn't reap, but a zombie has no command line.
    assert!(eventually(PATIENCE, || count() == 3));
    worker.stop().assert_status(143);
    assert!(eventually(PATIENCE, || count() == 1));
    assert_back(&queue);
}

#[test]
fn a_pids_limit_that_is_too_small_is_71_and_named() {
    let Some(image) = image() else { return };
    let queue = one_message("pids-limit");
    let url = format!("BROKER_URL={}", Broker::shared().url());
    let name = format!("QUEUE={}", queue.name());
    // qconsume itself is one; lapin's thread and the command are two more.
    for limit in 1.. {
        let limit_text = limit.to_string();
        let settings = ["--env", &url, "--env", &name, "--entrypoint", "/qconsume", "--pids-limit", &limit_text];
        let container = Container::create(image, &settings, &["--", "cat"]);
        container.copy_in(&crate::common::qconsume_path(), "/qconsume");
        let finished = container.start().spawn().finish(PATIENCE);
        if finished.status() == 0 {
            assert!(limit > 2, "a limit of {limit} was enough");
            break;
        }
        let says = "no more processes or threads may be started (pids limit, ulimit -u)";
        finished.assert_status(71).assert_stderr(says);
        assert!(limit < 10, "{finished:?}");
    }
    assert_gone(&queue);
}

#[test]
fn what_an_earlier_docker_exec_leaves_is_not_killed_with_the_command() {
    let Some(image) = image() else { return };
    let queue = Broker::shared().queue("exec");
    // The second command checks that the orphan from the first one's time still runs.
    let script = "touch /go; until [ -s /left ]; do sleep 0.02; done
        until grep -q ') . 1 ' /proc/$(cat /left)/stat; do sleep 0.02; done
        grep -q sleep /proc/$(cat /left)/cmdline && echo it lives";
    let options = ["--count", "2", "--kill-after", "600s"];
    let worker = Worker::start(image, First::Qconsume, &queue, &options, script);
    queue.wait_consumers(1);
    let exec = "echo >/before; until [ -e /go ]; do sleep 0.02; done; sh -c 'sleep 1000 & echo $! >/left'";
    docker(&["exec", "--detach", worker.container.name(), "sh", "-c", exec]).unwrap();
    worker.look("until [ -e /before ]; do sleep 0.02; done");
    queue.publish_all(["first", "second"]);
    let finished = worker.running.finish(PATIENCE);
    finished.assert_status(0);
    assert_eq!(finished.stdout_text(), "it lives\nit lives\n");
}

/// Makes a program the first process of a new PID namespace.
fn as_pid_1(program: Program) -> Program {
    program.through(["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"])
}

/// Whether this process may create PID namespaces.
fn can_unshare() -> bool {
    let can = owner::is_root()
        && owner::find_in_path("unshare").is_some()
        && as_pid_1(Program::new("true")).run().status() == 0;
    if !can {
        missing("unshare, and the right to create PID namespaces");
    }
    can
}

#[test]
fn reaping_never_steals_the_commands_status() {
    if !can_unshare() {
        return;
    }
    let broker = Broker::shared();
    let queue = broker.queue("steals");
    for run in 1..=60 {
        queue.publish(MESSAGE);
        // Orphans that end before, at the same time as, and after the command.
        let script = format!("(sh -c : & sleep 0.01 & sleep 0.02 & sh -c : &); exit {run}");
        let worker = worker(&queue);
        as_pid_1(worker.shell(&script)).run().assert_status(run);
        assert_back(&queue);
    }
}

#[test]
fn statuses_are_those_of_tini() {
    if owner::find_in_path("tini").is_none() {
        return missing("tini");
    }
    let queue = Broker::shared().queue("tini");
    for first in [true, false] {
        if first && !can_unshare() {
            return;
        }
        let ours = |script: &str| {
            queue.publish(MESSAGE);
            let worker = worker(&queue);
            worker.shell(script)
        };
        // A background job of a shell ignores SIGINT and SIGQUIT. qconsume resets them for its command, tini doesn't.
        let theirs = |script: &str| Program::new("env").args(["--default-signal", "tini", "-g", "-s"]).shell(script);
        // As PID 1 it is a child of unshare, so the signal has to go to that child.
        let run = |program: Program, signal: Option<Signal>| {
            let running = if first { as_pid_1(program).spawn() } else { program.spawn() };
            if let Some(signal) = signal {
                running.wait_for_stdout("running", PATIENCE);
                let worker = if first { only_child(running.pid()) } else { running.pid() };
                kill(Pid::from_raw(worker), signal).unwrap();
            }
            running.finish(PATIENCE).status()
        };
        let compare = |script: &str, signal: Option<Signal>| {
            let (ours, theirs) = (run(ours(script), signal), run(theirs(script), signal));
            assert_eq!(ours, theirs, "{script:?} {signal:?}, PID 1: {first}");
            queue.wait_consumers(0);
            queue.wait_ready(u32::from(ours != 0));
            queue.purge();
        };
        for status in [0, 1, 2, 42, 64, 75, 124, 126, 127, 128, 143, 255] {
            compare(&format!("exit {status}"), None);
        }
        for signal in ["HUP", "INT", "QUIT", "ABRT", "KILL", "SEGV", "PIPE", "TERM", "USR1", "34"] {
            // No core files.
            compare(&format!("ulimit -c 0; kill -{signal} $$"), None);
        }
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT] {
            for script in [
                "ulimit -c 0; echo running; exec sleep 1000",
                "trap 'exit 0' TERM INT HUP QUIT; echo running; sleep 1000 & wait",
                "trap 'exit 5' TERM INT HUP QUIT; echo running; sleep 1000 & wait",
            ] {
                compare(script, Some(signal));
            }
        }
    }
}

fn only_child(pid: i32) -> i32 {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    children.trim().parse().unwrap()
}
