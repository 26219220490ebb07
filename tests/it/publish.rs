//! qpublish: every message that it reports as confirmed is in the queue, and it says where to go on.

use crate::common::{User, qpublish, qpublish_path, terminal::Terminal, worker};
use feed::Fifo;
use std::{
    path::PathBuf,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    time::Instant,
};
use testbed::{
    Action, BasicProperties, Broker, Direction, Finished, Method, PATIENCE, Program, Proxy, Queue, QueueKind, Signal,
    block_on, frames,
    lapin::options::BasicConsumeOptions,
    owner::temp_folder,
    peer::{self, Answer, Peer, Request},
    types::{AMQPValue, LongString},
};
use tokio_stream::StreamExt;

/// A time limit that a test can wait for, and that a busy machine doesn't exceed by accident.
const SOON: &str = "5s";

/// Publishes to this queue of the shared broker.
fn to(queue: &Queue) -> Program {
    qpublish().url(&Broker::shared().url()).queue(queue.name())
}

/// Takes all messages out of the queue; returns their bodies in order.
fn drain(queue: &Queue) -> Vec<String> {
    std::iter::from_fn(|| queue.get().map(|got| got.text())).collect()
}

/// A file with this content.
fn file(name: &str, content: &[u8]) -> PathBuf {
    let path = temp_folder("publish").join(name);
    std::fs::write(&path, content).unwrap();
    path
}

/// Standard input that the test writes to while the program runs.
mod feed {
    use std::{
        fs::{File, OpenOptions},
        io::Write,
        process::Command,
    };
    use testbed::{Program, Running, owner::temp_folder};

    pub struct Fifo {
        writer: File,
    }

    impl Fifo {
        /// Starts the program with a pipe as its standard input.
        #[track_caller]
        pub fn feed(name: &str, program: Program) -> (Self, Running) {
            let path = temp_folder(name).join("fifo");
            assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
            let script = format!("exec \"$0\" \"$@\" < '{}'", path.display());
            let running = program.through(["sh", "-c", &script]).spawn();
            // This waits until the program has opened the other end.
            let writer = OpenOptions::new().write(true).open(&path).unwrap();
            (Self { writer }, running)
        }

        #[track_caller]
        pub fn write(&mut self, text: &str) {
            self.writer.write_all(text.as_bytes()).unwrap();
        }
    }
}

/// A broker for the tests in this file, one at a time. It takes messages of up to 64 KiB.
fn own_broker() -> MutexGuard<'static, Broker> {
    static OWN: OnceLock<Mutex<Broker>> = OnceLock::new();
    OWN.get_or_init(|| Mutex::new(Broker::with_config("max_message_size = 65536")))
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
}

fn says_confirmed(ended: &Finished, count: &str) {
    ended.assert_status(0).assert_stderr(count);
    assert!(ended.stdout.is_empty(), "{}", ended.stdout_text());
}

#[test]
fn every_argument_is_a_message_that_survives_a_restart_and_they_stay_in_order() {
    for kind in QueueKind::ALL {
        let queue = Broker::shared().declare("fruits").kind(kind).create();
        let fruits = ["apple", "banana", "cherry", "date", "fig", "grape", "lemon", "melon"];
        let ended = to(&queue).args(fruits).run();
        says_confirmed(&ended, "8 messages confirmed");
        queue.wait_ready(8);
        let first = queue.get().unwrap();
        assert_eq!(*first.properties.delivery_mode(), Some(2));
        assert_eq!((first.text().as_str(), first.exchange.as_str()), ("apple", ""));
        assert_eq!(drain(&queue), fruits[1..]);
    }
}

#[test]
fn the_documented_line_of_amqp_publish_runs_with_another_name() {
    let queue = Broker::shared().queue("foo");
    let url = format!("--url={}", Broker::shared().url());
    // qpublish --url=$BROKER_URL -r foo -p -b Hello
    let line = qpublish().args([&url, "-r", queue.name(), "-p", "-b", "Hello"]);
    says_confirmed(&line.run(), "1 message confirmed");
    assert_eq!(drain(&queue), ["Hello"]);
    // --routing-key takes precedence over the variable QUEUE.
    let line = qpublish().args([&url, "-r", queue.name(), "-b", "-1"]);
    says_confirmed(&line.queue("another").run(), "1 message confirmed");
    assert_eq!(drain(&queue), ["-1"]);
}

#[test]
fn without_arguments_all_of_standard_input_is_one_message_byte_for_byte() {
    let queue = Broker::shared().queue("stdin");
    for body in [&b"two\nlines\n"[..], b"\0\xff\0", b""] {
        says_confirmed(&to(&queue).stdin(body).run(), "1 message confirmed");
        assert_eq!(queue.wait_get().data, body);
    }
}

