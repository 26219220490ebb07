//! The command's standard input: a pipe for bodies up to a mebibyte, a file for larger ones; each holds the whole body.

use super::{MEBIBYTE, assert_gone, assert_returned, binary, worker};
use crate::common::{qconsume, qconsume_path};
use std::{fs, process};
use testbed::{
    Broker, Finished, PATIENCE, Program, eventually, missing,
    owner::{self, temp_folder},
};

/// Prints the kind of standard input, then copies it.
const KIND: &str = "if [ -p /dev/stdin ]; then echo pipe; else echo file; fi; exec cat";

/// Makes memfd_create(2) fail, by a seccomp filter, with the error number in the first argument; runs the other
/// arguments.
const WITHOUT_MEMFD: &str = r#"
import ctypes, os, sys
class Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint)]
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(Instruction))]
number = {"x86_64": 319, "aarch64": 279}[os.uname().machine]
# Load the call's number; if it is this one, go on, otherwise skip one instruction; return the error; allow the call.
instructions = (Instruction * 4)(
    (0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50000 | int(sys.argv[1])), (0x06, 0, 0, 0x7FFF0000))
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
prctl = ctypes.CDLL(None).prctl
assert prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
assert prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(Filter(4, instructions)), 0, 0) == 0
os.execv(sys.argv[2], sys.argv[2:])
"#;

/// Becomes the user in the first argument, uses up this user's pipe buffers, and runs the other arguments.
const WITHOUT_PIPES: &str = r#"
import fcntl, os, sys
F_SETPIPE_SZ = 1031
os.setgroups([])
os.setuid(int(sys.argv[1]))
try:
    while True:
        for end in os.pipe():
            os.set_inheritable(end, True)
        fcntl.fcntl(end, F_SETPIPE_SZ, 1 << 20)
except PermissionError:
    os.execv(sys.argv[2], sys.argv[2:])
"#;

fn has_python() -> bool {
    owner::find_in_path("python3").is_some()
}

#[test]
fn standard_input_is_a_pipe_up_to_a_mebibyte_and_a_file_above() {
    let queue = Broker::shared().queue("kind");
    for (size, kind) in [
        (0, "pipe"),
        (65_535, "pipe"),
        (65_536, "pipe"),
        (65_537, "pipe"),
        (MEBIBYTE - 1, "pipe"),
        (MEBIBYTE, "pipe"),
        (MEBIBYTE + 1, "file"),
        (5_000_000, "file"),
    ] {
        let body = binary(size);
        queue.publish(&body);
        let done = worker(&queue).shell(KIND).run();
        done.assert_status(0);
        let expected = [kind.as_bytes(), b"\n", &body].concat();
        assert!(done.stdout == expected, "{size}: {} bytes, no {kind}", done.stdout.len());
    }
    assert_gone(&queue);
}

#[test]
fn what_was_read_from_the_pipe_is_not_read_again() {
    let queue = Broker::shared().queue("read-once");
    for size in [100, 65_537, MEBIBYTE] {
        queue.publish([b"head\n", &binary(size - 5)[..]].concat());
        let done = worker(&queue).shell("read -r head; echo $head; wc -c </dev/stdin").run();
        done.assert_status(0);
        assert_eq!(done.stdout_text(), format!("head\n{}\n", size - 5));
    }
}

#[test]
fn an_event_loop_can_wait_for_standard_input() {
    if !has_python() {
        return missing("python3");
    }
    let queue = Broker::shared().queue("event-loop");
    let script = "
import asyncio, select, sys
select.epoll().register(0)
async def size():
    reader = asyncio.StreamReader()
    protocol = lambda: asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(protocol, sys.stdin)
    return len(await reader.read())
print(asyncio.run(size()))
";
    for size in [0, 65_537, MEBIBYTE] {
        queue.publish(binary(size));
        let done = worker(&queue).args(["--", "python3", "-c", script]).run();
        done.assert_status(0);
        assert_eq!(done.stdout_text(), format!("{size}\n"));
    }
}

