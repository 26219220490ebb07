//! One run of qconsume, from top to bottom: find the command, connect, take a message, run the command, decide, settle.

mod summary;
mod take;

use crate::{
    abort,
    broker::{Consumer, ConsumerOptions, DeliveryLost, Message},
    cli::QconsumeOptions,
    command::{Reaper, RunningCommand, find, stdin_with, supervise},
    exit::{Exit, Failure, status_of_signal},
    program::Program,
    report::{HumanDuration, Outcome, RunSummary, Subject},
    settlement::Settled,
    signals::{Signals, unless_stopped},
    variable::Variable,
    verdict::{CommandResult, Next, RunState, Settlement, Verdict, decide, repeats_forever},
};
use nix::sys::signal::Signal;
use std::{
    future::pending,
    ops::ControlFlow::{self, Break, Continue},
    path::PathBuf,
};
use summary::{SettledMessage, Tally, describe_end, log_taken, reason, signal_name, summary};
use tokio::time::timeout;

/// The share of `--ack-timeout` after which a warning says that the message is still held; also in the option's help.
const ACK_WARNING: f64 = 0.8;

/// Returns the exit status. Fails only if qconsume can't start: any later failure is reported here.
pub async fn work(options: QconsumeOptions, mut signals: Signals) -> Result<u8, Failure> {
    let executable = find(&options.command[0], std::env::var_os("PATH").as_deref())?;
    let reaper = Reaper::start().map_err(|error| Failure::system("can't watch for ended processes", &error))?;
    let consumer = Consumer::new(
        options.broker.connector(connection_name(&options.queue)),
        ConsumerOptions {
            queue: options.queue.clone(),
            topology: options.topology(),
            ack_timeout: options.ack_timeout,
        },
    );
    let mut worker = Worker { options, executable, reaper, consumer, tally: Tally::default() };
    let summary = loop {
        if let Break(summary) = worker.one_message(&mut signals).await {
            break worker.with_queue(worker.with_tally(summary));
        }
    };
    summary.report();
    // A signal that comes now cuts the closing short. One that came earlier must not, so it is dropped here.
    signals.drop_pending();
    let _ = unless_stopped(&mut signals, worker.consumer.close()).await;
    Ok(summary.status)
}

struct Worker {
    options: QconsumeOptions,
    executable: PathBuf,
    reaper: Reaper,
    consumer: Consumer,
    tally: Tally,
}

/// Each step of a message breaks with the summary if the run ends there.
impl Worker {
    async fn one_message(&mut self, signals: &mut Signals) -> ControlFlow<RunSummary> {
        let message = self.take(signals).await?;
        let subject = log_taken(&message, self.consumer.queue());
        if self.options.no_ack {
            self.acknowledge_beforehand(&subject).await?;
        }
        let command = self.start(signals, message.body, message.variables, &subject).await?;
        let (result, lost) = self.run(signals, command, message.failures).await;
        let verdict = decide(result, &self.options.policy);
        let Some(settlement) = verdict.settlement else {
            let (why, end) = (reason(lost), describe_end(result));
            let text = format!("delivery lost while the command ran, another worker may have it: {why}; {end}");
            return Break(summary(&subject, verdict.status, Outcome::Lost, text));
        };
        let (settled, next) = self.settle(signals, settlement, verdict, result).await;
        self.count(settled.outcome);
        let summary = settled.summary(&subject, verdict, result, message.at_default_delivery_limit);
        if settled.settled != Settled::Confirmed {
            return Break(summary);
        }
        self.go_on(next, summary).await
    }

    async fn take(&mut self, signals: &mut Signals) -> ControlFlow<RunSummary, Message> {
        match unless_stopped(signals, take::take(&mut self.consumer, &self.options)).await {
            Ok(Ok(Some(message))) => Continue(message),
            Ok(Ok(None)) => Break(self.nothing_left()),
            Ok(Err(Failure { exit, message })) => Break(RunSummary::without_message(exit.status(), message)),
            Err(signal) => Break(self.stopped(signal).await),
        }
    }

    /// Starts the command, unless a stop signal or the loss of the delivery has come first.
    async fn start(
        &mut self,
        signals: &mut Signals,
        body: Vec<u8>,
        mut variables: Vec<Variable>,
        subject: &Subject,
    ) -> ControlFlow<RunSummary, RunningCommand> {
        let input = match stdin_with(body) {
            Ok(input) => input,
            Err(failure) => return Break(self.not_started(&failure, subject).await),
        };
        // Only now, as copying a large body takes time.
        self.end_if_stopped_or_lost(signals, subject).await?;
        let hidden = self.options.hidden_variables().iter();
        variables.extend(hidden.map(|name| Variable { name, value: None }));
        match RunningCommand::start(&self.executable, &self.options.command, &variables, input, &self.reaper) {
            Ok(command) => {
                signals.command_started();
                Continue(command)
            }
            Err(failure) => Break(self.not_started(&failure, subject).await),
        }
    }

