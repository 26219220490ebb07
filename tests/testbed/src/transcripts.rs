//! `make transcripts`: what qconsume says in each case that its contract names, from real runs, as a page.

use crate::{
    BasicProperties, Broker, Client, Direction, Finished, Method, PATIENCE, Program, Proxy, Queue,
    Running, Signal, demo,
    proxy::{Action, frames},
};
use anyhow::{Context, Result};
use std::{
    fmt::Write as _,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

/// The name on the page for the queue, which has another on a broker that isn't ours alone.
const QUEUE: &str = "job1";

/// What a queue's name begins with meanwhile; eight digits follow.
const OWN_NAME: &str = "transcripts";

/// A command that says that it is running, and then takes its time.
const SLEEP: &str = "echo running; exec sleep 60";

const HEAD: &str = "# Transcripts

What qconsume says in each case, as a person sees it, as a machine does (`--log-format json`), and in the termination
message. Written from real runs by `make transcripts`; times, ports and the queue's name are made the same in each.
Which fields there are is in [logs.md](logs.md). The queue is a quorum queue of RabbitMQ VERSION; another version may word
what it says itself differently.

A qconsume that is itself killed says nothing, and its termination message stays empty. The broker requeues the message.
";

/// What a case has to do with.
struct Stage {
    broker: &'static Broker,
    queue: Queue,
    proxy: Proxy,
    program: Program,
    folder: PathBuf,
}

impl Stage {
    fn publish(&self) {
        let properties = BasicProperties::default().with_message_id("order-7".into());
        self.queue.publish_with(properties, "apple");
    }

    fn options(&self, options: &[&str]) -> Program {
        self.program.clone().args(options)
    }

    /// The same by way of the proxy.
    fn proxied(&self, options: &[&str]) -> Program {
        self.options(options).url(&self.proxy.url())
    }

    /// A message, and a command to its end.
    fn run(&self, options: &[&str], script: &str) -> Finished {
        self.publish();
        self.options(options).shell(script).run()
    }

    /// The same, and something that happens once the command has said that it is running.
    fn meanwhile(&self, program: Program, script: &str, happens: impl Fn(&Running)) -> Finished {
        self.publish();
        let running = program.shell(script).spawn();
        running.wait_for_stdout("running", PATIENCE);
        happens(&running);
        running.wait(PATIENCE)
    }
}

type Case = (&'static str, &'static str, fn(&Stage) -> Finished);

fn cases() -> Vec<Case> {
    vec![
        ("The command succeeds", "qconsume -- COMMAND", |s| {
            s.run(&[], "cat >/dev/null")
        }),
        ("The command fails", "qconsume -- COMMAND", |s| {
            s.run(&[], "exit 3")
        }),
        ("The command dies of a signal", "qconsume -- COMMAND", |s| {
            s.run(&[], "kill -SEGV $$")
        }),
        (
            "The command fails with a status in --reject-on",
            "qconsume --reject-on 65 -- COMMAND",
            |s| s.run(&["--reject-on", "65"], "exit 65"),
        ),
        (
            "The command fails for the last time",
            "qconsume --max-attempts 1 --reject-exit-code 0 -- COMMAND",
            |s| {
                let options = ["--max-attempts", "1", "--reject-exit-code", "0"];
                s.run(&options, "exit 3")
            },
        ),
        (
            "The command fails, and its status is mapped",
            "qconsume --failure-exit-code 1 -- COMMAND",
            |s| s.run(&["--failure-exit-code", "1"], "exit 77"),
        ),
        (
            "The command runs into its time limit",
            "qconsume --timeout 300ms -- COMMAND",
            |s| s.run(&["--timeout", "300ms"], "exec sleep 60"),
        ),
        (
            "The command takes no notice of the time limit",
            "qconsume --timeout 300ms --kill-after 300ms -- COMMAND",
            |s| {
                let options = ["--timeout", "300ms", "--kill-after", "300ms"];
                s.run(&options, "trap '' TERM; sleep 60")
            },
        ),
        (
            "SIGTERM while the command runs",
            "qconsume -- COMMAND",
            |s| {
                s.meanwhile(s.options(&[]), SLEEP, |running| {
                    running.signal(Signal::SIGTERM);
                })
            },
        ),
        (
            "SIGTERM while the command runs, which finishes its work",
            "qconsume -- COMMAND",
            |s| {
                let script = "trap 'exit 0' TERM; sleep 60 & echo running; wait";
                s.meanwhile(s.options(&[]), script, |running| {
                    running.signal(Signal::SIGTERM);
                })
            },
        ),
        (
            "SIGTERM, of which the command takes no notice",
            "qconsume --grace 300ms -- COMMAND",
            |s| {
                let program = s.options(&["--grace", "300ms"]);
                s.meanwhile(
                    program,
                    "trap '' TERM; sleep 60 & echo running; wait",
                    |running| {
                        running.signal(Signal::SIGTERM);
                    },
                )
            },
        ),
        (
            "SIGTERM while there is no message",
            "qconsume -- COMMAND",
            |s| {
                let running = s.options(&[]).shell("true").spawn();
                s.queue.wait_consumers(1);
                running.signal(Signal::SIGTERM);
                running.wait(PATIENCE)
            },
        ),
        (
            "The connection is lost while the command runs",
            "qconsume -- COMMAND",
            |s| s.meanwhile(s.proxied(&[]), SLEEP, |_| s.proxy.cut()),
        ),
        (
            "The broker closes the connection while the command runs, which finishes",
            "qconsume --on-lost finish -- COMMAND",
            |s| {
                let text =
                    "CONNECTION_FORCED - broker forced connection closure with reason 'shutdown'";
                let close = frames::connection_close(320, text);
                let program = s.proxied(&["--on-lost", "finish", "--heartbeat", "1"]);
                // Heartbeats come once a second: the close goes out with the first one while the command runs.
                s.proxy.once(
                    Direction::ToClient,
                    Method::HEARTBEAT,
                    Action::Inject(close),
                );
                s.meanwhile(program, "echo running; sleep 3", |_| {})
            },
        ),
        (
            "The queue is deleted while the command runs",
            "qconsume -- COMMAND",
            |s| {
                s.meanwhile(s.options(&[]), SLEEP, |_| {
                    s.queue.delete();
                })
            },
        ),
        (
            "The acknowledgement is not confirmed",
            "qconsume --settle-timeout 500ms -- COMMAND",
            |s| {
                s.publish();
                let swallow = Action::Swallow;
                s.proxy
                    .once(Direction::ToBroker, Method::BASIC_CANCEL, swallow);
                s.proxied(&["--settle-timeout", "500ms"])
                    .shell("true")
                    .run()
            },
        ),
        (
            "The connection is lost while there is no message",
            "qconsume -- COMMAND",
            |s| {
                let running = s.proxied(&[]).shell("true").spawn();
                s.queue.wait_consumers(1);
                s.proxy.cut();
                running.wait_for_stderr("connecting again", PATIENCE);
                s.publish();
                running.wait(PATIENCE)
            },
        ),
        (
            "No message comes",
            "qconsume --wait 300ms -- COMMAND",
            |s| s.options(&["--wait", "300ms"]).shell("true").run(),
        ),
        (
            "Several messages, until the queue is empty",
            "qconsume --drain -- COMMAND",
            |s| {
                s.publish();
                s.run(&["--drain"], "true")
            },
        ),
        (
            "Several messages, of which one fails",
            "qconsume --count 5 -- COMMAND",
            |s| {
                let fail = BasicProperties::default().with_message_id("order-8".into());
                s.publish();
                s.queue.publish_with(fail, "banana");
                s.options(&["--count", "5"])
                    .shell("test \"$MESSAGE_ID\" = order-7")
                    .run()
            },
        ),
        ("There is no such command", "qconsume -- COMMAND", |s| {
            s.options(&["--", "worker.py"]).run()
        }),
        (
            "The command can't be started after all",
            "qconsume -- ./COMMAND",
            |s| {
                let path = s.folder.join("COMMAND");
                let written = fs::write(&path, [0x7f, b'E', b'L', b'F', 0, 0])
                    .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)));
                written.expect("its own folder can be written to");
                s.publish();
                s.options(&["--", "./COMMAND"]).run()
            },
        ),
        (
            "An option is misspelt",
            "qconsume --drian -- COMMAND",
            |s| s.options(&["--drian", "--", "true"]).run(),
        ),
        (
            "The address is malformed",
            "BROKER_URL=http://me:password@localhost qconsume -- COMMAND",
            |s| {
                s.options(&["--", "true"])
                    .url("http://me:password@localhost")
                    .run()
            },
        ),
        (
            "The broker can't be reached",
            "qconsume --connect-timeout 2s -- COMMAND",
            |s| {
                s.proxy.refuse();
                s.proxied(&["--connect-timeout", "2s"]).shell("true").run()
            },
        ),
        (
            "The broker accepts, and says nothing",
            "qconsume --connect-timeout 2s -- COMMAND",
            |s| {
                s.proxy.stall();
                s.proxied(&["--connect-timeout", "2s"]).shell("true").run()
            },
        ),
        (
            "The password is wrong",
            "BROKER_URL=amqp://guest:wrong@localhost qconsume -- COMMAND",
            |s| {
                let url = s.broker.url_for("guest", "wrong", "/");
                s.options(&["--", "true"]).url(&url).run()
            },
        ),
        (
            "There is no such virtual host",
            "BROKER_URL=amqp://localhost/nowhere qconsume -- COMMAND",
            |s| {
                let url = s.broker.url_for("guest", "guest", "nowhere");
                s.options(&["--", "true"]).url(&url).run()
            },
        ),
        (
            "There is no such queue",
            "qconsume --connect-timeout 2s -- COMMAND",
            |s| {
                s.queue.delete();
                s.options(&["--connect-timeout", "2s", "--", "true"]).run()
            },
        ),
        (
            "Somebody else has the queue for himself",
            "qconsume -- COMMAND",
            |s| {
                // A quorum queue takes no notice of that.
                let classic = s.broker.queue(OWN_NAME);
                let _other = classic.consume(true);
                s.options(&["--", "true"]).queue(classic.name()).run()
            },
        ),
    ]
}