#[test]
fn a_body_may_be_empty_or_begin_with_a_dash() {
    let queue = Broker::shared().queue("body");
    for body in ["", "-x", "--lines"] {
        says_confirmed(&to(&queue).args(["-b", body]).run(), "1 message confirmed");
        assert_eq!(queue.wait_get().text(), body);
    }
    says_confirmed(&to(&queue).args(["--", "-x", ""]).run(), "2 messages confirmed");
    assert_eq!(drain(&queue), ["-x", ""]);
}

#[test]
fn every_line_is_a_message_the_empty_ones_and_an_unfinished_last_one_too() {
    let queue = Broker::shared().queue("lines");
    for option in ["-l", "--lines", "--line-buffered"] {
        let ended = to(&queue).arg(option).stdin("a\n\n b \r\nlast").run();
        says_confirmed(&ended, "4 messages confirmed");
        assert_eq!(drain(&queue), ["a", "", " b \r", "last"]);
    }
    says_confirmed(&to(&queue).arg("-l").run(), "0 messages confirmed");
}

#[test]
fn every_part_that_ends_with_nul_is_a_message() {
    let queue = Broker::shared().queue("null");
    for option in ["-0", "--null"] {
        let ended = to(&queue).arg(option).stdin("a\nb\0\0c").run();
        says_confirmed(&ended, "3 messages confirmed");
        assert_eq!(drain(&queue), ["a\nb", "", "c"]);
    }
}

#[test]
fn every_file_is_a_message() {
    let queue = Broker::shared().queue("files");
    let one = file("one", b"1\n");
    let two = file("two", &[0, 255]);
    let ended = to(&queue).arg("-f").args([&one, &two]).arg("-").stdin("3\n").run();
    says_confirmed(&ended, "3 messages confirmed");
    assert_eq!(queue.wait_get().data, b"1\n");
    assert_eq!(queue.wait_get().data, [0, 255]);
    assert_eq!(queue.wait_get().data, b"3\n");
}

#[test]
fn a_file_that_cannot_be_read_is_found_out_before_anything_is_published() {
    let queue = Broker::shared().queue("unreadable");
    let good = file("good", b"good");
    for bad in ["/nonexistent", "/tmp"] {
        let ended = to(&queue).arg("-f").arg(&good).arg(bad).run();
        ended.assert_status(66).assert_stderr(bad);
    }
    assert_eq!(queue.ready(), 0);
}

#[test]
fn standard_input_that_cannot_be_read_is_not_an_empty_one() {
    let queue = Broker::shared().queue("write-only");
    // nohup(1) leaves standard input like this.
    for option in ["--lines", "--null", "--file=-"] {
        let ended = to(&queue).arg(option).through(["sh", "-c", "exec \"$0\" \"$@\" 0>/dev/null"]).run();
        ended.assert_status(66).assert_stderr("can't be read: Bad file descriptor");
    }
    assert_eq!(queue.ready(), 0);
}

#[test]
fn a_line_is_published_as_soon_as_it_is_there_and_a_signal_ends_the_wait_for_more() {
    let queue = Broker::shared().queue("endless");
    for (signal, status) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130)] {
        let log = file(&format!("termination-{status}"), b"");
        let line = to(&queue).arg("-l").arg("--termination-log").arg(&log);
        let (mut input, running) = Fifo::feed(&format!("endless-{status}"), line);
        input.write("first\n");
        queue.wait_ready(1);
        input.write("second\nunfinished");
        queue.wait_ready(2);
        running.signal(signal);
        let ended = running.wait(PATIENCE);
        ended
            .assert_status(status)
            .assert_stderr("2 of 2 messages sent, 2 from the start without a gap")
            .assert_stderr("begin with line 3");
        let message = std::fs::read_to_string(&log).unwrap();
        assert!(
            message.starts_with("stopped by SIG")
                && message.ends_with(&format!(" (status={status} source=qpublish)\n")),
            "{message:?}"
        );
        assert_eq!(drain(&queue), ["first", "second"]);
    }
}

#[test]
fn a_queue_is_declared_durable_and_of_the_type_that_is_asked_for() {
    let broker = Broker::shared();
    for (option, other) in [
        ("--declare=quorum", "--declare=classic"),
        ("--declare=classic", "--declare=quorum"),
        ("--declare", "--declare=quorum"),
    ] {
        let queue = broker.declare("declared").absent();
        // The word after the option is a message, not the option's value.
        says_confirmed(&to(&queue).args([option, "apple"]).run(), "1 message confirmed");
        says_confirmed(&to(&queue).args([option, "banana"]).run(), "1 message confirmed");
        let ended = to(&queue).args([other, "cherry"]).run();
        ended.assert_status(78).assert_stderr("is another kind of queue").assert_stderr("without --declare");
        queue.wait_ready(2);
        assert_eq!(drain(&queue), ["apple", "banana"]);
    }
}

