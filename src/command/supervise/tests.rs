//! With injected signals, losses and ends. tokio's clock is paused, so the waits take no time.

use super::*;
use std::{
    cell::{Cell, RefCell},
    future::{pending, ready},
};
use tokio::{sync::mpsc, time::sleep_until};

const SECOND: Duration = Duration::from_secs(1);

struct Fake {
    ends_at: Option<(Instant, Ended)>,
    /// The signals that end it, and how long after each.
    dies_of: Vec<(Signal, Duration)>,
    /// How long a device holds it up after SIGKILL.
    held_up: Duration,
    sent: RefCell<Vec<(Target, Signal, Duration)>>,
    end_by_signal: RefCell<Option<(Instant, Ended)>>,
    shares_group: bool,
    left_behind: Cell<usize>,
    left_behind_until: Option<Instant>,
    kills_needed: Cell<usize>,
    killed_left_behind_at: RefCell<Vec<u64>>,
    started: Instant,
}

impl Fake {
    fn new(dies_of: &[(Signal, Duration)]) -> Self {
        Self {
            ends_at: None,
            dies_of: dies_of.to_vec(),
            held_up: Duration::ZERO,
            sent: RefCell::default(),
            end_by_signal: RefCell::default(),
            shares_group: false,
            left_behind: Cell::new(0),
            left_behind_until: None,
            kills_needed: Cell::new(1),
            killed_left_behind_at: RefCell::default(),
            started: Instant::now(),
        }
    }

    fn ending(mut self, after: Duration, ended: Ended) -> Self {
        self.ends_at = Some((self.started + after, ended));
        self
    }

    fn leaving(mut self, count: usize, until: u32) -> Self {
        self.left_behind = Cell::new(count);
        self.left_behind_until = Some(self.started + until * SECOND);
        self
    }

    /// What was sent, with the second. Leaves out the CONT of each request to stop.
    fn signals(&self) -> Vec<(Target, Signal, u64)> {
        self.sent
            .borrow()
            .iter()
            .filter(|(_, signal, _)| *signal != Signal::SIGCONT)
            .map(|(target, signal, at)| (*target, *signal, at.as_secs()))
            .collect()
    }
}

impl Process for Fake {
    async fn ended(&mut self) -> Ended {
        let end = [self.ends_at, *self.end_by_signal.borrow()].into_iter().flatten().min_by_key(|(at, _)| *at);
        match end {
            Some((at, ended)) => {
                sleep_until(at).await;
                ended
            }
            None => pending().await,
        }
    }

    fn shares_group(&self) -> bool {
        self.shares_group
    }

    fn count_left_behind(&self) -> usize {
        self.left_behind.get()
    }

    fn kill_left_behind(&self) -> bool {
        self.killed_left_behind_at.borrow_mut().push(self.started.elapsed().as_secs());
        self.kills_needed.set(self.kills_needed.get() - 1);
        if self.kills_needed.get() == 0 {
            self.left_behind.set(0);
        }
        true
    }

    async fn left_behind_ended(&mut self) {
        match self.left_behind_until {
            _ if self.left_behind.get() == 0 => {}
            Some(until) => sleep_until(until).await,
            None => pending().await,
        }
    }

    fn signal(&self, target: Target, signal: Signal) {
        self.sent.borrow_mut().push((target, signal, self.started.elapsed()));
        let delay = match signal {
            Signal::SIGKILL => Some(self.held_up),
            _ => self.dies_of.iter().find(|(s, _)| *s == signal).map(|(_, delay)| *delay),
        };
        if let Some(delay) = delay {
            self.end_by_signal.borrow_mut().get_or_insert((Instant::now() + delay, Ended::Killed(signal as i32)));
        }
    }
}

fn limits() -> Limits {
    Limits { timeout: None, kill_after: 10 * SECOND, grace: None, on_lost: OnLost::Terminate }
}