    async fn run(
        &mut self,
        signals: &mut Signals,
        mut command: RunningCommand,
        failures_before: Option<u64>,
    ) -> (CommandResult, Option<DeliveryLost>) {
        let limits = self.options.limits.clone();
        let (ended, stop, mut lost) = supervise(&mut command, &limits, signals, self.wait_until_lost()).await;
        if lost.is_none() && !self.options.no_ack {
            lost = self.consumer.known_loss().await;
        }
        (CommandResult { ended, stop, still_owned: lost.is_none(), failures_before }, lost)
    }

    /// Waits until the delivery is lost. Warns when the broker may be about to requeue the message.
    async fn wait_until_lost(&mut self) -> DeliveryLost {
        if self.options.no_ack {
            return pending().await;
        }
        if let Some(limit) = self.options.ack_timeout {
            let left = limit.mul_f64(ACK_WARNING).saturating_sub(self.consumer.held_for());
            match timeout(left, self.consumer.wait_until_lost()).await {
                Ok(lost) => return lost,
                Err(_) => tracing::warn!(
                    "the message has been held for at least {:.0} % of --ack-timeout ({limit}): a queue that obeys it requeues the message after {limit}; raise --ack-timeout if the command needs longer",
                    ACK_WARNING * 100.0,
                    limit = HumanDuration(limit)
                ),
            }
        }
        self.consumer.wait_until_lost().await
    }

    async fn settle(
        &mut self,
        signals: &mut Signals,
        settlement: Settlement,
        verdict: Verdict,
        result: CommandResult,
    ) -> (SettledMessage, Next) {
        if repeats_forever(verdict, result.failures_before) {
            self.warn_of_uncounted();
        }
        let is_last = self.next(signals, verdict, result) != Next::Message;
        // Cancel before a requeue, too: the next `take` subscribes again, and gets the message. Without that, `--drain`
        // could find the queue empty: a quorum queue counts it as ready some time later (RabbitMQ 3.10 under load).
        let cancels = is_last || settlement == Settlement::Requeue;
        let settled = self.settle_unless_no_ack(settlement, cancels).await;
        // Asked again, as a stop signal may have come during the settlement.
        (settled, self.next(signals, verdict, result))
    }

    /// With --no-ack the message is settled already.
    async fn settle_unless_no_ack(&mut self, settlement: Settlement, cancels: bool) -> SettledMessage {
        if self.options.no_ack {
            return SettledMessage::before_the_command();
        }
        let (settled, why) = self.consumer.settle(settlement, cancels).await;
        SettledMessage::new(settlement, settled, why)
    }

    /// For a message whose command never started.
    async fn release_unless_no_ack(&mut self) -> SettledMessage {
        if self.options.no_ack {
            return SettledMessage::lost_without_command();
        }
        self.settle_unless_no_ack(Settlement::Release, true).await
    }

    /// What comes after this message, which isn't counted yet.
    fn next(&self, signals: &mut Signals, verdict: Verdict, result: CommandResult) -> Next {
        let state = RunState {
            to_do: self.options.count().map(|count| count.saturating_sub(self.tally.done())),
            keep_going: self.options.keep_going,
            stopped_by: signals.stopped_by().map(|signal| signal as i32),
        };
        state.next(verdict, result.failures_before)
    }

