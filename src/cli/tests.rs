//! What depends on the environment is tested with the binary: here all threads share it.

use super::*;
use crate::{command::OnLost, verdict::Statuses};

/// Parses these words after flags for an address and a queue, which take precedence over the environment.
fn parsed(words: &[&str]) -> Result<QconsumeOptions, Failure> {
    let given = ["qconsume", "--url", "amqp://127.0.0.1", "--queue", "q"];
    let words = given.iter().chain(words).map(OsString::from);
    let words: Vec<_> = words.collect();
    parse::<QconsumeOptions>(&words).map(|request| match request {
        Request::Run(options) => *options,
        Request::Show(text) => panic!("it shows {text}"),
    })
}

#[track_caller]
fn options(words: &[&str]) -> QconsumeOptions {
    parsed(words).unwrap_or_else(|failure| panic!("{words:?}: {failure}"))
}

#[track_caller]
fn refused(words: &[&str], says: &str) {
    let failure = parsed(words).expect_err("accepted");
    assert_eq!(failure.exit, Exit::Usage, "{words:?}");
    assert!(failure.message.contains(says), "{words:?}: {failure}");
}

#[test]
fn durations_are_read_as_people_write_them() {
    for (text, milliseconds) in [
        ("500ms", 500),
        ("10s", 10_000),
        ("5m", 300_000),
        ("1h30m", 5_400_000),
        ("1h 30m", 5_400_000),
        ("90", 90_000),
        ("0", 0),
        ("0s", 0),
        ("0.25", 250),
        ("1.5", 1500),
        ("2d", 172_800_000),
        ("3650d", 315_360_000_000),
    ] {
        assert_eq!(duration(text), Ok(Duration::from_millis(milliseconds)), "{text}");
    }
    for text in [
        "",
        " ",
        "-1",
        "-1s",
        "soon",
        "1x",
        "s",
        "1,5",
        "10 s 5",
        "nan",
        "inf",
        "1e300",
        "0x10",
        "11y",
        "99999999999999999999s",
        "3651d",
    ] {
        assert!(duration(text).is_err(), "{text:?} is {:?}", duration(text));
    }
    assert!(duration_above_zero("0").is_err());
    assert!(duration_above_zero("0ms").is_err());
    assert_eq!(duration_above_zero("1ms"), Ok(Duration::from_millis(1)));
}

#[test]
fn lists_of_statuses_have_numbers_and_ranges() {
    let list = |ranges: &[(u8, u8)]| Ok(Statuses(ranges.iter().map(|(a, b)| *a..=*b).collect()));
    assert_eq!("65".parse(), list(&[(65, 65)]));
    assert_eq!("65,100-120".parse(), list(&[(65, 65), (100, 120)]));
    assert_eq!(" 1 , 2 - 255 ".parse(), list(&[(1, 1), (2, 255)]));
    assert_eq!("7-7".parse(), list(&[(7, 7)]));
    for text in ["", ",", "1,", "0", "0-5", "256", "-1", "5-", "9-3", "1-2-3", "a", "1;2"] {
        let parsed = text.parse::<Statuses>();
        assert!(parsed.is_err(), "{text:?} is {parsed:?}");
    }
}

#[test]
fn options_stop_at_the_first_word_that_is_none() {
    for (words, command) in [
        (&["head", "-c", "10"][..], &["head", "-c", "10"][..]),
        (&["--", "head", "-c", "10"], &["head", "-c", "10"]),
        (&["-w", "1s", "head", "-w", "2s"], &["head", "-w", "2s"]),
        (&["--wait=1s", "cat", "--help"], &["cat", "--help"]),
        (&["--", "--help"], &["--help"]),
        (&["--", "--", "x"], &["--", "x"]),
        (&["sh", "-c", "x", "--", "-q"], &["sh", "-c", "x", "--", "-q"]),
        (&["env", "--", "cat"], &["env", "--", "cat"]),
        (&["cat", "", "-"], &["cat", "", "-"]),
        (&["-"], &["-"]),
        (&["cat", "--url", "amqp://elsewhere"], &["cat", "--url", "amqp://elsewhere"]),
    ] {
        let options = options(words);
        assert_eq!(options.command, command, "{words:?}");
        assert_eq!(options.count(), Some(1), "{words:?}");
        assert_eq!(options.queue, "q");
    }
    refused(&[], "COMMAND");
    refused(&["--wait", "1s"], "COMMAND");
    refused(&["--"], "COMMAND");
}

#[test]
fn a_commands_words_need_not_be_utf_8() {
    use std::os::unix::ffi::OsStringExt;
    let odd = OsString::from_vec(b"\xff\xfe".to_vec());
    let words = ["qconsume", "-u", "amqp://h", "-q", "q", "cat"].map(OsString::from);
    let Ok(Request::Run(options)) =
        parse::<QconsumeOptions>(&words.into_iter().chain([odd.clone()]).collect::<Vec<_>>())
    else {
        panic!("refused");
    };
    assert_eq!(options.command, ["cat".into(), odd]);
}

#[test]
fn the_defaults_are_those_of_the_documentation() {
    let options = options(&["cat"]);
    assert_eq!(options.broker.connect_timeout, Duration::from_secs(60));
    assert_eq!(options.limits.kill_after, Duration::from_secs(10));
    assert_eq!(options.limits.timeout, None);
    assert_eq!(options.limits.grace, None);
    assert_eq!(options.limits.on_lost, OnLost::Terminate);
    assert_eq!(options.wait, None);
    assert_eq!(options.empty_exit_code, 66);
    assert_eq!(options.count(), Some(1));
    assert!(!options.drain);
    assert_eq!(options.policy.reject_exit_code, None);
}

#[test]
fn count_and_drain_say_how_many() {
    assert_eq!(options(&["-c", "5", "cat"]).count(), Some(5));
    assert_eq!(options(&["-c", "0", "cat"]).count(), None);
    assert_eq!(options(&["--drain", "cat"]).count(), None);
    assert_eq!(options(&["--drain", "-c", "5", "cat"]).count(), Some(5));
}

#[test]
fn a_slip_is_answered_with_what_was_meant() {
    refused(&["--waitt", "1s", "cat"], "'--wait'");
    refused(&["--connect-timeuot", "1s", "cat"], "'--connect-timeout'");
    refused(&["-z", "cat"], "'-z'");
    refused(&["--on-lost", "finnish", "cat"], "terminate, finish");
    refused(&["--wait", "-1s", "cat"], "-1");
    refused(&["--wait", "1s", "--wait", "2s", "cat"], "multiple times");
    refused(&["--max-attempts", "0", "cat"], "--max-attempts");
    refused(&["--queue", "again", "cat"], "multiple times");
}

#[test]
fn an_address_after_the_wrong_option_is_not_quoted() {
    let url = "amqp://user:hunter2@host";
    for option in ["--wait", "--count", "--on-lost", "--reject-on", "--log-level", "--heartbeat"] {
        let failure = parsed(&[option, url, "cat"]).expect_err(option);
        assert!(!failure.message.contains("hunter2"), "{failure}");
        assert!(failure.message.contains(option), "{failure}");
    }
}

#[test]
fn help_and_version_are_shown_and_are_no_run() {
    for word in ["--help", "-h", "--version", "-V"] {
        let request = parse::<QconsumeOptions>(&["qconsume", word].map(OsString::from));
        assert!(matches!(request, Ok(Request::Show(text)) if text.contains("qconsume")), "{word}");
    }
}
