//! The story, top to bottom: find the command, connect, take, run, decide, settle.

use crate::{
    broker::{Broker, ConsumeOptions, Consumer, DeliveryLost, Depth, Message, Unconfirmed},
    cli::QconsumeOptions,
    command::{Command, Executable, Reaper, Variable, find, supervise},
    exit::{Exit, Failure, status_of_signal},
    report::{Outcome, Patience, RunSummary, Source, Span, Subject},
    signals::{Signals, next_stop},
    verdict::{CommandResult, Ended, Policy, Settlement, StopReason, Verdict, decide},
};
use nix::sys::signal::Signal;
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until};

/// How soon an empty-looking queue is looked at again; it grows to the longest, for a queue that somebody else works on.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
const LOOK_AGAIN_LONGEST: Duration = Duration::from_secs(1);

/// How soon a wait is mentioned.
const MENTION_WAIT: Duration = Duration::from_secs(30);

/// The share of `--ack-timeout` after which a command that still runs is mentioned.
const ACK_WARNING: f64 = 0.8;

/// What became of the message with `--no-ack`.
const ACKNOWLEDGED_BEFORE: &str = "message was acknowledged before the command (--no-ack)";

/// Works as the options say, and returns the exit status.
///
/// # Errors
/// A [`Failure`] when qconsume itself, not the command, is what failed; anything else is a defect.
pub async fn work(options: QconsumeOptions, mut signals: Signals) -> anyhow::Result<u8> {
    let program = find(&options.command, std::env::var_os("PATH").as_deref())?;
    let reaper = Reaper::start()
        .map_err(|error| Failure::system("can't watch for ended processes", &error))?;
    let connect = options.broker.connect(connection_name(&options.queue));
    let broker = Broker::new(options.broker.nodes.read()?, connect);
    let consumer = Consumer::new(
        broker,
        ConsumeOptions {
            queue: options.queue.clone(),
            topology: options.topology(),
            ack_timeout: options.ack_timeout,
        },
    );
    let mut worker = Worker {
        options,
        program,
        reaper,
        consumer,
    };
    if let Some(count @ 2..) = worker.options.prefetch_count {
        tracing::info!(
            "--prefetch-count {count} changes nothing: a worker holds one message at a time, so that no other waits behind a command"
        );
    }
    let mut done = 0;
    loop {
        match worker.one(&mut signals, done).await? {
            Step::Next => done += 1,
            Step::End(word) => {
                word.report();
                worker.close(&mut signals).await;
                return Ok(word.status);
            }
        }
    }
}

/// What a round leads to.
enum Step {
    /// The message is done; there is another to take.
    Next,
    /// The run is over.
    End(RunSummary),
}

struct Worker {
    options: QconsumeOptions,
    program: Executable,
    reaper: Reaper,
    consumer: Consumer,
}