    fn count(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Acknowledged => self.tally.acknowledged += 1,
            Outcome::Requeued => self.tally.requeued += 1,
            Outcome::DeadLettered => {
                self.tally.dead_lettered += 1;
                if self.options.keep_going {
                    // If memory runs out, with_tally isn't reached.
                    abort::note_dead_lettered(self.options.policy.status_of_dead_letters());
                }
            }
            Outcome::Released | Outcome::Unconfirmed | Outcome::Lost => {}
        }
    }

    /// After a confirmed settlement.
    async fn go_on(&mut self, next: Next, summary: RunSummary) -> ControlFlow<RunSummary> {
        // If a stop signal came during the settlement, the consumer isn't cancelled: the next message may have come.
        let must_release = next != Next::Message && self.consumer.is_ready();
        if next == Next::Message {
            // Not at the end of the run: a shortage mustn't say there that no command was run.
            abort::note_message_done();
        }
        let released = !must_release || self.consumer.release().await;
        match next {
            Next::Message => {
                self.with_queue(summary).log();
                Continue(())
            }
            Next::End => {
                let text = summary.text + unless_released(released);
                Break(RunSummary { text, ..summary })
            }
            Next::AllDone => {
                self.with_queue(summary).log();
                Break(self.all_done())
            }
            Next::Stopped(signal) => Break(RunSummary {
                source: Program::current().name(),
                status: status_of_signal(signal),
                text: format!(
                    "{}; stopped by {} before everything was done{}",
                    summary.text,
                    signal_name(signal),
                    unless_released(released)
                ),
                ..summary
            }),
        }
    }

    fn warn_of_uncounted(&self) {
        if let Some(max) = self.options.policy.max_attempts {
            tracing::warn!("--max-attempts {max} has no effect: this queue doesn't count failures; use a quorum queue");
        }
        if self.options.keep_going {
            tracing::warn!(
                "--keep-going ends here: this queue doesn't count failures, so it would deliver this message again and again; use a quorum queue"
            );
        }
    }

    /// For `--no-ack`. If it isn't confirmed, the command mustn't start.
    async fn acknowledge_beforehand(&mut self, subject: &Subject) -> ControlFlow<RunSummary> {
        // Cancel too: don't prefetch the next message while this command runs.
        let (settled, why) = self.consumer.settle(Settlement::Ack, true).await;
        if settled == Settled::Confirmed {
            return Continue(());
        }
        let SettledMessage { outcome, text, .. } = SettledMessage::new(Settlement::Ack, settled, why);
        let text = format!("command not started: with --no-ack, its message is acknowledged first; {text}");
        Break(summary(subject, Exit::Unconfirmed.status(), outcome, text))
    }

    async fn end_if_stopped_or_lost(&mut self, signals: &mut Signals, subject: &Subject) -> ControlFlow<RunSummary> {
        if let Some(signal) = signals.stopped_by() {
            let released = self.release_unless_no_ack().await;
            let text = format!("stopped by {signal} before the command was started; {}", released.text);
            return Break(summary(subject, status_of_signal(signal as i32), released.outcome, text));
        }
        if !self.options.no_ack
            && let Some(lost) = self.consumer.known_loss().await
        {
            let text = format!("delivery lost before the command was started, another worker may have it: {lost}");
            return Break(summary(subject, Exit::Unconfirmed.status(), Outcome::Lost, text));
        }
        Continue(())
    }

    fn nothing_left(&self) -> RunSummary {
        let queue = self.consumer.queue();
        if self.options.drain && self.consumer.was_lost_mid_delivery() {
            let text = format!(
                "queue {queue:?} looks empty, but a connection was lost while a message arrived: that message may be delivered again"
            );
            return RunSummary::without_message(Exit::Unconfirmed.status(), text);
        }
        if self.options.drain {
            return RunSummary::without_message(0, format!("queue {queue:?} is empty"));
        }
        let waited = HumanDuration(self.options.wait.unwrap_or_default());
        let text = format!("no message in queue {queue:?} within {waited} (--wait)");
        RunSummary::without_message(self.options.empty_exit_code, text)
    }

    fn all_done(&self) -> RunSummary {
        let queue = self.consumer.queue();
        let text = format!("processed all messages that --count asked for, from queue {queue:?}");
        RunSummary::without_message(0, text)
    }

    /// With `--keep-going`, a message that was dead-lettered during the run decides the status, however the run ends:
    /// the next worker finds an empty queue, so nobody else would report it.
    fn with_tally(&self, mut summary: RunSummary) -> RunSummary {
        if self.options.keep_going {
            summary.text = self.tally.describe(&summary.text);
            let status = self.options.policy.status_of_dead_letters();
            // If the status is that already, its source stays: it may be the command.
            if self.tally.dead_lettered > 0 && status != 0 && summary.status != status {
                (summary.source, summary.status) = (Program::current().name(), status);
            }
        }
        summary
    }

    /// Adds the queue's name, unless the broker is to choose it and hasn't yet.
    fn with_queue(&self, summary: RunSummary) -> RunSummary {
        let queue = self.consumer.queue();
        RunSummary { queue: (!queue.is_empty()).then(|| queue.to_owned()), ..summary }
    }

    async fn stopped(&mut self, signal: Signal) -> RunSummary {
        let released = self.consumer.release().await;
        let which = if self.tally.is_empty() { "a" } else { "the next" };
        let text = format!("stopped by {signal} before {which} command was started{}", unless_released(released));
        RunSummary::without_message(status_of_signal(signal as i32), text)
    }

    async fn not_started(&mut self, failure: &Failure, subject: &Subject) -> RunSummary {
        let released = self.release_unless_no_ack().await;
        summary(subject, failure.exit.status(), released.outcome, format!("{failure}; {}", released.text))
    }
}

fn unless_released(released: bool) -> &'static str {
    if released {
        ""
    } else {
        "; the release is not confirmed, so a message that had arrived is requeued when the broker notices that the connection has ended"
    }
}

/// The connection's name on RabbitMQ's management page: which pod, which queue.
fn connection_name(queue: &str) -> String {
    let host = std::env::var_os("HOSTNAME")
        .filter(|host| !host.is_empty())
        .or_else(|| nix::unistd::gethostname().ok())
        .unwrap_or_default();
    format!("qconsume {} {queue}", host.display())
}
