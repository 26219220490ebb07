//! Tests the check of the terminal recording in README.md. `make check-recording` itself compares the recording with a
//! run of the demo.

use super::root;
use testbed::{Finished, Program};

/// A failed check must name this command.
const REMEDY: &str = "make recording";

fn python(args: &[&str], stdin: &str) -> Finished {
    Program::new("/usr/bin/env").args(["python3", "-B"]).args(args).stdin(stdin).current_dir(root()).run()
}

/// The demo's output, read from the picture.
fn recorded() -> String {
    let script = "import sys; sys.path.insert(0, 'tests'); import recording
print('\\n'.join(line for _, line in recording.drawn(open('docs/demo.svg').read())))";
    python(&["-c", script], "").assert_status(0).stdout_text()
}

/// Compares the picture with a run that has this output.
fn check(printed: &str) -> Finished {
    python(&["tests/recording.py", "--check", "--run", "cat"], printed)
}

#[test]
fn a_recording_may_differ_in_times_and_in_the_order_of_the_workers() {
    let recorded = recorded();
    check(&recorded).assert_status(0);
    let (head, rest) = recorded.split_once("worker.py\n").expect("the demo's output has its runs");
    let (runs, tail) = rest.split_once("\n\n").expect("the demo's output has its summary");
    let mut runs: Vec<_> = runs.split("\nworker ").collect();
    runs[0] = runs[0].strip_prefix("worker ").expect("a run has its worker");
    runs.reverse();
    let runs = runs.join("\nworker ");
    let other = format!("{head}worker.py\nworker {runs}\n\n{tail}")
        .replace("worker 1", "worker 3")
        .replace("seconds=", "seconds=12");
    assert_ne!(other, recorded);
    check(&other).assert_status(0);
}

#[test]
fn a_recording_of_something_else_fails_its_check() {
    let recorded = recorded();
    for (found, instead) in [
        ("exit status 1", "exit status 0"),
        ("exit status 0 | Processing fig", "exit status 3 | Processing fig"),
        ("outcome=\"requeued\"", "outcome=\"released\""),
        ("8 messages confirmed", "7 messages confirmed"),
        ("Processing melon", "Processing lemon"),
        ("$ FAIL_FIRST=cherry ", "$ "),
        ("9 runs", "8 runs"),
        ("| worker.py: no luck with cherry", "| "),
    ] {
        let other = recorded.replace(found, instead);
        assert_ne!(other, recorded, "the picture doesn't show {found}");
        let finished = check(&other);
        finished.assert_status(1).assert_stderr(REMEDY);
    }
}