impl Worker {
    /// One message, from the wait for it until it is settled.
    async fn one(&mut self, signals: &mut Signals, done: u64) -> Result<Step, Failure> {
        let taken = tokio::select! {
            biased;
            signal = next_stop(signals) => return Ok(Step::End(self.stopped(signal).await)),
            taken = self.take() => taken?,
        };
        let Some(message) = taken else {
            return Ok(Step::End(self.nothing_left()));
        };
        let task = Task::new(&message);
        task.say_taken(self.consumer.queue());

        if self.options.no_ack
            && let Some(word) = self.acknowledge(&task).await
        {
            return Ok(Step::End(word));
        }

        let mut variables = message.variables;
        let hidden = self.options.hidden_variables().iter();
        variables.extend(hidden.map(|name| Variable { name, value: None }));
        let command = Command::spawn(&self.program, &variables, message.body, &self.reaper);
        let outcome = match command {
            Ok(mut command) => {
                let lost = async {
                    if self.options.no_ack {
                        // There is nothing left to lose.
                        std::future::pending().await
                    } else {
                        self.consumer.lost().await
                    }
                };
                let limits = self.options.limits();
                let run = supervise(&mut command, &limits, signals, lost);
                warn_before_ack_timeout(self.options.ack_timeout, run).await
            }
            Err(failure) => return Ok(Step::End(self.not_started(&failure, &task).await)),
        };
        let verdict = decide(
            CommandResult {
                ended: outcome.ended,
                stop: outcome.stop,
                still_owned: outcome.lost.is_none(),
                failures_before: task.failures,
            },
            &self.options.policy(),
        );
        let (by, how) = how(outcome.ended, outcome.stop);
        let Some(settlement) = verdict.settlement else {
            let why = outcome
                .lost
                .map(|loss| loss.to_string())
                .unwrap_or_default();
            let text = format!(
                "message lost while the command ran, so it may be somebody else's by now: {why}; {how}"
            );
            return Ok(Step::End(task.word(
                Source::Qconsume,
                verdict.exit_code,
                Outcome::Lost,
                text,
            )));
        };

        let all = self.options.count().is_some_and(|count| done + 1 >= count);
        let stopped_by = outcome.stop.and_then(StopReason::signal);
        // With `--reject-exit-code 0` a message that was dead-lettered is done like any other.
        let last = all || verdict.exit_code != 0 || stopped_by.is_some();
        let word = if self.options.no_ack {
            task.word(
                by,
                verdict.exit_code,
                Outcome::Acknowledged,
                format!("{how}; {ACKNOWLEDGED_BEFORE}"),
            )
        } else {
            task.warn_if_uncounted(&self.options.policy(), settlement);
            let settled = self.consumer.settle(settlement, last).await;
            task.settled(by, &how, &verdict, settlement, settled.err())
        };
        match stopped_by {
            _ if word.status != 0 || all => Ok(Step::End(word)),
            None => {
                word.log();
                Ok(Step::Next)
            }
            // This message is done, but a stop before all are is no completion.
            Some(signal) => Ok(Step::End(RunSummary {
                source: Source::Qconsume,
                status: status_of_signal(signal),
                text: format!(
                    "{}; stopped by a signal before everything was done",
                    word.text
                ),
                ..word
            })),
        }
    }

    /// `--no-ack`: the message is settled before the command starts.
    ///
    /// Returns the last word, if that can't be known to have arrived: then the command mustn't start.
    async fn acknowledge(&mut self, task: &Task) -> Option<RunSummary> {
        // As if it were the last one: the next is for whoever has time for it, not for a worker that is busy.
        let settled = self.consumer.settle(Settlement::Ack, true).await;
        let why = settled.err()?;
        Some(task.word(
            Source::Qconsume,
            Exit::Lost.status(),
            Outcome::Unconfirmed,
            format!(
                "command not started, as the acknowledgement (--no-ack) was not confirmed and the message may come again: {why}"
            ),
        ))
    }

    /// Waits for a message, over as many connections as it needs.
    ///
    /// `None` is: nothing came for as long as the options want to wait.
    async fn take(&mut self) -> Result<Option<Message>, Failure> {
        // `--drain` without `--wait` asks how full the queue is before it waits at all.
        let patience = if self.options.drain {
            Some(self.options.wait.unwrap_or_default())
        } else {
            self.options.wait
        };
        let mut waited = Duration::ZERO;
        let mut pause = LOOK_AGAIN;
        loop {
            if !self.consumer.is_registered() {
                self.consumer.register().await?;
                tracing::debug!("waiting for a message in queue {:?}", self.consumer.queue());
            }
            // Only time in which a message could have come counts.
            let registered = Instant::now();
            let left = patience.map(|patience| patience.saturating_sub(waited));
            match self.wait(left).await {
                Ok(taken) => return Ok(taken),
                // Nobody gets past it, so waiting on would be a storm of connections until somebody looks.
                Err(loss) if loss.unreadable => {
                    return Err(Failure::new(
                        Exit::Software,
                        format!(
                            "the next message in queue {:?} can't be taken: {loss}; it has gone back to the queue: take it out by other means",
                            self.options.queue
                        ),
                    ));
                }
                Err(loss) => {
                    self.consumer.survives(&loss.to_string())?;
                    tracing::warn!("while waiting for a message: {loss}; connecting again")
                }
            }
            waited += registered.elapsed();
            // A consumer that is lost as soon as it is registered, again and again, mustn't become a storm.
            if registered.elapsed() > LOOK_AGAIN_LONGEST {
                pause = LOOK_AGAIN;
            }
            sleep(pause.mul_f64(0.5 + fastrand::f64())).await;
            pause = (pause * 2).min(LOOK_AGAIN_LONGEST);
        }
    }