#[test]
fn with_no_message_it_only_declares_and_leaves_standard_input_alone() {
    let queue = Broker::shared().declare("only-declared").absent();
    let line = qpublish().url(&Broker::shared().url());
    // It doesn't read its input, which never ends, as amqp-declare-queue -q foo -d doesn't.
    let (_input, running) = Fifo::feed("declare", line.args(["--declare", "-q", queue.name()]));
    let ended = running.wait(PATIENCE);
    ended.assert_status(0).assert_stderr("nothing is published");
    assert!(queue.exists());
    assert_eq!(queue.ready(), 0);
    let ended = to(&queue).args(["--declare", "-l"]).run();
    says_confirmed(&ended, "0 messages confirmed");
    // If an option says where messages come from, they are read.
    let ended = to(&queue).args(["--declare", "-l"]).stdin("a\nb\n").run();
    says_confirmed(&ended, "2 messages confirmed");
}

#[test]
fn the_properties_are_those_that_were_asked_for() {
    let queue = Broker::shared().queue("properties");
    let ended = to(&queue)
        .args(["-p", "-C", "text/plain", "-E", "gzip", "-t", "answers"])
        .args(["-H", "one:  1 ", "-H", "x:y:z", "--header", "empty:"])
        .args(["--message-id", "m1", "--correlation-id", "c1"])
        .args(["--type", "task", "--app-id", "tests", "--expiration", "600000"])
        .args(["--priority", "7", "-b", "body"])
        .run();
    says_confirmed(&ended, "1 message confirmed");
    let got = queue.wait_get();
    let text = |value: &Option<testbed::types::ShortString>| value.clone().map(|value| value.to_string());
    let properties = &got.properties;
    for (value, expected) in [
        (properties.content_type(), "text/plain"),
        (properties.content_encoding(), "gzip"),
        (properties.reply_to(), "answers"),
        (properties.message_id(), "m1"),
        (properties.correlation_id(), "c1"),
        (properties.kind(), "task"),
        (properties.app_id(), "tests"),
        (properties.expiration(), "600000"),
    ] {
        assert_eq!(text(value).as_deref(), Some(expected));
    }
    assert_eq!(*properties.priority(), Some(7));
    for (name, expected) in [("one", "1 "), ("x", "y:z"), ("empty", "")] {
        let Some(AMQPValue::LongString(value)) = got.header(name) else {
            panic!("header {name}: {:?}", got.header(name));
        };
        assert_eq!(value.as_bytes(), expected.as_bytes());
    }
}

#[test]
fn a_message_that_no_queue_takes_is_an_error() {
    let queue = Broker::shared().declare("nowhere").absent();
    let ended = to(&queue).args(["a", "b", "c"]).run();
    ended
        .assert_status(78)
        .assert_stderr("error: message 1 ")
        .assert_stderr("was returned")
        .assert_stderr(&format!("there is no queue {:?}", queue.name()))
        .assert_stderr("confirmed: 0 of ");
    let line = || qpublish().url(&Broker::shared().url());
    let ended = line().args(["-e", "amq.direct", "-r", queue.name(), "-b", "x"]).run();
    ended
        .assert_status(78)
        .assert_stderr("message 1 was returned: no queue is bound to exchange \"amq.direct\"")
        .assert_stderr("confirmed: 0 of 1 message sent, 0 from the start without a gap")
        .assert_stderr("begin with message 1");
    let ended = line().args(["-e", "no such", "-r", "x", "-b", "x"]).run();
    ended.assert_status(78).assert_stderr("there is no exchange \"no such\"");
}

