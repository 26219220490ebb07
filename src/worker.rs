//! The story, top to bottom: find the command, connect, take, run, decide, settle.

mod take;
mod task;

use crate::{
    broker::{Broker, Consumer, ConsumerOptions, Message},
    cli::QconsumeOptions,
    command::{Command, Executable, Reaper, Variable, find, supervise},
    exit::{Exit, Failure, status_of_signal},
    report::{HumanDuration, Outcome, RunSummary, Source},
    signals::{Signals, next_stop},
    verdict::{CommandResult, Settlement, StopReason, Verdict, decide},
};
use nix::sys::signal::Signal;
use std::{mem, time::Duration};
use task::{Tally, Task, describe_end, describe_settlement};
use tokio::time::sleep;

/// What became of the message with `--no-ack`.
const ACKNOWLEDGED_BEFORE: &str = "message was acknowledged before the command (--no-ack)";

/// The share of `--ack-timeout` after which a command that still runs is mentioned.
const ACK_WARNING: f64 = 0.8;

/// Works as the options say, and returns the exit status.
///
/// # Errors
/// A [`Failure`] when qconsume itself, not the command, is what failed.
pub async fn work(options: QconsumeOptions, mut signals: Signals) -> Result<u8, Failure> {
    let executable = find(&options.command, std::env::var_os("PATH").as_deref())?;
    let reaper = Reaper::start()
        .map_err(|error| Failure::system("can't watch for ended processes", &error))?;
    let connect = options.broker.connect(connection_name(&options.queue));
    let consumer = Consumer::new(
        Broker::new(options.broker.nodes.clone(), connect),
        ConsumerOptions {
            queue: options.queue.clone(),
            topology: options.topology(),
            ack_timeout: options.ack_timeout,
        },
    );
    let mut worker = Worker {
        options,
        executable,
        reaper,
        consumer,
        tally: Tally::default(),
    };
    let ended = match worker.run(&mut signals).await {
        Ok(summary) => Ok(worker.with_dead_letters(summary)),
        Err(failure) if worker.tally.dead_lettered > 0 => Ok(worker.with_dead_letters(
            RunSummary::without_message(failure.exit.status(), failure.message),
        )),
        Err(failure) => Err(failure),
    };
    if let Ok(summary) = &ended {
        summary.report();
    }
    // All is settled: a signal only cuts the polite close short.
    tokio::select! {
        biased;
        () = worker.consumer.close() => {}
        _ = next_stop(&mut signals) => {}
    }
    ended.map(|summary| summary.status)
}

/// What a round leads to.
enum Step {
    /// The message is settled; there is another to take.
    Next,
    /// The run is over.
    End(RunSummary),
}

struct Worker {
    options: QconsumeOptions,
    executable: Executable,
    reaper: Reaper,
    consumer: Consumer,
    tally: Tally,
}

impl Worker {
    async fn run(&mut self, signals: &mut Signals) -> Result<RunSummary, Failure> {
        loop {
            if let Step::End(summary) = self.one(signals).await? {
                return Ok(summary);
            }
        }
    }

    /// One message, from the wait for it until it is settled.
    async fn one(&mut self, signals: &mut Signals) -> Result<Step, Failure> {
        let taken = tokio::select! {
            biased;
            signal = next_stop(signals) => return Ok(Step::End(self.stopped(signal).await)),
            taken = self.take() => taken?,
        };
        let Some(mut message) = taken else {
            return Ok(Step::End(self.nothing_left()));
        };
        let task = Task::new(&message);
        task.log_taken(self.consumer.queue());

        if self.options.no_ack
            && let Some(summary) = self.acknowledge_beforehand(&task).await
        {
            return Ok(Step::End(summary));
        }

        let body = mem::take(&mut message.body);
        let variables = self.variables(message);
        let mut command = match Command::spawn(&self.executable, &variables, body, &self.reaper) {
            Ok(command) => command,
            Err(failure) => return Ok(Step::End(self.not_started(&failure, &task).await)),
        };
        let lost = async {
            if self.options.no_ack {
                // There is nothing left to lose.
                std::future::pending().await
            } else {
                self.consumer.lost().await
            }
        };
        let limits = self.options.limits.clone();
        let run = supervise(&mut command, &limits, signals, lost);
        let outcome = warn_before_ack_timeout(self.options.ack_timeout, run).await;
        let result = CommandResult {
            ended: outcome.ended,
            stop: outcome.stop,
            still_owned: outcome.lost.is_none(),
            failures_before: task.failures,
        };
        let verdict = decide(result, &self.options.policy);
        let how = describe_end(result);
        match (verdict.settlement, outcome.lost) {
            (Some(settlement), _) => self.settle(&task, result, verdict, settlement, &how).await,
            (None, lost) => {
                let why = lost.map(|lost| lost.to_string()).unwrap_or_default();
                let text = format!(
                    "delivery lost while the command ran, another worker may have it: {why}; {how}"
                );
                Ok(Step::End(task.summary(
                    Source::Qconsume,
                    verdict.exit_code,
                    Outcome::Lost,
                    text,
                )))
            }
        }
    }

