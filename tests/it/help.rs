//! What `-h`, `--help` and `--version` show.

use crate::common::{qconsume, qpublish};
use std::os::unix::fs::symlink;
use testbed::{Program, owner};

/// The columns of a common terminal.
const WIDTH: usize = 80;

/// The lines of one screen.
const SCREEN: usize = 50;

fn shown(program: Program, option: &str) -> String {
    let run = program
        .url("amqp://me:hunter2@localhost")
        .env("QCONSUME_PASSWORD", "hunter2")
        .env("QCONSUME_SERVER", "amqp://me:hunter2@localhost")
        .env("QUEUE", "a-queue-with-a-name-".repeat(5))
        .arg(option)
        .run();
    run.assert_status(0);
    assert_eq!(run.stderr, "");
    run.stdout_text()
}

#[track_caller]
fn assert_fits(help: &str) {
    for line in help.lines() {
        assert!(line.chars().count() <= WIDTH, "too long: {line}");
    }
    assert!(!help.contains("hunter2"));
    assert!(!help.contains('\u{1b}'));
}

#[test]
fn the_short_help_is_one_screen() {
    for program in [qconsume(), qpublish()] {
        let help = shown(program, "-h");
        assert_fits(&help);
        assert!(help.lines().count() <= SCREEN, "{help}");
    }
    let help = shown(qconsume(), "-h");
    for part in [
        "-u, --url <URL>        Connect to amqp://user:password@host/vhost",
        "[env: BROKER_URL]",
        "[env: QUEUE]",
        "[default: 1]",
        "Exit status, COMMAND's own, and qconsume's:",
    ] {
        assert!(help.contains(part), "{part}: {help}");
    }
}

#[test]
fn the_full_help_is_grouped_has_variables_and_defaults_and_ends_with_the_statuses() {
    let help = shown(qconsume(), "--help");
    assert_fits(&help);
    let mut rest = help.as_str();
    for heading in [
        "Broker:",
        "Taking:",
        "Running:",
        "Settling:",
        "Output:",
        "Command:",
        "TLS:",
        "As in amqp-tools:",
        "Exit status, COMMAND's own, and qconsume's:",
    ] {
        let at = rest
            .find(&format!("\n{heading}\n"))
            .unwrap_or_else(|| panic!("{heading} doesn't come after the headings before it in:\n{help}"));
        rest = &rest[at + 1..];
    }
    for status in ["0 ", "64", "66", "69", "70", "71", "75", "77", "78", "124", "126", "127", "128+N"] {
        assert!(rest.contains(&format!("\n  {status} ")), "{status}: {rest}");
    }
    for program in [qconsume(), qpublish()] {
        let help = shown(program, "--help");
        assert!(help.contains("\n\nExamples:\n  "), "{help}");
    }
    assert!(help.contains("[env: QCONSUME_KILL_AFTER]\n          [default: 10s]"));
    assert_fits(&shown(qpublish(), "--help"));
}

#[test]
fn a_narrow_terminal_changes_nothing() {
    for option in ["-h", "--help"] {
        for program in [qconsume, qpublish] {
            let narrow = shown(program().env("COLUMNS", "30"), option);
            assert_eq!(narrow, shown(program(), option));
        }
    }
}

#[test]
fn the_version_begins_with_the_packages() {
    for (program, name) in [(qconsume(), "qconsume"), (qpublish(), "qpublish")] {
        let version = shown(program, "--version");
        let expected = format!("{name} {}", env!("CARGO_PKG_VERSION"));
        let rest = version.strip_prefix(&expected).unwrap_or_else(|| panic!("{version:?} isn't {expected}"));
        // If the build knows its commit, the version ends with it.
        assert!(rest == "\n" || (rest.starts_with(" (") && rest.ends_with(")\n")), "{version:?}");
    }
}

#[test]
fn called_as_qpublish_it_is_qpublish() {
    let link = owner::temp_folder("name").join("qpublish");
    symlink(crate::common::qconsume_path(), &link).unwrap();
    for option in ["--help", "--version"] {
        assert_eq!(shown(Program::new(&link), option), shown(qpublish(), option));
    }
}