#[test]
fn a_client_that_waits_with_direct_reply_to_gets_its_reply() {
    const REPLY_TO: &str = "amq.rabbitmq.reply-to";
    let broker = Broker::shared();
    let queue = broker.queue("rpc");
    let channel = broker.client().channel().unwrap();
    let no_ack = BasicConsumeOptions { no_ack: true, ..Default::default() };
    let replies = channel.basic_consume(REPLY_TO.into(), "".into(), no_ack, Default::default());
    let mut replies = block_on(replies).unwrap();
    let properties = BasicProperties::default().with_reply_to(REPLY_TO.into()).with_correlation_id("c1".into());
    let request = channel.basic_publish("".into(), queue.name().into(), Default::default(), b"lemon", properties);
    block_on(request).unwrap();
    let answer = format!(
        "echo \"$MESSAGE_REPLY_TO\"; tr a-z A-Z | '{}' -q \"$MESSAGE_REPLY_TO\" --correlation-id \"$MESSAGE_CORRELATION_ID\" -f -",
        qpublish_path().display()
    );
    let done = worker(&queue).shell(&answer).run();
    done.assert_status(0).assert_stderr("1 message confirmed");
    let reply = block_on(async { tokio::time::timeout(PATIENCE, replies.next()).await });
    let reply = reply.unwrap().unwrap().unwrap();
    assert_eq!(reply.data, b"LEMON");
    assert_eq!(reply.properties.correlation_id().as_ref().unwrap().as_str(), "c1");
    // If the client is gone, nobody wants the reply, so the request must not be processed again.
    block_on(channel.close(200, "".into())).unwrap();
    let late = to(&queue).args(["-q", done.stdout_text().trim(), "late"]).run();
    says_confirmed(&late, "1 message confirmed");
}

#[test]
fn without_mandatory_the_broker_may_drop_a_message_and_confirms_it() {
    let queue = Broker::shared().declare("nowhere").absent();
    let line = || qpublish().url(&Broker::shared().url()).args(["--no-mandatory", "-r", queue.name()]);
    says_confirmed(&line().args(["a", "b"]).run(), "2 messages confirmed");
    says_confirmed(&line().args(["-e", "amq.direct", "a"]).run(), "1 message confirmed");
    // The option is about routing: an exchange that doesn't exist is still an error.
    line().args(["-e", "no such", "a"]).run().assert_status(78).assert_stderr("there is no exchange \"no such\"");
}

#[test]
fn headers_larger_than_a_frame_are_refused_before_anything_is_sent() {
    let broker = Broker::shared();
    let queue = broker.queue("frame-max");
    let proxy = Proxy::of(broker);
    let line = |frame_max: &str| qpublish().url(&format!("{}{frame_max}", proxy.url())).queue(queue.name()).arg("x");
    let half = "h".repeat(70_000);
    let ended = line("").args(["-H", &format!("a: {half}"), "-H", &format!("b: {half}")]).run();
    ended.assert_status(78).assert_stderr("have 140021 bytes, and only 131052 fit into a frame of 131072 (frame_max)");
    // The limit is exact: in this frame there are 34 bytes besides the header's value.
    let header = |size: usize| format!("h:{}", "h".repeat(size));
    let largest = 8192 - 34;
    let ended = line("?frame_max=8192").args(["-H", &header(largest + 1)]).run();
    ended.assert_status(78).assert_stderr("frame_max");
    assert_eq!(proxy.count(Direction::ToBroker, Method::BASIC_PUBLISH), 0);
    let ended = line("?frame_max=8192").args(["-H", &header(largest)]).run();
    says_confirmed(&ended, "1 message confirmed");
}

#[test]
fn one_channel_is_enough() {
    // lapin frees a closed channel's number some time later, so a single run might succeed by chance.
    for _ in 0..10 {
        let queue = Broker::shared().declare("one-channel").absent();
        let url = format!("{}?channel_max=1", Broker::shared().url());
        let ended = to(&queue).url(&url).args(["--declare", "apple"]).run();
        says_confirmed(&ended, "1 message confirmed");
    }
}

#[test]
fn messages_before_the_queue_was_deleted_are_confirmed_and_the_first_one_after_it_is_named() {
    let queue = Broker::shared().queue("deleted");
    let (mut input, running) = Fifo::feed("deleted", to(&queue).arg("-l"));
    input.write("same\nsame\n");
    queue.wait_ready(2);
    queue.delete();
    input.write("same\nother\nsame\n");
    // It ends although its input doesn't.
    let ended = running.wait(PATIENCE);
    ended
        .assert_status(78)
        .assert_stderr("error: line 3 ")
        .assert_stderr("was returned")
        .assert_stderr("confirmed: 2 of ")
        .assert_stderr("2 from the start without a gap; to resume, begin with line 3");
}

#[test]
fn a_message_that_is_returned_alone_is_not_confirmed() {
    let broker = Broker::shared();
    let queue = broker.queue("alone");
    let proxy = Proxy::of(broker);
    let line = qpublish().url(&proxy.url()).queue(queue.name()).arg("-l");
    let (mut input, running) = Fifo::feed("alone", line);
    for n in 1..=2 {
        input.write("same\n");
        proxy.wait_for_nth(Direction::ToClient, Method::BASIC_ACK, n);
    }
    queue.delete();
    input.write("same\n");
    running
        .wait(PATIENCE)
        .assert_status(78)
        .assert_stderr("line 3 was returned")
        .assert_stderr("confirmed: 2 of 3 messages sent, 2 from the start without a gap")
        .assert_stderr("begin with line 3");
}

