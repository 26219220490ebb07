//! qpublish: fills a queue, and reports which messages the broker has confirmed.
//!
//! It connects, declares, reads, publishes, waits for the confirms and reports. Messages are persistent, and mandatory
//! unless --no-mandatory is given, and the broker confirms each. So a message that no queue takes, which amqp-publish
//! loses without a word, is an error here.

mod options;
mod progress;
mod source;

pub use options::QpublishOptions;
#[cfg(fuzzing)]
pub use source::records;

use crate::{
    broker::{NotQueued, Publisher},
    clock::sleep_until_or_never,
    exit::{Exit, Failure, status_of_signal},
    program::Program,
    report::{RunSummary, counted},
    signals::{Signals, next_stop, unless_stopped},
};
use nix::sys::signal::Signal;
use progress::Progress;
use source::Source;
use std::{mem, time::Duration};
use tokio::time::Instant;

/// After a stop signal: how long to wait for the messages in flight.
const GRACE: Duration = Duration::from_secs(3);

/// Publishes as the options say, and returns the exit status.
///
/// # Errors
/// If a file can't be read, or there is no connection.
pub async fn publish(mut options: QpublishOptions, mut signals: Signals) -> Result<u8, Failure> {
    let source = options.input.take_source(options.declare.is_some())?;
    let mut connector = options.broker.connector(format!("qpublish {}", options.route.routing_key));
    let connection = match unless_stopped(&mut signals, connector.connect()).await {
        Ok(connected) => connected?,
        Err(signal) => {
            let summary = stopped(signal, " before anything was published");
            summary.report();
            return Ok(summary.status);
        }
    };
    let progress = Progress::new(options.output.shows_progress() && !source.is_typed(), source.total());
    let mut publisher = Publisher::new(connection, options.route, &options.properties, options.timeout);
    let ended = publish_all(&mut publisher, options.declare.as_deref(), &source, progress, &mut signals).await;
    // The confirms are counted: a signal now only shortens the closing.
    let _ = unless_stopped(&mut signals, publisher.connection.close()).await;
    let (sent, confirmed) = (publisher.sent(), publisher.confirms.confirmed());
    // A returned or nacked message is the reason to report, whatever else has happened.
    let ended = publisher.confirms.not_queued.map_or(ended, |message| Err(not_queued(message, &publisher, &source)));
    let summary = match ended {
        Err(failure) => {
            let text = format!("{failure}; {}", how_far(&publisher, &source));
            RunSummary::without_message(failure.exit.status(), text)
        }
        Ok(Some(signal)) => stopped(signal, &format!("; {}", how_far(&publisher, &source))),
        Ok(None) => {
            let text = match &source {
                Source::Arguments(messages) if messages.is_empty() => format!(
                    "queue {:?} is declared; nothing is published, as no message is given \
                     (with --declare, standard input is read by --lines or --file /dev/stdin)",
                    publisher.route.routing_key
                ),
                _ => format!("{} confirmed", counted(sent, "message", "messages")),
            };
            // Not by `RunSummary`: a success writes no termination message here, and its fields are in JSON only.
            let (status, source) = (0, Program::current().name());
            tracing::info!(
                json.sent = sent,
                json.confirmed = confirmed,
                json.status = status,
                json.source = source,
                "{text}"
            );
            return Ok(status);
        }
    };
    RunSummary { published: Some((sent, confirmed)), ..summary }.report();
    Ok(summary.status)
}

/// Declares, then publishes until there is no more, a message is returned or nacked, or a stop signal comes; then waits
/// for the messages in flight. Returns the signal if it came before everything was read and confirmed.
async fn publish_all(
    publisher: &mut Publisher,
    declare: Option<&str>,
    source: &Source,
    mut progress: Progress,
    signals: &mut Signals,
) -> Result<Option<Signal>, Failure> {
    match unless_stopped(signals, publisher.open(declare)).await {
        Ok(opened) => opened?,
        Err(signal) => return Ok(Some(signal)),
    }
    let mut messages = source.start().map_err(|error| Failure::system("can't start to read", &error))?;
    let mut is_reading = true;
    // The first stop signal, and until when to wait after it.
    let mut stop: Option<(Signal, Instant)> = None;
    // What the run ends with once everything in flight is answered.
    let mut ended = Ok(None);
    while is_reading || !publisher.none_in_flight() {
        tokio::select! {
            biased;
            signal = next_stop(signals) => match stop {
                Some((first, _)) => return Ok(Some(first)),
                None => {
                    stop = Some((signal, Instant::now() + GRACE));
                    if mem::take(&mut is_reading) {
                        ended = Ok(Some(signal));
                    }
                }
            },
            () = sleep_until_or_never(stop.map(|(_, end)| end)) => return Ok(stop.map(|(signal, _)| signal)),
            next = publisher.next() => match next {
                Ok(()) => is_reading &= publisher.confirms.not_queued.is_none(),
                // Stopped already, so the loss changes nothing.
                Err(_) if matches!(ended, Ok(Some(_))) => return ended,
                Err((failure, None)) => return Err(failure),
                Err((failure, Some(message))) => {
                    return Err(Failure::new(failure.exit, format!("{}: {failure}", source.name(message))));
                }
            },
            () = progress.due() => progress.show(&publisher.confirms),
            message = messages.recv(), if is_reading && publisher.is_ready() => match message {
                Some(Ok((body, permit))) => publisher.send(body, permit),
                Some(Err(failure)) => (is_reading, ended) = (false, Err(failure)),
                None => is_reading = false,
            },
        }
    }
    ended
}

/// The failure for a returned or nacked message.
fn not_queued(message: NotQueued, publisher: &Publisher, source: &Source) -> Failure {
    let mut which = source.name(message.first);
    if message.last > message.first {
        which += &format!(" or a later one, up to {},", source.name(message.last));
    }
    if message.nacked {
        let why = "the queue is full (x-max-length with reject-publish), or can't take it for now";
        Failure::new(Exit::Unconfirmed, format!("{which} was refused: {why}"))
    } else {
        Failure::config(format!("{which} was returned: {}", publisher.route.why_returned()))
    }
}

/// How many messages are confirmed, and where to go on.
fn how_far(publisher: &Publisher, source: &Source) -> String {
    let (sent, confirms) = (publisher.sent(), &publisher.confirms);
    if sent == 0 {
        return "nothing was published".to_owned();
    }
    let (confirmed, without_gap) = (confirms.confirmed(), confirms.without_gap());
    let sent = counted(sent, "message", "messages");
    let mut text = format!("confirmed: {confirmed} of {sent} sent, {without_gap} from the start without a gap");
    if !matches!(source, Source::Input) {
        text += &format!("; to resume, begin with {}", source.name(without_gap + 1));
    }
    if !publisher.none_in_flight() {
        text += "; what was sent and not confirmed may have arrived or not";
    }
    text
}

fn stopped(signal: Signal, how_far: &str) -> RunSummary {
    RunSummary::without_message(status_of_signal(signal as i32), format!("stopped by {signal}{how_far}"))
}
