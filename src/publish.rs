//! qpublish: fills a queue, and says for certain what is in it.
//!
//! The story, top to bottom: connect, declare, read and publish, hear what became of each, report.
//! Messages are always persistent (amqp-publish needs `-p` for that), always mandatory, and the broker confirms each;
//! so that what amqp-publish loses without a word, a message that no queue takes, is an error here.

mod options;
mod progress;
mod source;
mod tally;

pub use options::QpublishOptions;
#[cfg(fuzzing)]
pub use source::records;

use crate::{
    broker::{Heard, Publisher},
    clock::sleep_until_or_never,
    exit::{Exit, Failure, status_of_signal},
    report::{HumanDuration, Reminder, RunSummary, counted},
    signals::{Signals, next_stop, unless_stopped},
};
use nix::sys::signal::Signal;
use progress::Progress;
use source::{Messages, Source};
use std::{
    collections::VecDeque,
    future::pending,
    io::{self, IsTerminal},
    mem,
    sync::Arc,
    time::Duration,
};
use tally::{Gap, Tally};
use tokio::{sync::OwnedSemaphorePermit, time::Instant};

/// How long a signal leaves the broker to answer for what is in flight.
const GRACE: Duration = Duration::from_secs(3);

/// Publishes as the options say, and returns the exit status.
///
/// # Errors
/// Why not every message is confirmed.
pub async fn publish(mut options: QpublishOptions, mut signals: Signals) -> Result<u8, Failure> {
    let source = options.find_source();
    if let Some(source) = &source {
        source.check()?;
    }
    let publisher = match unless_stopped(&mut signals, open(&options)).await {
        Ok(opened) => opened?,
        Err(signal) => {
            let text = format!("stopped by {signal} before anything was published");
            return Ok(stopped(signal, text));
        }
    };
    let Some(source) = source else {
        tracing::info!(
            "queue {:?} is declared; nothing is published, as no message is given (with --declare, standard input is read by --lines or --file /dev/stdin)",
            options.route.routing_key
        );
        publisher.close().await;
        return Ok(0);
    };
    let source = Arc::new(source);
    if matches!(*source, Source::Input) && io::stdin().is_terminal() {
        tracing::info!("reading one message from the terminal, to its end (Ctrl-D)");
    }
    // Not where somebody types the messages on the same terminal.
    let on_terminal = options.output.shows_progress() && !(source.is_input() && io::stdin().is_terminal());
    let progress = on_terminal.then(|| Progress::new(source.total()));
    let messages = Arc::clone(&source).start().map_err(|error| Failure::system("can't start to read", &error))?;
    let mut run = Run {
        publisher,
        shares: VecDeque::new(),
        bytes: 0,
        tally: Tally::default(),
        messages,
        reading: true,
        source,
        options,
        progress,
    };
    let stop = run.publish(&mut signals).await;
    // What was answered is answered: a signal only cuts the goodbye short.
    let _ = unless_stopped(&mut signals, run.publisher.close()).await;
    match stop {
        None => {
            tracing::info!("{} confirmed", counted(run.tally.total(), "message", "messages"));
            Ok(0)
        }
        Some(Stop::Signal { signal, .. }) => {
            let text = format!("stopped by {signal}; {}", run.summary());
            Ok(stopped(signal, text))
        }
        Some(Stop::Failed(failure)) => {
            let text = format!("{failure}; {}", run.summary());
            Err(Failure::new(failure.exit, text))
        }
    }
}

/// Connects, declares and makes ready to publish.
async fn open(options: &QpublishOptions) -> Result<Publisher, Failure> {
    let mut broker = options.broker.broker(format!("qpublish {}", options.route.routing_key));
    let connection = broker.connect().await?;
    let (route, properties) = (options.route.clone(), options.properties.clone());
    Publisher::open(connection, options.declare, route, properties, options.timeout).await
}

/// Why not every message is confirmed.
enum Stop {
    Failed(Failure),
    Signal {
        signal: Signal,
        /// It came before everything was sent.
        early: bool,
    },
}

struct Run {
    publisher: Publisher,
    /// Of the messages in flight, in their order: the share of the window, and the size in bytes.
    shares: VecDeque<(OwnedSemaphorePermit, u64)>,
    /// Bytes of all messages that are answered.
    bytes: u64,
    tally: Tally,
    messages: Messages,
    /// Whether there are more, and more are wanted.
    reading: bool,
    source: Arc<Source>,
    options: QpublishOptions,
    /// For a terminal.
    progress: Option<Progress>,
}

