//! Checks the messages, log lines and options that the documentation quotes.

use super::{QUEUE, name, pages, programs, root};
use std::fs;
use testbed::{Broker, Program, owner::temp_folder};

/// As much as a reader reads in five minutes.
const README_LINES_MAX: usize = 120;

/// Options of other programs in the pages, and options of amqp-tools that the help doesn't mention.
const OPTIONS_OF_OTHERS: [&str; 7] =
    ["--fail", "--init", "--no-default-cert-paths", "--persistent", "--prefetch-count", "--stop-timeout", "--usage"];

#[test]
fn the_readme_is_for_five_minutes() {
    let text = fs::read_to_string(root().join("README.md")).expect("there is a README");
    let lines = text.lines().count();
    assert!(lines <= README_LINES_MAX, "README.md has {lines} lines");
}

/// The options that the pages name exist.
#[test]
fn options_that_the_pages_name_are_there() {
    let help = |program| Program::new(programs().join(program)).arg("--help").run().stdout_text();
    let help = help("qconsume") + &help("qpublish");
    for page in pages() {
        let text = fs::read_to_string(&page).expect("the page can be read");
        for span in text.split('`').skip(1).step_by(2) {
            let is_part = |c: char| c.is_ascii_alphanumeric() || c == '-';
            let option = span.split(|c| !is_part(c)).next().unwrap_or_default();
            if option.len() > 2 && option.starts_with("--") && !OPTIONS_OF_OTHERS.contains(&option) {
                assert!(
                    help.split(|c| !is_part(c)).any(|word| word == option),
                    "{}: there is no option {option}",
                    name(&page)
                );
            }
        }
    }
}

/// The messages in the first column of troubleshooting.md are in src/, word for word.
#[test]
fn messages_that_troubleshooting_quotes_are_ours() {
    let mut sources = Vec::new();
    let mut folders = vec![root().join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("the folder can be listed") {
            let path = entry.expect("the folder can be listed").path();
            if path.is_dir() {
                folders.push(path);
            } else {
                sources.push(fs::read_to_string(path).expect("the file can be read"));
            }
        }
    }
    let page = root().join("docs/troubleshooting.md");
    let text = fs::read_to_string(page).expect("the page can be read");
    let messages: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
    assert!(messages.len() > 40, "only {} messages were found in the tables", messages.len());
    for message in messages {
        let has_it = |line: &str| {
            let mut rest = Some(line);
            for part in message.split('…') {
                rest = rest.and_then(|rest| Some(rest.split_once(part)?.1));
            }
            rest.is_some()
        };
        assert!(sources.iter().any(|source| source.lines().any(has_it)), "no source file has {message:?}");
    }
}

/// The log lines in logs.md are those of a real run, except for its duration.
#[test]
fn log_lines_that_logs_quotes_are_real() {
    let page = fs::read_to_string(root().join("docs/logs.md")).expect("there is a page");
    let without_time = |line: &str| {
        let mut words: Vec<_> = line.split(' ').collect();
        words.retain(|word| !word.starts_with("seconds="));
        words.join(" ")
    };
    let quoted: Vec<_> = page.lines().map(without_time).collect();
    let broker = Broker::shared();
    let queue = broker.declare("docs-logs").create();
    let log = temp_folder("docs").join("termination");
    for status in [0, 3] {
        Program::new(programs().join("qpublish"))
            .args(["-q", queue.name(), "--message-id", "order-7", "apple"])
            .url(&broker.url())
            .run()
            .assert_status(0);
        fs::write(&log, "").expect("the temporary folder can be written to");
        let finished = Program::new(programs().join("qconsume"))
            .env("QCONSUME_TERMINATION_LOG", &log)
            .args(["--", "sh", "-c", &format!("exit {status}")])
            .url(&broker.url())
            .queue(queue.name())
            .run();
        finished.assert_status(status);
        let termination = fs::read_to_string(&log).expect("the termination message can be read");
        let said = finished.stderr.replace(queue.name(), QUEUE) + &termination;
        for line in said.lines().map(without_time) {
            assert!(quoted.contains(&line), "docs/logs.md lacks this line:\n{line}");
        }
    }
}