    /// Waits on one connection: for a message, or until the queue has been empty for `patience`.
    async fn wait(&mut self, patience: Option<Duration>) -> Result<Option<Message>, DeliveryLost> {
        let mut look = patience.map(|patience| Instant::now() + patience);
        let mut pause = LOOK_AGAIN;
        let mut mention = Patience::new(MENTION_WAIT);
        loop {
            tokio::select! {
                biased;
                message = self.consumer.next() => return message.map(Some),
                () = until(look) => {}
                waited = mention.due() => {
                    tracing::info!("still waiting for a message in queue {:?}, for {} now", self.consumer.queue(), Span(waited));
                    continue;
                }
            }
            if self.consumer.depth().await? == Depth::Ready(0) {
                return self.consumer.cancel().await;
            }
            // Ready messages that don't come are another's turn: a single active consumer's, or a queue's on the move.
            look = Some(Instant::now() + pause);
            pause = (pause * 2).min(LOOK_AGAIN_LONGEST);
        }
    }

    /// The end of a run that found nothing more to do.
    fn nothing_left(&self) -> RunSummary {
        let queue = self.consumer.queue();
        let (status, text) = if self.options.drain {
            (0, format!("queue {queue:?} is empty"))
        } else {
            let waited = Span(self.options.wait.unwrap_or_default());
            (
                self.options.empty_exit_code,
                format!("no message in queue {queue:?} within {waited} (--wait)"),
            )
        };
        RunSummary::without_message(status, text)
    }

    /// The end of a run that was told to stop while no command ran.
    async fn stopped(&mut self, signal: Signal) -> RunSummary {
        self.consumer.give_back().await;
        RunSummary::without_message(
            status_of_signal(signal as i32),
            format!("stopped by {signal} while no command ran; whatever had arrived goes back"),
        )
    }

    /// Nobody has run the message, so it goes back, uncounted where the broker can tell.
    async fn not_started(&mut self, failure: &Failure, task: &Task) -> RunSummary {
        let (outcome, became) = if self.options.no_ack {
            (Outcome::Acknowledged, ACKNOWLEDGED_BEFORE.to_owned())
        } else {
            let settled = self.consumer.settle(Settlement::Release, true).await;
            became(Settlement::Release, settled.err())
        };
        task.word(
            Source::Qconsume,
            failure.exit.status(),
            outcome,
            format!("{failure}; {became}"),
        )
    }

    /// All is settled: a signal only cuts the goodbye short.
    async fn close(&mut self, signals: &mut Signals) {
        tokio::select! {
            biased;
            () = self.consumer.close() => {}
            _ = next_stop(signals) => {}
        }
    }
}

/// The message at hand, for what is said of it.
struct Task {
    subject: Subject,
    failures: Option<u64>,
    since: Instant,
}

impl Task {
    fn new(message: &Message) -> Self {
        Self {
            subject: Subject {
                id: message.id.clone(),
                attempt: message.attempt,
                size: Some(message.body.len()),
                ..Subject::default()
            },
            failures: message.failures,
            since: Instant::now(),
        }
    }

    fn say_taken(&self, queue: &str) {
        let Subject {
            id, attempt, size, ..
        } = &self.subject;
        tracing::info!(queue, id, attempt, size, "message taken");
    }

    /// A last word about it, with how long it has been here until now, to the millisecond.
    fn word(&self, source: Source, status: u8, outcome: Outcome, text: String) -> RunSummary {
        let seconds = (self.since.elapsed().as_secs_f64() * 1000.0).round() / 1000.0;
        RunSummary {
            source,
            status,
            text,
            subject: Subject {
                seconds: Some(seconds),
                outcome: Some(outcome),
                ..self.subject.clone()
            },
        }
    }