#[test]
fn where_to_resume_is_right_with_many_in_flight() {
    let broker = Broker::shared();
    let queue = broker.queue("unbound");
    let name = || queue.name().into();
    let channel = broker.client().channel().unwrap();
    let bound = channel.queue_bind(name(), "amq.direct".into(), name(), Default::default(), Default::default());
    testbed::block_on(bound).unwrap();
    let running = qpublish()
        .url(&broker.url())
        .args(["-l", "-e", "amq.direct", "-r", queue.name()])
        .through(["sh", "-c", "seq 100000000 | \"$0\" \"$@\""])
        .spawn();
    let deadline = Instant::now() + PATIENCE;
    while queue.ready() < 3000 {
        assert!(Instant::now() < deadline, "{}", running.stderr());
    }
    let unbound = channel.queue_unbind(name(), "amq.direct".into(), name(), Default::default());
    testbed::block_on(unbound).unwrap();
    let ended = running.wait(PATIENCE);
    // The queue has all lines up to one, and no other.
    let there = queue.ready();
    ended.assert_status(78).assert_stderr(&format!("confirmed: {there} of "));
    let number_before = |words: &str| -> u32 {
        let before = ended.stderr.split(words).next().unwrap();
        let digits = before.rsplit(' ').next().unwrap();
        digits.parse().unwrap_or_else(|_| panic!("{}", ended.stderr))
    };
    // The number is never too high, and too low only by what was in flight.
    let safe = number_before(" from the start without a gap");
    assert!((there.saturating_sub(4096)..=there).contains(&safe), "{safe} of {there}");
    ended.assert_stderr(&format!("begin with line {}", safe + 1));
    queue.purge();
}

#[test]
fn the_first_message_that_a_full_queue_refuses_is_named() {
    let queue = Broker::shared()
        .declare("full")
        .arg("x-max-length", 3)
        .arg("x-overflow", LongString::from("reject-publish"))
        .create();
    let ended = to(&queue).arg("-l").stdin("1\n2\n3\n4\n5\n6\n").run();
    ended.assert_status(75).assert_stderr("was refused: the queue is full");
    // The queue may take more than its limit; the figures have to be right all the same.
    let there = drain(&queue);
    let count = there.len();
    assert!((3..6).contains(&count), "{there:?}");
    let first = (1..=6).find(|line| !there.contains(&line.to_string())).unwrap();
    ended.assert_stderr(&format!("line {first} was refused"));
    // qpublish stops when the refusal arrives, which may be before it has sent the last line.
    let figures = |sent| {
        let before = first - 1;
        format!("confirmed: {count} of {sent} messages sent, {before} from the start")
    };
    let said = (first..=6).any(|sent| ended.stderr.contains(&figures(sent)));
    assert!(said, "{}", ended.stderr);
}

#[test]
fn a_connection_that_is_lost_midway_ends_the_run_with_the_number_confirmed() {
    let broker = Broker::shared();
    let queue = broker.queue("lost");
    let proxy = Proxy::of(broker);
    let line = qpublish().url(&proxy.url()).queue(queue.name()).arg("-l");
    let (mut input, running) = Fifo::feed("lost", line);
    for n in 1..=2 {
        input.write(&format!("{n}\n"));
        proxy.wait_for_nth(Direction::ToClient, Method::BASIC_ACK, n);
    }
    // The loss is noticed at once, even if nothing is in flight.
    input.write("3\n");
    queue.wait_ready(3);
    proxy.cut();
    let ended = running.wait(PATIENCE);
    ended.assert_status(75).assert_stderr("from the start without a gap");
    let confirmed =
        ["2", "3"].into_iter().find(|n| ended.stderr.contains(&format!("confirmed: {n} of 3 messages sent, {n} from")));
    assert!(confirmed.is_some(), "{}", ended.stderr);
}

#[test]
fn a_message_without_a_confirm_is_not_confirmed() {
    let broker = Broker::shared();
    let queue = broker.queue("unanswered");
    let proxy = Proxy::of(broker);
    proxy.on(Direction::ToClient, Method::BASIC_ACK, Action::SwallowFrame);
    let line = || qpublish().url(&proxy.url()).queue(queue.name());
    let ended = line().args(["--timeout", SOON, "a", "b"]).run();
    ended
        .assert_status(75)
        .assert_stderr("gave up after 5s (--timeout): the broker has confirmed nothing")
        .assert_stderr("confirmed: 0 of 2 messages sent, 0 from the start without a gap")
        .assert_stderr("may have arrived or not");
    // After a signal it waits for the confirms for a short time only.
    let running = line().arg("a").spawn();
    proxy.wait_for_nth(Direction::ToBroker, Method::BASIC_PUBLISH, 3);
    running.signal(Signal::SIGTERM);
    let ended = running.wait(PATIENCE);
    ended.assert_status(143).assert_stderr("confirmed: 0 of 1 message sent");
    // Now the confirms arrive, one for both messages or one for each.
    proxy.clear_rules();
    says_confirmed(&line().args(["a", "b"]).run(), "2 messages confirmed");
}