    /// Tells the broker what the verdict says, and goes on or ends.
    async fn settle(
        &mut self,
        task: &Task,
        result: CommandResult,
        verdict: Verdict,
        settlement: Settlement,
        how: &str,
    ) -> Result<Step, Failure> {
        let signal = result.stop.and_then(StopReason::signal);
        let failed = verdict.exit_code != 0;
        let done = matches!(settlement, Settlement::Ack | Settlement::DeadLetter);
        let all = self
            .options
            .count()
            .is_some_and(|count| self.tally.done() + u64::from(done) >= count);
        // A classic queue would deliver the same message again at once, for ever.
        let counted = settlement != Settlement::Requeue || task.failures.is_some();
        let keeps_going = self.options.keep_going && counted && signal.is_none();
        let last = all || signal.is_some() || (failed && !keeps_going);
        task.warn_if_uncounted(&self.options, settlement);

        let source = match result.stop {
            Some(StopReason::TimeLimit) => Source::Qconsume,
            _ => Source::Command,
        };
        let summary = if self.options.no_ack {
            let text = format!("{how}; {ACKNOWLEDGED_BEFORE}");
            task.summary(source, verdict.exit_code, Outcome::Acknowledged, text)
        } else {
            let settled = self.consumer.settle(settlement, last).await;
            task.settled(source, how, &verdict, settlement, settled.err())
        };
        match summary.subject.outcome {
            Some(Outcome::Acknowledged) => self.tally.acknowledged += 1,
            Some(Outcome::Requeued) => self.tally.requeued += 1,
            Some(Outcome::DeadLettered) => self.tally.dead_lettered += 1,
            _ => return Ok(Step::End(summary)),
        }
        Ok(match signal {
            _ if summary.status != 0 && !keeps_going => Step::End(summary),
            None if !all => {
                summary.log();
                Step::Next
            }
            None if self.options.keep_going => {
                summary.log();
                Step::End(self.all_done())
            }
            // This message is done, but a stop before all are is no completion.
            Some(signal) if !all => Step::End(RunSummary {
                source: Source::Qconsume,
                status: status_of_signal(signal),
                text: format!(
                    "{}; stopped by a signal before everything was done",
                    summary.text
                ),
                ..summary
            }),
            _ => Step::End(summary),
        })
    }

    /// What the command's environment gets of the message, and what it doesn't get of ours.
    fn variables(&self, message: Message) -> Vec<Variable> {
        let hidden = self.options.hidden_variables().iter();
        let mut variables = message.variables;
        variables.extend(hidden.map(|name| Variable { name, value: None }));
        variables
    }

    /// `--no-ack`: the message is settled before the command starts.
    ///
    /// Returns how the run ends, if the acknowledgement isn't confirmed: then the command mustn't start.
    async fn acknowledge_beforehand(&mut self, task: &Task) -> Option<RunSummary> {
        // As if it were the last one: the next is for whoever has time for it, not for a worker that is busy.
        let settled = self.consumer.settle(Settlement::Ack, true).await;
        let why = settled.err()?;
        let text = format!(
            "command not started: its message's acknowledgement (--no-ack) is not confirmed, so it may be delivered again: {why}"
        );
        Some(task.summary(
            Source::Qconsume,
            Exit::Lost.status(),
            Outcome::Unconfirmed,
            text,
        ))
    }

    /// The end of a run that found nothing more to do.
    fn nothing_left(&self) -> RunSummary {
        if self.options.drain {
            return self.all_done();
        }
        let (queue, waited) = (
            self.consumer.queue(),
            HumanDuration(self.options.wait.unwrap_or_default()),
        );
        let text = format!("no message in queue {queue:?} within {waited} (--wait)");
        RunSummary::without_message(self.options.empty_exit_code, text)
    }

    /// The end of a run that has done all it was asked for.
    fn all_done(&self) -> RunSummary {
        let queue = self.consumer.queue();
        let what = if self.options.drain {
            format!("queue {queue:?} is empty")
        } else {
            format!("all messages are done that --count asked for, of queue {queue:?}")
        };
        let text = if self.options.keep_going {
            format!("{what}: {}", self.tally)
        } else {
            what
        };
        let status = match self.tally.dead_lettered {
            1.. if self.options.keep_going => self.options.policy.reject_exit_code.unwrap_or(1),
            _ => 0,
        };
        RunSummary::without_message(status, text)
    }

    /// With `--keep-going`, a message that was dead-lettered on the way decides the status, however the run ends: the next
    /// worker would find an empty queue, and nobody would hear of it.
    fn with_dead_letters(&self, summary: RunSummary) -> RunSummary {
        let status = self.options.policy.reject_exit_code.unwrap_or(1);
        if !self.options.keep_going
            || self.tally.dead_lettered == 0
            || status == 0
            || summary.status == status
        {
            return summary;
        }
        RunSummary {
            source: Source::Qconsume,
            status,
            text: format!("{}; before that: {}", summary.text, self.tally),
            ..summary
        }
    }

    /// The end of a run that was told to stop while no command ran.
    async fn stopped(&mut self, signal: Signal) -> RunSummary {
        self.consumer.release().await;
        RunSummary::without_message(
            status_of_signal(signal as i32),
            format!("stopped by {signal} while no command ran; whatever had arrived is released"),
        )
    }

    /// Nobody has run the message, so it is released, which RabbitMQ 4.3 doesn't count.
    async fn not_started(&mut self, failure: &Failure, task: &Task) -> RunSummary {
        let (outcome, became) = if self.options.no_ack {
            (Outcome::Acknowledged, ACKNOWLEDGED_BEFORE.to_owned())
        } else {
            let settled = self.consumer.settle(Settlement::Release, true).await;
            describe_settlement(Settlement::Release, settled.err())
        };
        let text = format!("{failure}; {became}");
        task.summary(Source::Qconsume, failure.exit.status(), outcome, text)
    }
}

async fn warn_before_ack_timeout<T>(limit: Option<Duration>, run: impl Future<Output = T>) -> T {
    let mut run = std::pin::pin!(run);
    if let Some(limit) = limit {
        tokio::select! {
            biased;
            done = &mut run => return done,
            () = sleep(limit.mul_f64(ACK_WARNING)) => tracing::warn!(
                "the command has run for 80 % of the acknowledgement timeout of {}: after that the broker requeues the message",
                HumanDuration(limit)
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