    /// The word on a settlement that has arrived, or (`unconfirmed`) may not have.
    fn settled(
        &self,
        by: Source,
        how: &str,
        verdict: &Verdict,
        settlement: Settlement,
        unconfirmed: Option<Unconfirmed>,
    ) -> RunSummary {
        let (by, status) = match (&unconfirmed, settlement) {
            (None, _) => (by, verdict.exit_code),
            (Some(_), Settlement::Ack) => (Source::Qconsume, verdict.exit_code_if_unconfirmed),
            (Some(_), _) => (by, verdict.exit_code_if_unconfirmed),
        };
        let (outcome, became) = became(settlement, unconfirmed);
        self.word(by, status, outcome, format!("{how}; {became}"))
    }

    /// A classic queue doesn't count, so `--max-attempts` can't end anything there.
    fn warn_if_uncounted(&self, policy: &Policy, settlement: Settlement) {
        if let (Some(max), Settlement::Requeue, None) =
            (policy.max_attempts, settlement, self.failures)
        {
            tracing::warn!(
                "--max-attempts {max} has no effect: this queue doesn't count deliveries; use a quorum queue"
            );
        }
    }
}

/// What became of the message, for machines and for people.
fn became(settlement: Settlement, unconfirmed: Option<Unconfirmed>) -> (Outcome, String) {
    if let Some(why) = unconfirmed {
        let text = match settlement {
            Settlement::Ack => format!(
                "but its acknowledgement was not confirmed, so the message may come again: {why}"
            ),
            Settlement::DeadLetter => format!(
                "message rejected, but the broker has not confirmed it, so it may come again: {why}"
            ),
            Settlement::Requeue | Settlement::Release => format!(
                "message goes back to the queue, though the broker has not confirmed it: {why}"
            ),
        };
        return (Outcome::Unconfirmed, text);
    }
    let (outcome, text) = match settlement {
        Settlement::Ack => (Outcome::Acknowledged, "message acknowledged"),
        Settlement::Requeue => (Outcome::Requeued, "message returned to the queue"),
        Settlement::Release => (Outcome::Released, "message given back to the queue"),
        Settlement::DeadLetter => (
            Outcome::DeadLettered,
            "message rejected: dead-lettered, or dropped where the queue has no dead-letter exchange",
        ),
    };
    (outcome, text.to_owned())
}

/// How the command ended, and whose word the status is.
fn how(ended: Ended, stop: Option<StopReason>) -> (Source, String) {
    let how = match ended {
        Ended::Exited(0) => "command succeeded".to_owned(),
        Ended::Exited(status) => format!("command exited with status {status}"),
        Ended::Killed(signal) => format!("command was killed by {}", name(signal)),
    };
    match stop {
        None => (Source::Command, how),
        Some(StopReason::TimeLimit) => (
            Source::Qconsume,
            format!("{how} after its time limit (--timeout)"),
        ),
        Some(StopReason::Signal(signal)) => (
            Source::Command,
            format!("{how} after {} was passed on to it", name(signal)),
        ),
    }
}

fn name(signal: i32) -> String {
    Signal::try_from(signal)
        .map_or_else(|_| format!("signal {signal}"), |signal| signal.to_string())
}

async fn warn_before_ack_timeout<T>(limit: Option<Duration>, run: impl Future<Output = T>) -> T {
    let mut run = std::pin::pin!(run);
    if let Some(limit) = limit {
        tokio::select! {
            biased;
            done = &mut run => return done,
            () = sleep(limit.mul_f64(ACK_WARNING)) => tracing::warn!(
                "the command has run for 80 % of the acknowledgement timeout of {}: after that the broker gives the message to somebody else",
                Span(limit)
            ),
        }
    }
    run.await
}

/// For RabbitMQ's management page: which pod, which queue.
fn connection_name(queue: &str) -> String {
    let host = std::env::var_os("HOSTNAME")
        .filter(|host| !host.is_empty())
        .or_else(|| nix::unistd::gethostname().ok())
        .unwrap_or_default();
    format!("qconsume {} {queue}", host.display())
}

async fn until(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}