#[test]
fn no_more_is_read_than_the_window_holds() {
    let broker = Broker::shared();
    let queue = broker.queue("window");
    let proxy = Proxy::of(broker);
    proxy.on(Direction::ToClient, Method::BASIC_ACK, Action::SwallowFrame);
    // If headers did not count, 2,048 messages with the large one would take more than 200 MB.
    for (header, messages) in [(1, 2048), (100_000, 167)] {
        let ended = qpublish()
            .url(&proxy.url())
            .queue(queue.name())
            // This time starts with the first message, and the whole window has to be sent within it.
            .args(["-l", "--timeout", "10s", "-H", &format!("h: {}", "h".repeat(header))])
            .through(["sh", "-c", "yes | \"$0\" \"$@\""])
            .run();
        ended.assert_status(75).assert_stderr(&format!("confirmed: 0 of {messages} messages sent"));
    }
}

#[test]
fn if_the_channel_gets_no_reply_the_connection_is_closed_in_order() {
    let queue = Broker::shared().queue("unready");
    let proxy = Proxy::of(Broker::shared());
    proxy.on(Direction::ToClient, Method::CONFIRM_SELECT_OK, Action::SwallowFrame);
    for (number, (options, what)) in
        (1..).zip([(&[][..], ""), (&["--declare"], &format!(", or declare queue {:?},", queue.name()))])
    {
        let line = qpublish().url(&proxy.url()).queue(queue.name()).args(options);
        let ended = line.args(["--timeout", "1s", "orange"]).run();
        let says = format!("the broker didn't open a channel for publishing{what} within 1s (--timeout)");
        ended.assert_status(69).assert_stderr(&says);
        assert_eq!(proxy.count(Direction::ToBroker, Method::CONNECTION_CLOSE), number);
    }
}

#[test]
fn twenty_thousand_lines_arrive_complete_and_in_order() {
    let queue = Broker::shared().queue("many");
    let lines: String = (0..20_000).map(|n| format!("line {n}\n")).collect();
    let ended = to(&queue).arg("-l").stdin(lines).spawn().wait(2 * PATIENCE);
    says_confirmed(&ended, "20000 messages confirmed");
    queue.wait_ready(20_000);
    for n in 0..100 {
        assert_eq!(queue.wait_get().text(), format!("line {n}"));
    }
    queue.purge();
}

#[test]
fn while_the_broker_blocks_publishers_it_says_so_and_gives_up_after_the_timeout() {
    let broker = own_broker();
    let queue = broker.queue("blocked");
    let line = || qpublish().url(&broker.url()).queue(queue.name());
    let (mut input, patient) = Fifo::feed("blocked", line().arg("-l"));
    input.write("1\n");
    queue.wait_ready(1);
    broker.ctl(&["set_vm_memory_high_watermark", "absolute", "1"]).unwrap();
    let ended = line().args(["--timeout", SOON, "a", "b", "c"]).run();
    ended
        .assert_status(75)
        .assert_stderr("warning: the broker blocks publishers: low on memory; giving up if it confirms nothing for 5s")
        .assert_stderr("gave up after 5s (--timeout): the broker blocks publishers: low on memory")
        .assert_stderr("from the start without a gap");
    // The other one, with a longer timeout, goes on when the broker does.
    input.write("2\n3\n");
    patient.wait_for_stderr("the broker blocks publishers", PATIENCE);
    assert!(!patient.has_ended());
    broker.ctl(&["set_vm_memory_high_watermark", "0.9"]).unwrap();
    patient.wait_for_stderr("the broker takes messages again", PATIENCE);
    drop(input);
    let ended = patient.wait(PATIENCE);
    says_confirmed(&ended, "3 messages confirmed");
}

#[test]
fn a_message_larger_than_the_broker_takes_is_named() {
    let broker = own_broker();
    let queue = broker.queue("large");
    let files = [file("small", b"small"), file("large", &vec![b'x'; 65_537]), file("next", b"next")];
    let ended = qpublish().url(&broker.url()).queue(queue.name()).arg("-f").args(&files).run();
    ended
        .assert_status(78)
        .assert_stderr(&format!("file {:?}: the message is too large for this broker", files[1]))
        .assert_stderr("max_message_size");
    assert_eq!(drain(&queue), ["small"]);
}

