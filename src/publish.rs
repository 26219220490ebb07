//! qpublish: fills a queue, and says for certain what is in it.
//!
//! The story, top to bottom: connect, declare, read and publish, hear what became of each, report.
//! Messages are always persistent (amqp-publish needs `-p` for that), always mandatory, and the broker confirms each;
//! so that what amqp-publish loses without a word, a message that no queue takes, is an error here.

mod options;
mod progress;
mod source;
mod tally;

use crate::{
    block_on,
    broker::{Broker, Heard, PublishError, Publisher, declare},
    cli::Request,
    clock::sleep_until_or_never,
    exit::{Exit, Failure, status_of_signal},
    report::{RunSummary, Span},
    show,
    signals::{Signals, next_stop},
};
use nix::sys::signal::Signal;
use options::QpublishOptions;
use progress::Progress;
use source::{Messages, Source};
use std::{
    collections::VecDeque,
    ffi::OsString,
    fs::File,
    io::{self, IsTerminal},
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tally::{Gap, Tally};
use tokio::{sync::OwnedSemaphorePermit, time::Instant};

/// How long a signal leaves the broker to answer for what is in flight.
const GRACE: Duration = Duration::from_secs(3);

/// Runs qpublish with this command line, and returns the exit status.
///
/// # Errors
/// Why not every message is confirmed: a [`Failure`], or else a defect.
pub fn run(arguments: &[OsString]) -> anyhow::Result<u8> {
    match options::parse(arguments)? {
        Request::Run(options) => {
            options.output.start();
            block_on(|signals| publish(*options, signals))?
        }
        Request::Show(text) => {
            show(&text);
            Ok(0)
        }
    }
}

/// qpublish's command line, for those who write its documentation.
#[must_use]
pub fn command() -> clap::Command {
    options::command()
}

async fn publish(options: QpublishOptions, mut signals: Signals) -> anyhow::Result<u8> {
    if let Some(source) = &options.source {
        source.check()?;
    }
    let opened = tokio::select! {
        biased;
        signal = next_stop(&mut signals) => {
            let text = format!("stopped by {signal} before anything was published");
            return Ok(stopped(signal, text));
        }
        opened = open(&options) => opened?,
    };
    let (Some(publisher), Some(source)) = (opened, options.source) else {
        return Ok(0);
    };
    let source = Arc::new(source);
    let bytes = Arc::new(AtomicU64::new(0));
    if matches!(*source, Source::Input) && io::stdin().is_terminal() {
        tracing::info!("reading one message from the terminal, to its end (Ctrl-D)");
    }
    let messages = source
        .start(&bytes)
        .map_err(|error| Failure::system("can't start to read", &error))?;
    let run = Run {
        publisher,
        shares: VecDeque::new(),
        tally: Tally::default(),
        messages: Some(messages),
        progress: Progress::new(),
        extent: Extent::of(&source, bytes),
        source,
        timeout: options.timeout,
        missing: options.route.missing(),
    };
    run.run(&mut signals).await
}

/// Connects, declares and makes ready to publish; nothing when there is only something to declare.
async fn open(options: &QpublishOptions) -> Result<Option<Publisher>, Failure> {
    let queue = &options.route.routing_key;
    let connect = options.broker.connect(format!("qpublish {queue}"));
    let connection = Broker::new(options.broker.nodes.clone(), connect)
        .connect()
        .await?;
    if let Some(kind) = options.declare
        && let Err(failure) = declare(&connection, queue, kind, options.timeout).await
    {
        connection.close().await;
        return Err(failure);
    }
    if options.source.is_none() {
        tracing::info!(
            "queue {queue:?} is declared; nothing is published, as no message is given (with --declare, standard input is read by --lines or --file /dev/stdin)"
        );
        connection.close().await;
        return Ok(None);
    }
    let route = options.route.clone();
    let properties = options.properties.clone();
    Publisher::open(connection, route, properties, options.timeout)
        .await
        .map(Some)
}

/// Why publishing ended before everything was sent and answered.
enum Cause {
    /// The channel or the connection is gone.
    Lost(PublishError),
    /// The broker has confirmed nothing for too long.
    Stalled,
    /// The rest can't be read.
    Input(Failure),
    Signal {
        signal: Signal,
        /// It came before everything was sent.
        early: bool,
    },
}

struct Run {
    publisher: Publisher,
    /// The window's shares of the messages in flight, in their order.
    shares: VecDeque<OwnedSemaphorePermit>,
    tally: Tally,
    /// `None` when there are no more, or no more are wanted.
    messages: Option<Messages>,
    source: Arc<Source>,
    progress: Progress,
    extent: Extent,
    timeout: Duration,
    /// What is missing where a message is returned.
    missing: String,
}

impl Run {
    async fn run(mut self, signals: &mut Signals) -> anyhow::Result<u8> {
        let mut blocked = None;
        let cause = self.publish(signals, &mut blocked).await;
        self.progress.clear();
        let ended = self.conclude(cause, blocked.as_deref());
        // What was answered is answered: a signal only cuts the goodbye short.
        tokio::select! {
            biased;
            () = self.publisher.close() => {}
            _ = next_stop(signals) => {}
        }
        ended
    }

    /// Publishes until everything is answered, or nothing more is to be expected; gives what ended it early.
    async fn publish(
        &mut self,
        signals: &mut Signals,
        blocked: &mut Option<String>,
    ) -> Option<Cause> {
        let mut cause = None;
        let mut moved = Instant::now();
        let mut grace = None;
        loop {
            if self.messages.is_none() && self.tally.outstanding() == 0 {
                return cause;
            }
            let deadline = (self.tally.outstanding() > 0).then(|| {
                let stalled = moved + self.timeout;
                grace.map_or(stalled, |grace: Instant| grace.min(stalled))
            });
            tokio::select! {
                biased;
                signal = next_stop(signals) => {
                    if grace.is_some() {
                        return cause;
                    }
                    let early = self.messages.take().is_some();
                    grace = Some(Instant::now() + GRACE);
                    cause.get_or_insert(Cause::Signal { signal, early });
                }
                heard = self.publisher.next() => match heard {
                    Heard::Sent => {}
                    Heard::Answer(answer) => {
                        moved = Instant::now();
                        self.shares.pop_front();
                        self.tally.note(answer);
                        if self.tally.has_failed() {
                            self.messages = None;
                        }
                    }
                    Heard::Blocked(reason) => {
                        self.progress.clear();
                        tracing::warn!(
                            "the broker blocks publishers: {reason}; waiting for up to {} (--timeout)",
                            Span(self.timeout)
                        );
                        *blocked = Some(reason);
                    }
                    Heard::Unblocked => {
                        self.progress.clear();
                        tracing::info!("the broker takes messages again");
                        *blocked = None;
                    }
                    Heard::Lost(stop) => return Some(Cause::Lost(stop)),
                },
                read = next(&mut self.messages), if !self.publisher.is_sending() => {
                    if self.tally.outstanding() == 0 {
                        moved = Instant::now();
                    }
                    match read {
                        Some(Ok(message)) => {
                            self.tally.sent();
                            self.shares.push_back(message.share);
                            self.publisher.publish(message.body);
                        }
                        Some(Err(failure)) => {
                            self.messages = None;
                            cause.get_or_insert(Cause::Input(failure));
                        }
                        None => self.messages = None,
                    }
                }
                () = sleep_until_or_never(deadline) => return cause.or(Some(Cause::Stalled)),
                () = self.progress.due() => {
                    let confirmed = self.tally.confirmed();
                    self.progress.show(confirmed, self.extent.share(confirmed));
                }
            }
        }
    }

    /// The end of the story: what to tell, and with which status.
    fn conclude(&self, cause: Option<Cause>, blocked: Option<&str>) -> anyhow::Result<u8> {
        let failure = match (self.refusal(), cause) {
            (_, Some(Cause::Lost(stop))) => match stop.message {
                Some(message) => Failure::new(
                    stop.failure.exit,
                    format!("{} is {}", self.source.name(message), stop.failure),
                ),
                None => stop.failure,
            },
            (Some(refusal), _) => refusal,
            (None, Some(Cause::Stalled)) => {
                let why = match blocked {
                    Some(reason) => format!("the broker blocks publishers: {reason}"),
                    None => "the broker has confirmed nothing for so long".to_owned(),
                };
                Failure::new(
                    Exit::Lost,
                    format!("gave up after {} (--timeout): {why}", Span(self.timeout)),
                )
            }
            (None, Some(Cause::Input(failure))) => failure,
            (None, Some(Cause::Signal { signal, early }))
                if early || self.tally.without_gap().1.is_some() =>
            {
                let text = format!("stopped by {signal}; {}", self.summary());
                return Ok(stopped(signal, text));
            }
            (None, None | Some(Cause::Signal { .. })) => {
                tracing::info!("{} confirmed", messages(self.tally.total()));
                return Ok(0);
            }
        };
        Err(Failure::new(failure.exit, format!("{failure}; {}", self.summary())).into())
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
                let text = format!("{which} came back: {}", self.missing);
                Some(Failure::new(Exit::Config, text))
            }
            Gap::Refused => Some(Failure::new(
                Exit::Lost,
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
            messages(sent)
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

/// Says that a signal has ended it, and returns the status.
fn stopped(signal: Signal, text: String) -> u8 {
    let status = status_of_signal(signal as i32);
    RunSummary::without_message(status, text).report();
    status
}

/// How much there is to publish, as far as that is known: messages, or bytes of standard input.
struct Extent {
    messages: Option<u64>,
    bytes: Option<u64>,
    read: Arc<AtomicU64>,
}

impl Extent {
    fn of(source: &Source, read: Arc<AtomicU64>) -> Self {
        let file = || {
            let input: File = io::stdin().as_fd().try_clone_to_owned().ok()?.into();
            let found = input.metadata().ok()?;
            found.is_file().then_some(found.len())
        };
        Self {
            messages: source.messages(),
            bytes: file(),
            read,
        }
    }

    fn share(&self, confirmed: u64) -> Option<f64> {
        let (done, all) = match (self.messages, self.bytes) {
            (Some(messages), _) => (confirmed, messages),
            (None, Some(bytes)) => (self.read.load(Ordering::Relaxed), bytes),
            (None, None) => return None,
        };
        (all > 0).then(|| done as f64 / all as f64)
    }
}

fn messages(count: u64) -> String {
    match count {
        1 => "1 message".to_owned(),
        _ => format!("{count} messages"),
    }
}

/// The next message; none at the end.
async fn next(messages: &mut Option<Messages>) -> Option<Result<source::Message, Failure>> {
    match messages {
        Some(messages) => messages.recv().await,
        None => std::future::pending().await,
    }
}