fn signals(at: &[(u64, Signal)]) -> Signals {
    signals_from(false, at)
}

fn signals_from(to_our_group: bool, at: &[(u64, Signal)]) -> Signals {
    let (sender, receiver) = mpsc::unbounded_channel();
    let at = at.to_vec();
    tokio::spawn(async move {
        let start = Instant::now();
        for (seconds, signal) in at {
            sleep_until(start + seconds as u32 * SECOND).await;
            let _ = sender.send(Received { signal, to_our_group });
        }
        pending::<()>().await;
    });
    Signals::injected(receiver)
}

async fn lost_after(seconds: u32) -> &'static str {
    tokio::time::sleep(seconds * SECOND).await;
    "the connection broke"
}

fn never() -> impl Future<Output = &'static str> {
    pending()
}

#[tokio::test(start_paused = true)]
async fn a_command_that_ends_by_itself_is_left_alone() {
    let mut process = Fake::new(&[]).ending(3600 * SECOND, Ended::Exited(3));
    let supervised = supervise(&mut process, &limits(), &mut signals(&[]), never()).await;
    assert_eq!(supervised, (Ended::Exited(3), None, None));
    assert_eq!(process.signals(), []);
}

#[tokio::test(start_paused = true)]
async fn a_signal_is_forwarded_and_without_grace_nothing_kills() {
    let mut process = Fake::new(&[(Signal::SIGTERM, 600 * SECOND)]);
    let mut signals = signals(&[(5, Signal::SIGTERM), (7, Signal::SIGINT)]);
    let (ended, stop, _) = supervise(&mut process, &limits(), &mut signals, never()).await;
    assert_eq!(stop, Some(StopReason::Signal(15)));
    assert_eq!(ended, Ended::Killed(15));
    assert_eq!(
        process.signals(),
        [(Target::CommandGroup, Signal::SIGTERM, 5), (Target::CommandGroup, Signal::SIGINT, 7)]
    );
}