#[test]
fn a_missing_permission_and_a_refused_login_have_their_own_status() {
    let broker = own_broker();
    let queue = broker.queue("forbidden");
    let user = User::new(&broker, "reader", "secret-word").may(["", "", ".*"]);
    let url = user.url("/");
    let line = || qpublish().url(&url).queue(queue.name());
    let ended = line().arg("x").run();
    ended.assert_status(77).assert_stderr("publish here");
    let ended = line().args(["--declare", "-q", "other", "x"]).run();
    ended.assert_status(77).assert_stderr("declare queue \"other\"");
    let ended = line().url(&broker.url_for("reader", "wrong-word", "/")).arg("x").run();
    ended.assert_status(77);
    assert!(!ended.stderr.contains("-word"), "{}", ended.stderr);
    assert_eq!(queue.ready(), 0);
}

#[test]
fn a_broker_that_is_not_there_is_no_success_and_the_wait_for_it_can_be_ended() {
    let nobody = testbed::reserve_port().unwrap();
    let url = format!("amqp://127.0.0.1:{}", nobody.number());
    let line = qpublish().url(&url).queue("q");
    line.args(["--connect-timeout", "1s", "x"]).run().assert_status(69);
    let silent = Proxy::silent();
    let running = qpublish().url(&silent.url()).queue("q").arg("x").spawn();
    silent.wait_accepted(1);
    running.signal(Signal::SIGTERM);
    let ended = running.wait(PATIENCE);
    ended.assert_status(143).assert_stderr("stopped by SIGTERM; nothing was published");
}

#[test]
fn options_that_contradict_each_other_are_usage_errors() {
    let url = "amqp://127.0.0.1:1";
    for (arguments, what) in [
        (&["x"][..], "nowhere to publish to"),
        (&["-q", "", "x"], "name is empty"),
        (&["--declare", "-r", "k", "x"], "--declare"),
        (&["-q", "a", "-r", "b", "x"], "leave one out"),
        (&["-q", "a", "-l", "x"], "cannot be used with"),
        (&["-q", "a", "-l", "-b", "x"], "cannot be used with"),
        (&["-q", "a", "-0", "-l"], "cannot be used with"),
        (&["-q", "a", "-f", "x", "-b", "y"], "cannot be used with"),
        (&["-q", "a", "-H", "none", "x"], "no colon"),
        (&["-q", "a", "-H", ": value", "x"], "no name"),
        (&["-q", "a", "-H", "n:1", "-H", "n:2", "x"], "given twice"),
        (&["-q", "a", "--timeout", "0", "x"], "more than 0"),
        (&["-q", "a", "--expiration", "10s", "x"], "--expiration"),
        (&["-q", "a", "--declare=stream", "x"], "stream"),
    ] {
        let ended = qpublish().url(url).args(arguments).run();
        ended.assert_status(64).assert_stderr("qpublish: ").assert_stderr(what);
    }
    let ended = qpublish().url(url).args(["-q", &"n".repeat(256), "x"]).run();
    ended.assert_status(64).assert_stderr("AMQP allows 255");
    let ended = qpublish().url(url).args(["-q", "a", "-H", &format!("{}: v", "n".repeat(256)), "x"]).run();
    ended.assert_status(64).assert_stderr("AMQP allows 255");
    qpublish().args(["-q", "a", "x"]).run().assert_status(64).assert_stderr("BROKER_URL");
}

#[test]
fn a_byte_order_mark_is_no_part_of_the_first_line() {
    let queue = Broker::shared().queue("mark");
    let lines = "\u{feff}apple\n\u{feff}banana\n".to_owned();
    let ended = to(&queue).arg("--lines").stdin(lines).run();
    says_confirmed(&ended, "2 messages confirmed");
    ended.assert_stderr("begins with a byte order mark");
    assert_eq!(queue.wait_get().text(), "apple");
    assert_eq!(queue.wait_get().text(), "\u{feff}banana");
}