/// The page, from two runs of each case.
///
/// The one in the repository is RabbitMQ 4.3's, which has the most to say: `QCONSUME_TEST_RABBITMQ` names an image of it.
///
/// # Errors
/// When there is no broker, or no folder for temporary files.
pub fn page() -> Result<String> {
    let programs = demo::paths()?.programs;
    let (major, minor, _) = Broker::shared().version();
    let mut page = HEAD.replace("VERSION", &format!("{major}.{minor}"));
    for (title, command, case) in cases() {
        eprintln!("{title}");
        let (text, message) = run(&programs, case, "text")?;
        let (json, _) = run(&programs, case, "json")?;
        let status = text.status();
        let _ = write!(
            page,
            "\n## {title}: {status}\n\n`{command}`\n\n```text\n{}```\n\n```json\n{}```\n",
            text.stderr, json.stderr
        );
        let _ = match message.as_str() {
            "" => writeln!(page, "\nNo termination message."),
            message => write!(page, "\nTermination message:\n\n```text\n{message}```\n"),
        };
    }
    Ok(page)
}

/// One run of a case, on a queue and with a proxy of its own; what it says, made the same for every time.
fn run(programs: &Path, case: fn(&Stage) -> Finished, format: &str) -> Result<(Finished, String)> {
    let broker = Broker::shared();
    let client: &Client = broker.client();
    let queue = client.declare(OWN_NAME).quorum().create();
    let proxy = Proxy::of(broker);
    let folder = std::env::temp_dir().join(format!("qconsume-{}", queue.name()));
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let log = folder.join("termination-log");
    fs::write(&log, "").with_context(|| log.display().to_string())?;
    let program = Program::new(programs.join("qconsume"))
        .url(&broker.url())
        .queue(queue.name())
        .current_dir(&folder)
        .env("NO_COLOR", "1")
        .env("QCONSUME_LOG_FORMAT", format)
        .env("QCONSUME_TERMINATION_LOG", &log);
    let ports = [broker.port(), proxy.addr().port()];
    let stage = Stage {
        broker,
        queue,
        proxy,
        program,
        folder: folder.clone(),
    };
    let mut finished = case(&stage);
    let message = fs::read_to_string(&log).with_context(|| log.display().to_string())?;
    let _ = fs::remove_dir_all(&folder);
    let always_the_same = |text: &str| {
        let mut text = named(text);
        for port in ports {
            text = text.replace(&format!(":{port}"), ":5672");
        }
        text = number_behind(&text, "seconds=", "0.012");
        text = number_behind(&text, "\"seconds\":", "0.012");
        text = rest_of_time(&text);
        number_behind(&text, "\"time\":\"", "2026-01-01T00:00:00.000Z")
    };
    finished.stderr = always_the_same(&finished.stderr);
    Ok((finished, always_the_same(&message)))
}

/// The text with the page's name for the queue.
fn named(text: &str) -> String {
    let mark = format!("{OWN_NAME}-");
    let mut parts = text.split(&mark);
    let mut result = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        result.push_str(QUEUE);
        result.push_str(part.trim_start_matches(|c: char| c.is_ascii_hexdigit()));
    }
    result
}

/// The text with what is left of `--connect-timeout`, after some milliseconds, as two seconds.
fn rest_of_time(text: &str) -> String {
    let mark = "trying again for up to ";
    let mut parts = text.split(mark);
    let mut result = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let rest = part.trim_start_matches(|c: char| c.is_ascii_alphanumeric() || c == ' ');
        let _ = write!(result, "{mark}2s{rest}");
    }
    result
}

/// The text with another number, or time, behind each of these marks.
fn number_behind(text: &str, mark: &str, number: &str) -> String {
    let mut parts = text.split(mark);
    let mut result = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let rest = part.trim_start_matches(|c: char| c.is_ascii_digit() || "-:.TZe".contains(c));
        let _ = write!(result, "{mark}{number}{rest}");
    }
    result
}