#[tokio::test(start_paused = true)]
async fn a_signal_then_kill_after_grace() {
    let mut process = Fake::new(&[]);
    let limits = Limits { grace: Some(4 * SECOND), ..limits() };
    let (ended, stop, _) =
        supervise(&mut process, &limits, &mut signals(&[(5, Signal::SIGHUP), (8, Signal::SIGTERM)]), never()).await;
    assert_eq!(stop, Some(StopReason::Signal(1)));
    assert_eq!(ended, Ended::Killed(9));
    assert_eq!(
        process.signals(),
        [
            (Target::CommandGroup, Signal::SIGHUP, 5),
            (Target::CommandGroup, Signal::SIGTERM, 8),
            // The second signal doesn't lengthen the grace.
            (Target::CommandGroup, Signal::SIGKILL, 9)
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn the_user_signals_reach_the_command_alone_and_end_nothing() {
    let mut process = Fake::new(&[]).ending(9 * SECOND, Ended::Exited(0));
    let mut signals = signals(&[(1, Signal::SIGUSR1), (2, Signal::SIGWINCH)]);
    let (ended, stop, _) = supervise(&mut process, &limits(), &mut signals, never()).await;
    assert_eq!(stop, None);
    assert_eq!(ended, Ended::Exited(0));
    assert_eq!(process.signals(), [(Target::Command, Signal::SIGUSR1, 1), (Target::Command, Signal::SIGWINCH, 2)]);
}

#[tokio::test(start_paused = true)]
async fn the_time_limit_terminates_then_kills() {
    let mut process = Fake::new(&[]);
    let limits = Limits { timeout: Some(60 * SECOND), ..limits() };
    let (ended, stop, _) = supervise(&mut process, &limits, &mut signals(&[]), never()).await;
    assert_eq!(stop, Some(StopReason::TimeLimit));
    assert_eq!(ended, Ended::Killed(9));
    assert_eq!(
        process.signals(),
        [(Target::CommandGroup, Signal::SIGTERM, 60), (Target::CommandGroup, Signal::SIGKILL, 70)]
    );
}

#[tokio::test(start_paused = true)]
async fn the_first_of_signal_and_time_limit_counts() {
    for (signal_at, first) in [(59, StopReason::Signal(15)), (61, StopReason::TimeLimit)] {
        let mut process = Fake::new(&[(Signal::SIGTERM, 5 * SECOND)]);
        let limits = Limits { timeout: Some(60 * SECOND), ..limits() };
        let mut signals = signals(&[(signal_at, Signal::SIGTERM)]);
        let (_, stop, _) = supervise(&mut process, &limits, &mut signals, never()).await;
        assert_eq!(stop, Some(first));
    }
}

#[tokio::test(start_paused = true)]
async fn a_command_that_ends_at_the_very_limit_has_kept_it() {
    let mut process = Fake::new(&[]).ending(60 * SECOND, Ended::Exited(0));
    let limits = Limits { timeout: Some(60 * SECOND), ..limits() };
    let (_, stop, _) = supervise(&mut process, &limits, &mut signals(&[]), never()).await;
    assert_eq!(stop, None);
    assert_eq!(process.signals(), []);
}

#[tokio::test(start_paused = true)]
async fn a_lost_delivery_terminates_the_command_or_lets_it_finish() {
    for (on_lost, expected, sent) in [
        (
            OnLost::Terminate,
            Ended::Killed(9),
            vec![(Target::CommandGroup, Signal::SIGTERM, 5), (Target::CommandGroup, Signal::SIGKILL, 15)],
        ),
        (OnLost::Finish, Ended::Exited(0), vec![]),
    ] {
        let mut process = Fake::new(&[]).ending(100 * SECOND, Ended::Exited(0));
        let limits = Limits { on_lost, ..limits() };
        let (ended, _, lost) = supervise(&mut process, &limits, &mut signals(&[]), lost_after(5)).await;
        assert_eq!(lost, Some("the connection broke"));
        assert_eq!(ended, expected);
        assert_eq!(process.signals(), sent);
    }
}

#[tokio::test(start_paused = true)]
async fn a_loss_seen_in_the_same_moment_as_the_end_is_a_loss() {
    let mut process = Fake::new(&[]).ending(Duration::ZERO, Ended::Exited(0));
    let (_, _, lost) = supervise(&mut process, &limits(), &mut signals(&[]), ready("the channel was closed")).await;
    assert_eq!(lost, Some("the channel was closed"));
}

#[tokio::test(start_paused = true)]
async fn a_signal_seen_in_the_same_moment_as_the_end_is_an_eviction() {
    let mut process = Fake::new(&[]).ending(Duration::ZERO, Ended::Exited(3));
    let (sender, receiver) = mpsc::unbounded_channel();
    let received = Received { signal: Signal::SIGTERM, to_our_group: false };
    sender.send(received).unwrap();
    let (ended, stop, _) = supervise(&mut process, &limits(), &mut Signals::injected(receiver), never()).await;
    assert_eq!(stop, Some(StopReason::Signal(15)));
    assert_eq!(ended, Ended::Exited(3));
}

#[tokio::test(start_paused = true)]
async fn the_time_limit_ends_a_command_that_was_signalled_without_grace() {
    let mut process = Fake::new(&[]);
    let limits = Limits { timeout: Some(60 * SECOND), ..limits() };
    let mut signals = signals(&[(50, Signal::SIGTERM)]);
    let (_, stop, _) = supervise(&mut process, &limits, &mut signals, never()).await;
    assert_eq!(stop, Some(StopReason::Signal(15)));
    assert_eq!(
        process.signals(),
        [
            (Target::CommandGroup, Signal::SIGTERM, 50),
            (Target::CommandGroup, Signal::SIGTERM, 60),
            (Target::CommandGroup, Signal::SIGKILL, 70)
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn the_sooner_of_grace_and_kill_after_kills() {
    for (signal_at, grace, kill_after, killed_at) in
        [(50, 100, 3, 63), (50, 4, 100, 54), (62, 2, 100, 64), (62, 100, 5, 65)]
    {
        let mut process = Fake::new(&[]);
        let limits = Limits {
            timeout: Some(60 * SECOND),
            kill_after: kill_after * SECOND,
            grace: Some(grace * SECOND),
            ..limits()
        };
        let mut signals = signals(&[(signal_at, Signal::SIGTERM)]);
        let (ended, _, _) = supervise(&mut process, &limits, &mut signals, never()).await;
        assert_eq!(ended, Ended::Killed(9));
        let last = process.signals().pop();
        assert_eq!(last, Some((Target::CommandGroup, Signal::SIGKILL, killed_at)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_delivery_leaves_signals_and_the_time_limit_in_force() {
    for (signal_at, expected, last) in [
        (8, StopReason::Signal(15), (Target::CommandGroup, Signal::SIGKILL, 10)),
        (100, StopReason::TimeLimit, (Target::CommandGroup, Signal::SIGKILL, 70)),
    ] {
        let mut process = Fake::new(&[]);
        let limits =
            Limits { timeout: Some(60 * SECOND), grace: Some(2 * SECOND), on_lost: OnLost::Finish, ..limits() };
        let mut signals = signals(&[(signal_at, Signal::SIGTERM)]);
        let (_, stop, lost) = supervise(&mut process, &limits, &mut signals, lost_after(5)).await;
        assert_eq!(lost, Some("the connection broke"));
        assert_eq!(stop, Some(expected));
        assert_eq!(process.signals().pop(), Some(last));
    }
}

#[tokio::test(start_paused = true)]
async fn every_request_to_stop_wakes_a_stopped_command() {
    let mut process = Fake::new(&[]);
    let limits = Limits { timeout: Some(60 * SECOND), ..limits() };
    let mut signals = signals(&[(5, Signal::SIGINT), (6, Signal::SIGUSR1)]);
    supervise(&mut process, &limits, &mut signals, lost_after(7)).await;
    let woken: Vec<u64> = process
        .sent
        .borrow()
        .iter()
        .filter(|(_, signal, _)| *signal == Signal::SIGCONT)
        .map(|(_, _, at)| at.as_secs())
        .collect();
    // INT and the loss ask for an end, USR1 doesn't; KILL needs no CONT.
    assert_eq!(woken, [5, 7]);
}

#[tokio::test(start_paused = true)]
async fn a_command_that_does_not_stop_is_mentioned_at_growing_intervals() {
    let (said, _guard) = crate::report::tests::Said::listen();
    let mentions = || {
        let mut lines = said.lines();
        lines.retain(|line| line.contains("still runs"));
        lines
    };
    let mut process = Fake::new(&[]).ending(100 * SECOND, Ended::Exited(0));
    let mut stops = signals(&[(5, Signal::SIGTERM)]);
    supervise(&mut process, &limits(), &mut stops, pending::<&str>()).await;
    assert_eq!(
        mentions(),
        ["10s", "20s", "40s", "1m 20s"].map(|time| format!(
            "the command was told to stop {time} ago and still runs; without --grace it isn't killed"
        ))
    );
    let mut process = Fake::new(&[]);
    let limits = Limits { kill_after: 12 * SECOND, timeout: Some(SECOND), ..limits() };
    supervise(&mut process, &limits, &mut signals(&[]), pending::<&str>()).await;
    assert_eq!(mentions()[4..], ["the command was told to stop 10s ago and still runs; it is killed in 2s"]);
}

#[tokio::test(start_paused = true)]
async fn a_command_that_a_device_holds_up_is_mentioned_even_after_sigkill() {
    let (said, _guard) = crate::report::tests::Said::listen();
    let mut process = Fake::new(&[]);
    process.held_up = 30 * SECOND;
    let limits = Limits { timeout: Some(SECOND), ..limits() };
    let (ended, ..) = supervise(&mut process, &limits, &mut signals(&[]), never()).await;
    assert_eq!(ended, Ended::Killed(9));
    let mut mentions = said.lines();
    mentions.retain(|line| line.contains("still runs"));
    assert_eq!(
        mentions,
        ["10s", "20s"].map(|time| format!(
            "the command still runs {time} after SIGKILL; a device or a network file system may hold it up"
        ))
    );
}

#[tokio::test(start_paused = true)]
async fn what_a_success_leaves_may_finish_within_kill_after() {
    let (said, _guard) = crate::report::tests::Said::listen();
    for (until, limit, killed) in [(15, None, vec![]), (100, None, vec![20]), (100, Some(13), vec![13])] {
        let mut process = Fake::new(&[]).ending(10 * SECOND, Ended::Exited(0)).leaving(3, until);
        let limits = Limits { timeout: limit.map(|limit| limit * SECOND), ..limits() };
        let (ended, stop, _) = supervise(&mut process, &limits, &mut signals(&[]), never()).await;
        assert_eq!(ended, Ended::Exited(0));
        assert_eq!(stop, None);
        assert_eq!(*process.killed_left_behind_at.borrow(), killed);
        assert_eq!(process.signals(), []);
    }
    let mut warnings = said.lines();
    warnings.retain(|line| line.contains("3 processes left by the command"));
    let kept = |line: &String, option| line.contains(&format!("it succeeded ({option})"));
    assert!(
        matches!(&warnings[..], [first, second] if kept(first, "--kill-after") && kept(second, "--timeout")),
        "{warnings:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn what_a_failure_leaves_is_killed_at_once() {
    for (ended, dies_of, timeout) in [
        (Ended::Exited(1), vec![], None),
        (Ended::Killed(11), vec![], None),
        // Success after the time limit is a failure.
        (Ended::Exited(0), vec![], Some(9)),
    ] {
        let mut process = Fake::new(&dies_of).ending(10 * SECOND, ended).leaving(1, 1000);
        process.kills_needed.set(3);
        let limits = Limits { timeout: timeout.map(|timeout| timeout * SECOND), kill_after: 600 * SECOND, ..limits() };
        supervise(&mut process, &limits, &mut signals(&[]), never()).await;
        assert_eq!(*process.killed_left_behind_at.borrow(), [10, 10, 10]);
    }
}

#[tokio::test(start_paused = true)]
async fn what_does_not_end_after_sigkill_is_counted_and_given_up() {
    for (count, counted) in [(1, "1 process of the command has"), (3, "3 processes of the command have")] {
        let (said, _guard) = crate::report::tests::Said::listen();
        let mut process = Fake::new(&[]).ending(SECOND, Ended::Exited(1)).leaving(count, 1000);
        process.kills_needed.set(usize::MAX);
        supervise(&mut process, &limits(), &mut signals(&[]), never()).await;
        assert_eq!(process.started.elapsed().as_secs(), 6);
        let hint = "(a device or a network file system may hold them up)";
        assert_eq!(said.lines(), [format!("{counted} not ended 5s after SIGKILL {hint}: going on without them")]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_signal_reaches_what_is_left_and_the_success_stands() {
    let (said, _guard) = crate::report::tests::Said::listen();
    let mut process = Fake::new(&[]).ending(SECOND, Ended::Exited(0)).leaving(1, 1000);
    let limits = Limits { grace: Some(2 * SECOND), ..limits() };
    let mut signals = signals(&[(3, Signal::SIGUSR1), (4, Signal::SIGTERM)]);
    let (ended, stop, _) = supervise(&mut process, &limits, &mut signals, never()).await;
    assert_eq!(ended, Ended::Exited(0));
    assert_eq!(stop, None);
    assert_eq!(process.signals(), [(Target::LeftBehind, Signal::SIGTERM, 4)]);
    assert_eq!(*process.killed_left_behind_at.borrow(), [6]);
    assert!(said.lines().iter().any(|line| line.contains("5s after it succeeded (--grace)")), "{:?}", said.lines());
}

#[tokio::test(start_paused = true)]
async fn a_signal_seen_in_the_same_moment_as_the_success_reaches_what_is_left() {
    let mut process = Fake::new(&[]).ending(Duration::ZERO, Ended::Exited(0)).leaving(1, 5);
    let (sender, receiver) = mpsc::unbounded_channel();
    sender.send(Received { signal: Signal::SIGTERM, to_our_group: false }).unwrap();
    let (_, stop, _) = supervise(&mut process, &limits(), &mut Signals::injected(receiver), never()).await;
    // The signal came too late to stop the command.
    assert_eq!(stop, None);
    assert_eq!(process.signals(), [(Target::LeftBehind, Signal::SIGTERM, 0)]);
}

#[tokio::test(start_paused = true)]
async fn the_warning_of_what_is_left_names_the_option_that_ended_it() {
    let (said, _guard) = crate::report::tests::Said::listen();
    let mut process = Fake::new(&[]).ending(8 * SECOND, Ended::Exited(0)).leaving(1, 1000);
    let limits = Limits { timeout: Some(4 * SECOND), ..limits() };
    // The signal came first, so the success counts. Without --grace, only the time limit plans a KILL.
    let mut signals = signals(&[(3, Signal::SIGTERM)]);
    supervise(&mut process, &limits, &mut signals, never()).await;
    assert_eq!(*process.killed_left_behind_at.borrow(), [14]);
    assert!(
        said.lines().iter().any(|line| line.contains("6s after it succeeded (--kill-after)")),
        "{:?}",
        said.lines()
    );
}

#[tokio::test(start_paused = true)]
async fn a_delivery_lost_while_something_is_left_is_lost() {
    for (on_lost, killed, then) in [(OnLost::Terminate, 5, "killing them"), (OnLost::Finish, 11, "letting them finish")]
    {
        let (said, _guard) = crate::report::tests::Said::listen();
        let mut process = Fake::new(&[]).ending(SECOND, Ended::Exited(0)).leaving(1, 1000);
        let limits = Limits { on_lost, ..limits() };
        let (_, _, lost) = supervise(&mut process, &limits, &mut signals(&[]), lost_after(5)).await;
        assert_eq!(lost, Some("the connection broke"));
        assert_eq!(*process.killed_left_behind_at.borrow(), [killed]);
        let text = "delivery lost while processes left by the command still run: the connection broke; ";
        assert_eq!(said.lines()[0], format!("{text}{then}"));
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_terminal_has_sent_to_both_is_not_sent_again() {
    for (shares_group, expected) in [(true, vec![]), (false, vec![Signal::SIGINT])] {
        let mut process = Fake::new(&[]).ending(10 * SECOND, Ended::Exited(5));
        process.shares_group = shares_group;
        let mut signals = signals_from(true, &[(5, Signal::SIGINT)]);
        let (_, stop, _) = supervise(&mut process, &limits(), &mut signals, never()).await;
        assert_eq!(stop, Some(StopReason::Signal(2)));
        let sent: Vec<_> = process.signals().iter().map(|sent| sent.1).collect();
        assert_eq!(sent, expected);
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_terminal_has_sent_to_our_group_is_sent_to_what_is_left_elsewhere() {
    let mut process = Fake::new(&[]).ending(SECOND, Ended::Exited(0)).leaving(1, 10);
    process.shares_group = true;
    let mut signals = signals_from(true, &[(5, Signal::SIGINT)]);
    let (_, stop, _) = supervise(&mut process, &limits(), &mut signals, never()).await;
    assert_eq!(stop, None);
    assert_eq!(process.signals(), [(Target::LeftBehindElsewhere, Signal::SIGINT, 5)]);
}