#[test]
fn a_terminal_shows_how_many_of_how_many_or_how_much() {
    let broker = Broker::shared();
    let queue = broker.queue("progress");
    let lines = file("lines", b"apple\nbanana\n");
    let qpublish = qpublish_path();
    let qpublish = qpublish.to_str().unwrap();
    for (script, shows) in [
        ("exec \"$1\" apple banana", "0 of 2 messages confirmed, 0/s"),
        ("exec \"$1\" -f \"$0\" \"$0\"", "0 of 2 messages confirmed, 0/s"),
        ("exec \"$1\" --lines <\"$0\"", "0 messages confirmed, 0/s, 0 of 1 KiB"),
        ("cat \"$0\" | \"$1\" --lines", "0 messages confirmed, 0/s"),
    ] {
        let proxy = Proxy::of(broker);
        proxy.on(Direction::ToClient, Method::BASIC_ACK, Action::Hold);
        let words = ["sh", "-c", script, lines.to_str().unwrap(), qpublish];
        let mut terminal = Terminal::start(&words, &[("BROKER_URL", &proxy.url()), ("QUEUE", queue.name())]);
        // Each progress line overwrites the one before.
        terminal.wait_for(&format!("\r\x1b[Kqpublish: {shows}\r\x1b[Kqpublish: {shows}"));
        proxy.clear_rules();
        proxy.release();
        // A log line overwrites it, too.
        let progress = terminal.wait_for("\r\x1b[Kqpublish: 2 messages confirmed\r\n");
        assert!(!progress.contains('\n'), "{progress:?}");
        assert_eq!(terminal.wait_end().code(), Some(0));
    }
}

#[test]
fn a_long_run_says_how_far_it_is() {
    let queue = Broker::shared().queue("long");
    let (mut input, running) = Fifo::feed("long", to(&queue).arg("--lines"));
    input.write("1\n2\n");
    running.wait_for_stderr("still publishing, for ", PATIENCE);
    // The time between these words is 10s, or a little more on a busy machine.
    running.wait_for_stderr(" now: 2 messages confirmed", PATIENCE);
    drop(input);
    let ended = running.wait(PATIENCE);
    says_confirmed(&ended, "2 messages confirmed");
    assert!(!ended.stderr.contains('\r'), "{:?}", ended.stderr);
}

/// basic.ack or basic.nack of every message up to this one.
fn up_to(request: &Request, method: Method) -> Vec<u8> {
    frames::method_frame(request.channel, method, &[&request.nth.to_be_bytes()[..], &[1]].concat())
}

/// Publishes five lines to a peer that answers only the fifth message, with what `script` returns.
fn after_five(script: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Finished {
    let peer = Peer::new(move |request| match (request.method, request.nth) {
        (Method::BODY, 5) => script(request),
        (Method::BODY, _) => Answer::Bytes(Vec::new()),
        _ => Answer::Usual,
    });
    qpublish().url(&peer.url()).args(["-q", "x", "--lines"]).stdin("1\n2\n3\n4\n5\n").run()
}

#[test]
fn one_ack_confirms_several_messages() {
    let ended = after_five(|fifth| Answer::Bytes(up_to(fifth, Method::BASIC_ACK)));
    says_confirmed(&ended, "5 messages confirmed");
}

#[test]
fn one_nack_refuses_several_messages() {
    let ended = after_five(|fifth| {
        let (second, fourth) = (Request { nth: 2, ..fifth.clone() }, Request { nth: 4, ..fifth.clone() });
        let (first_two, next_two) = (up_to(&second, Method::BASIC_ACK), up_to(&fourth, Method::BASIC_NACK));
        Answer::Bytes([first_two, next_two, peer::settle(fifth, Method::BASIC_ACK)].concat())
    });
    ended
        .assert_status(75)
        .assert_stderr("error: line 3 was refused")
        .assert_stderr("confirmed: 3 of 5 messages sent, 2 from the start without a gap; to resume, begin with line 3");
}

#[test]
fn a_return_among_several_messages_says_among_which() {
    let ended = after_five(|fifth| {
        let second = Request { nth: 2, ..fifth.clone() };
        let (first_two, rest) = (up_to(&second, Method::BASIC_ACK), up_to(fifth, Method::BASIC_ACK));
        Answer::Bytes([first_two, peer::returned(fifth.channel), rest].concat())
    });
    // No confirm had arrived when the last one was sent, so the return may belong to any of the five.
    ended
        .assert_status(78)
        .assert_stderr("error: line 1 or a later one, up to line 5, was returned")
        .assert_stderr("confirmed: 4 of 5 messages sent, 0 from the start without a gap; to resume, begin with line 1");
}

#[test]
fn a_connection_lost_with_messages_in_flight_says_how_many_are_confirmed_and_where_to_go_on() {
    let ended = after_five(|fifth| Answer::Last(up_to(&Request { nth: 2, ..fifth.clone() }, Method::BASIC_ACK)));
    ended.assert_status(75).assert_stderr(
        "confirmed: 2 of 5 messages sent, 2 from the start without a gap; to resume, begin with line 3; \
         what was sent and not confirmed may have arrived or not",
    );
}
