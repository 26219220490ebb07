use super::*;

const SECOND: u64 = 1_000_000_000;

fn run(number: u64, end: End, at: u64, acknowledged: &[(u64, u64)]) -> Run {
    Run { number, started: 0, end, at, count: 1, acknowledged: acknowledged.to_vec(), heard: true, said: String::new() }
}

/// A run that exits with 0 after message 1.
fn success(number: u64, at: u64) -> Run {
    run(number, End::Exited(0), at, &[(1, at)])
}

fn books(confirmed: &[u64], runs: Vec<Run>, text: &str) -> Books {
    let mut books = Books {
        published: confirmed.len() as u64,
        confirmed: confirmed.iter().copied().collect(),
        runs,
        crash_window: CRASH_WINDOW,
        ..Books::default()
    };
    books.read(text).unwrap();
    books
}

fn crash(before: u64, after: u64) -> Crash {
    Crash { name: "killed", before, after }
}

#[test]
fn one_success_a_message_balances() {
    let books = books(
        &[1],
        vec![run(1, End::Exited(3), 20, &[]), success(2, 40)],
        "10 1 1 start 1\n30 2 1 start 2\n35 2 1 done 2\n",
    );
    let report = Report::of(&books);
    assert_eq!(report.failures, Vec::<String>::new());
    assert_eq!((report.gone, report.claims), (1, 1));
}

#[test]
fn a_message_is_not_acknowledged_twice() {
    let both = |crashes| {
        let mut books =
            books(&[1], vec![success(1, 16), success(2, 21)], "10 1 1 start\n12 2 1 start\n15 1 1 done\n20 2 1 done\n");
        books.crashes = crashes;
        Report::of(&books).failures
    };
    assert!(both(vec![])[0].starts_with("FALSE SUCCESS"));
    assert_eq!(both(vec![crash(16, 17)]), Vec::<String>::new());
}

#[test]
fn successes_that_a_lost_node_undoes_are_counted_and_limited() {
    let failures = |messages: u64, separates| {
        let confirmed: Vec<_> = (1..=messages).collect();
        let runs = confirmed.iter().flat_map(|message| {
            let end = End::Exited(0);
            [(0, 20), (100, 50)].map(|(more, at)| run(message + more, end, at, &[(*message, at)]))
        });
        let text: String = confirmed
            .iter()
            .map(|it| {
                let again = it + 100;
                format!("10 {it} {it} start\n15 {it} {it} done\n30 {again} {it} start\n40 {again} {it} done\n")
            })
            .collect();
        let mut books = books(&confirmed, runs.collect(), &text);
        books.windows = vec![Window { fault: "cut", from: 12, until: 18, separates }];
        Report::of(&books).failures
    };
    assert_eq!(failures(2, true), Vec::<String>::new());
    assert!(failures(3, true)[0].starts_with("too many messages were delivered again"));
    assert!(failures(1, false)[0].starts_with("FALSE SUCCESS"));
}

#[test]
fn a_crash_long_before_an_exit_0_excuses_nothing() {
    let mut books = books(
        &[1],
        vec![success(1, 30 * SECOND), success(2, 41 * SECOND)],
        &format!("1 1 1 start\n2 1 1 done\n{} 2 1 start\n{} 2 1 done\n", 31 * SECOND, 40 * SECOND),
    );
    books.crashes = vec![crash(3, 4)];
    assert!(Report::of(&books).failures[0].starts_with("FALSE SUCCESS"));
}

#[test]
fn a_message_that_nobody_has_done_is_lost() {
    let failed = books(&[1], vec![run(1, End::Exited(3), 20, &[])], "10 1 1 start 1\n");
    assert!(Report::of(&failed).failures[0].starts_with("LOST"));
    let never = books(&[1], vec![], "");
    assert!(Report::of(&never).failures[0].starts_with("LOST"));
    let unknown = books(&[1], vec![run(1, End::Exited(75), 20, &[])], "10 1 1 start 1\n15 1 1 done 1\n");
    assert_eq!(Report::of(&unknown).failures, Vec::<String>::new());
    assert_eq!(Report::of(&unknown).unknown_but_gone, 1);
}

#[test]
fn an_exit_0_whose_message_is_delivered_again_is_false_unless_the_broker_crashed() {
    let mut twice = books(
        &[1],
        vec![success(1, 20), success(2, 40)],
        "10 1 1 start 1\n15 1 1 done 1\n30 2 1 start 2\n35 2 1 done 2\n",
    );
    assert!(Report::of(&twice).failures[0].starts_with("FALSE"));
    twice.crashes = vec![crash(25, 27)];
    assert_eq!(Report::of(&twice).failures, Vec::<String>::new());
    assert_eq!(Report::of(&twice).excused.len(), 1);
    twice.crashes = vec![crash(20 + 2 * SECOND, 21 + 2 * SECOND)];
    assert!(Report::of(&twice).failures[0].starts_with("FALSE"));
}

#[test]
fn a_late_delivery_on_a_dead_connection_is_no_failure() {
    let books = books(
        &[1],
        vec![success(1, 20), run(2, End::Exited(75), 40, &[])],
        "10 1 1 start 2\n15 1 1 done 2\n30 2 1 start 1\n",
    );
    let report = Report::of(&books);
    assert_eq!(report.failures, Vec::<String>::new());
    assert_eq!(report.late, 1);
}

#[test]
fn more_messages_than_were_published_are_a_failure() {
    let mut books = books(&[1], vec![], "");
    books.left = 2;
    let failures = Report::of(&books).failures;
    assert_eq!(failures[0], "2 messages are still there, of 1");
}

#[test]
fn an_exit_0_without_a_successful_command_is_false() {
    let books = books(
        &[1],
        vec![run(1, End::Exited(0), 20, &[]), success(2, 40)],
        "10 1 1 start 1\n30 2 1 start 2\n35 2 1 done 2\n",
    );
    assert_eq!(Report::of(&books).failures.len(), 1);
}