impl Run {
    /// Publishes until everything is answered, or nothing more is to be expected.
    async fn publish(&mut self, signals: &mut Signals) -> Option<Stop> {
        let mut stop = None;
        let mut blocked = None;
        let mut moved = Instant::now();
        let mut grace = None;
        let mut reminder = Reminder::default();
        let stalled = loop {
            if !self.reading && self.tally.outstanding() == 0 {
                // Everything was sent, and is answered: the signal was too late to stop anything.
                break stop.take_if(|stop| !matches!(stop, Stop::Signal { early: false, .. }));
            }
            let deadline = (self.tally.outstanding() > 0).then(|| {
                let stalled = moved + self.options.timeout;
                grace.map_or(stalled, |grace: Instant| grace.min(stalled))
            });
            tokio::select! {
                biased;
                signal = next_stop(signals) => {
                    if grace.is_some() {
                        break stop;
                    }
                    let early = mem::take(&mut self.reading);
                    grace = Some(Instant::now() + GRACE);
                    stop.get_or_insert(Stop::Signal { signal, early });
                }
                heard = self.publisher.next() => match heard {
                    Heard::Sent => {}
                    Heard::Answer(answer) => {
                        moved = Instant::now();
                        self.bytes += self.shares.pop_front().map_or(0, |(_, size)| size);
                        self.tally.note(answer);
                        if self.tally.has_failed() {
                            self.reading = false;
                        }
                    }
                    Heard::Blocked(reason) => {
                        tracing::warn!(
                            "the broker blocks publishers: {reason}; waiting for up to {} (--timeout)",
                            HumanDuration(self.options.timeout)
                        );
                        blocked = Some(reason);
                    }
                    Heard::Unblocked => {
                        tracing::info!("the broker takes messages again");
                        blocked = None;
                    }
                    Heard::Lost(lost) => {
                        let mut failure = lost.failure;
                        if let Some(message) = lost.message {
                            failure.message = format!("{} is {failure}", self.source.name(message));
                        }
                        return Some(Stop::Failed(failure));
                    }
                },
                read = self.messages.recv(), if self.reading && !self.publisher.is_sending() => {
                    if self.tally.outstanding() == 0 {
                        moved = Instant::now();
                    }
                    match read {
                        Some(Ok(message)) => {
                            self.tally.sent();
                            self.shares.push_back((message.share, message.body.len() as u64));
                            self.publisher.publish(message.body);
                        }
                        Some(Err(failure)) => {
                            self.reading = false;
                            stop.get_or_insert(Stop::Failed(failure));
                        }
                        None => self.reading = false,
                    }
                }
                () = sleep_until_or_never(deadline) => {
                    break stop.or_else(|| Some(Stop::Failed(self.stalled(blocked))));
                }
                progress = progress_due(self.progress.as_mut()) => {
                    // Each line has a separator, too.
                    let messages = self.tally.confirmed();
                    progress.show(messages, self.bytes + messages);
                }
                since = reminder.due(), if self.progress.is_none() => tracing::info!(
                    "still publishing, for {} now: {} confirmed",
                    HumanDuration(since),
                    counted(self.tally.confirmed(), "message", "messages")
                ),
            }
        };
        self.refusal().map(Stop::Failed).or(stalled)
    }

    fn stalled(&self, blocked: Option<String>) -> Failure {
        let why = match blocked {
            Some(reason) => format!("the broker blocks publishers: {reason}"),
            None => "the broker has confirmed nothing for so long".to_owned(),
        };
        let limit = HumanDuration(self.options.timeout);
        Failure::new(Exit::Unconfirmed, format!("gave up after {limit} (--timeout): {why}"))
    }

    /// The failure that a returned or refused message is.
    fn refusal(&self) -> Option<Failure> {
        let (confirmed, gap) = self.tally.without_gap();
        let name = self.source.name(confirmed + 1);
        match gap? {
            Gap::Unroutable { among } => {
                let which = match among {
                    1 => name,
                    _ => format!("{name} or one of the {} behind it", among - 1),
                };
                let text = format!("{which} came back: {}", self.options.route.missing());
                Some(Failure::new(Exit::Config, text))
            }
            Gap::Refused => Some(Failure::new(
                Exit::Unconfirmed,
                format!(
                    "{name} was refused: the queue is full (x-max-length with reject-publish), or can't take it for now"
                ),
            )),
            Gap::Unanswered => None,
        }
    }

    /// How many messages are safe, and where to go on.
    fn summary(&self) -> String {
        let (sent, confirmed) = (self.tally.total(), self.tally.confirmed());
        let (without_gap, _) = self.tally.without_gap();
        if sent == 0 {
            return "nothing was published".to_owned();
        }
        let mut text = format!(
            "confirmed: {confirmed} of {} sent, {without_gap} from the start without a gap",
            counted(sent, "message", "messages")
        );
        if !matches!(*self.source, Source::Input) {
            let next = self.source.name(without_gap + 1);
            text += &format!("; to resume, begin with {next}");
        }
        if self.tally.outstanding() > 0 {
            text += "; what was sent and not confirmed may have arrived or not";
        }
        text
    }
}

async fn progress_due(progress: Option<&mut Progress>) -> &mut Progress {
    match progress {
        Some(progress) => {
            progress.due().await;
            progress
        }
        None => pending().await,
    }
}

/// Says that a signal has ended it, and returns the status.
fn stopped(signal: Signal, text: String) -> u8 {
    let status = status_of_signal(signal as i32);
    RunSummary::without_message(status, text).report();
    status
}