#[test]
fn a_user_without_room_for_pipes_gets_a_file() {
    if !owner::is_root() || !has_python() {
        return missing("root, and python3");
    }
    let broker = Broker::shared();
    let queue = broker.queue("no-pipes");
    // The kernel counts pipes for each user, so the test needs an unused one, and a copy of the program that it can
    // reach.
    let user = (2_000_000 + process::id()).to_string();
    let program = temp_folder("no-pipes").join("qconsume");
    fs::copy(qconsume_path(), &program).unwrap();
    // A new pipe then has two pages, or one on older kernels.
    for (size, kind) in [(1000, "pipe"), (20_000, "file"), (100_000, "file")] {
        let body = binary(size);
        queue.publish(&body);
        let done = Program::new(&program)
            .url(&broker.url())
            .queue(queue.name())
            .shell(KIND)
            .through(["python3", "-c", WITHOUT_PIPES, &user])
            .run();
        done.assert_status(0);
        assert!(done.stdout == [kind.as_bytes(), b"\n", &body].concat(), "{size}: no {kind}, or not all");
    }
}

#[test]
fn without_memfd_a_large_message_is_in_a_deleted_file_or_71_says_why() {
    if !has_python() {
        return missing("python3");
    }
    let queue = Broker::shared().queue("no-memfd");
    let without_memfd = |error: &str| worker(&queue).through(["python3", "-c", WITHOUT_MEMFD, error]);
    let body = binary(2 * MEBIBYTE);
    // EPERM and ENOSYS.
    for error in ["1", "38"] {
        let folder = temp_folder("no-memfd");
        queue.publish(&body);
        let done = without_memfd(error)
            .env("TMPDIR", &folder)
            .shell("readlink /proc/self/fd/0; ls -A \"$TMPDIR\"; exec cat")
            .run();
        done.assert_status(0);
        let line = done.stdout.len().checked_sub(body.len()).expect("all of the message");
        let (line, rest) = done.stdout.split_at(line);
        let (folder, line) = (folder.display(), String::from_utf8_lossy(line));
        assert!(line.starts_with(&format!("{folder}/")) && line.ends_with(" (deleted)\n"), "{line}");
        assert_eq!(line.lines().count(), 1, "the file is still there: {line}");
        assert!(rest == body);
    }

    queue.publish(&body);
    let folder = temp_folder("no-folder").join("missing");
    without_memfd("1")
        .env("TMPDIR", &folder)
        .arg("cat")
        .run()
        .assert_status(71)
        .assert_stderr("its message of 2097152 bytes can't be put on its standard input")
        .assert_stderr("memfd_create: Operation not permitted (os error 1); ")
        .assert_stderr(&format!("a temporary file in {}: No such file or directory (os error 2)", folder.display()))
        .assert_stderr("; set TMPDIR")
        .assert_stderr("message released");
    assert_returned(&queue, &body);
    // A small message needs no file.
    queue.publish("small");
    without_memfd("1").env("TMPDIR", &folder).arg("cat").run().assert_status(0);
}

#[test]
fn without_memfd_and_on_a_read_only_system_a_large_message_is_71() {
    if !owner::is_root() || !has_python() || owner::find_in_path("unshare").is_none() {
        return missing("root, unshare and python3");
    }
    let queue = Broker::shared().queue("read-only");
    let body = binary(2 * MEBIBYTE);
    queue.publish(&body);
    let mount = "mount -t tmpfs -o ro tmpfs \"$TMPDIR\" && exec \"$0\" \"$@\"";
    worker(&queue)
        .env("TMPDIR", temp_folder("read-only"))
        .arg("cat")
        .through(["unshare", "--mount", "sh", "-c", mount])
        .through(["python3", "-c", WITHOUT_MEMFD, "1"])
        .run()
        .assert_status(71)
        .assert_stderr("Read-only file system")
        .assert_stderr("set TMPDIR");
    assert_returned(&queue, &body);
}

#[test]
fn a_file_system_that_is_full_is_71_and_named() {
    if !owner::is_root() || !has_python() || owner::find_in_path("unshare").is_none() {
        return missing("root, unshare and python3");
    }
    let queue = Broker::shared().queue("full");
    let body = binary(2 * MEBIBYTE);
    queue.publish(&body);
    let mount = "mount -t tmpfs -o size=1m tmpfs \"$TMPDIR\" && exec \"$0\" \"$@\"";
    worker(&queue)
        .env("TMPDIR", temp_folder("full"))
        .arg("cat")
        .through(["unshare", "--mount", "sh", "-c", mount])
        .through(["python3", "-c", WITHOUT_MEMFD, "1"])
        .run()
        .assert_status(71)
        .assert_stderr("no space is left (on the file system of TMPDIR, in memory, ")
        .assert_stderr("another try may help");
    assert_returned(&queue, &body);
}

#[test]
fn a_message_larger_than_files_may_be_is_a_shortage() {
    let queue = Broker::shared().queue("limited");
    let body = binary(2 * MEBIBYTE);
    queue.publish(&body);
    let run = worker(&queue).arg("cat").through(["sh", "-c", "ulimit -f 100; exec \"$0\" \"$@\""]).run();
    run.assert_status(71).assert_stderr("the message is larger than files may be (ulimit -f)");
    assert_returned(&queue, &body);
}

#[test]
fn a_usage_error_that_no_file_takes_is_still_64() {
    // The signal SIGXFSZ would end the program while it writes.
    qconsume().arg("--nonsense").through(["sh", "-c", "ulimit -f 0; exec \"$0\" \"$@\""]).run().assert_status(64);
}

#[test]
fn memory_that_runs_out_is_71_and_said() {
    let queue = Broker::shared().queue("memory");
    queue.publish(binary(12 * MEBIBYTE));
    let mut said = false;
    for limit in (1..).map(|n| n * 10_000) {
        assert!(limit < 1_000_000, "no limit was enough");
        let line = format!("ulimit -v {limit}; exec \"$0\" \"$@\"");
        // With the smallest limits, no program starts at all.
        let done = worker(&queue).arg("true").through(["sh", "-c", &line]).run();
        if done.status() == 0 {
            break;
        }
        if done.stderr.contains("memory has run out") {
            said = true;
            assert!(done.stderr.ends_with(" status=71 source=\"qconsume\"\n"), "{}", done.stderr);
            done.assert_status(71);
        }
    }
    assert!(said, "no limit was just too small");
    assert_gone(&queue);
}

/// Runs out of memory while the second message arrives. `outcome` is the first one's. Returns the end and the last line.
fn out_of_memory_between_messages(outcome: &str, words: &[&str]) -> (Finished, serde_json::Value) {
    for limit in (1..).map(|n| n * 10_000) {
        assert!(limit < 1_000_000, "no limit was just too small");
        let queue = Broker::shared().queue(&format!("memory-{outcome}-{limit}"));
        queue.publish("small");
        let line = format!("ulimit -v {limit}; exec \"$0\" \"$@\"");
        let options = ["--log-format", "json", "--count", "2"];
        let run = worker(&queue).args(options).args(words).through(["sh", "-c", &line]).spawn();
        // Only now, as memory may not run out before the first message is done. With a small limit the run has ended.
        let is_settled = |stderr: &str| stderr.contains(&format!("\"outcome\":\"{outcome}\""));
        assert!(eventually(PATIENCE, || is_settled(&run.stderr()) || run.has_ended()), "{}", run.stderr());
        queue.publish(binary(12 * MEBIBYTE));
        let done = run.wait(PATIENCE);
        let last = done.stderr.lines().last().unwrap_or_default();
        if is_settled(&done.stderr) && last.contains("memory has run out") {
            let line: serde_json::Value = serde_json::from_str(last).expect("it is JSON");
            assert_eq!((&line["level"], &line["source"]), (&"error".into(), &"qconsume".into()));
            assert!(line["time"].as_str().is_some_and(|time| time.ends_with('Z')), "{line}");
            return (done, line);
        }
    }
    unreachable!("the loop has no end")
}

#[test]
fn memory_that_runs_out_after_a_dead_letter_keeps_its_status() {
    let (done, line) = out_of_memory_between_messages("dead-lettered", &["--keep-going", "--reject-on", "1", "false"]);
    assert!(line["message"].as_str().unwrap().starts_with("a message was dead-lettered; memory has run out"), "{line}");
    assert_eq!(line["status"], 1);
    done.assert_status(1);
}

#[test]
fn memory_that_runs_out_between_two_messages_is_71() {
    let (done, line) = out_of_memory_between_messages("acknowledged", &["true"]);
    let text = "memory has run out (on this node, or ulimit -v); another try may help";
    assert_eq!((&line["message"], &line["status"]), (&text.into(), &71.into()));
    done.assert_status(71);
}
