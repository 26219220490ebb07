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
    broker::{Body, Confirms, NotQueued, Publisher, Route},
    exit::{Exit, Failure, status_of_signal},
    program::Program,
    report::{RunSummary, counted},
    signals::{Signals, unless_stopped},
};
use nix::sys::signal::Signal;
use progress::Progress;
use source::Source;
use std::{sync::Arc, time::Duration};
use tokio::{sync::mpsc::Receiver, time::timeout};

/// After a stop signal: how long to wait for the messages in flight.
const GRACE: Duration = Duration::from_secs(3);

/// Publishes as the options say, and returns the exit status.
///
/// # Errors
/// If a file can't be read, or there is no connection.
pub async fn publish(options: QpublishOptions, mut signals: Signals) -> Result<u8, Failure> {
    let source = Arc::new(options.input.into_source(options.declare.is_some())?);
    let mut connector = options.broker.connector(format!("qpublish {}", options.route.routing_key));
    let connection = match unless_stopped(&mut signals, connector.connect()).await {
        Ok(connected) => connected?,
        Err(signal) => {
            let (status, why) = stopped(signal);
            RunSummary::without_message(status, format!("{why} before anything was published")).report();
            return Ok(status);
        }
    };
    let progress = Progress::new(options.output.shows_progress() && !source.is_typed(), source.total());
    let mut publisher = Publisher::new(connection, options.route, &options.properties, options.timeout);
    let ended = publish_all(&mut publisher, options.declare.as_deref(), &source, progress, &mut signals).await;
    // The confirms are counted: a signal now only shortens the closing.
    let _ = unless_stopped(&mut signals, publisher.connection.close()).await;
    let (confirms, route) = (&publisher.confirms, &publisher.route);
    let (sent, confirmed) = (confirms.sent(), confirms.confirmed());
    // A returned or nacked message is the reason to report, whatever else has happened.
    let ended = confirms.not_queued.map_or(ended, |message| Err(not_queued(message, route, &source)));
    let (status, why) = match ended {
        Err(failure) => (failure.exit.status(), failure.message),
        Ok(Some(signal)) => stopped(signal),
        Ok(None) => {
            let text = match &*source {
                Source::Arguments(messages) if messages.is_empty() => format!(
                    "queue {:?} is declared; nothing is published, as no message is given \
                     (with --declare, standard input is read by --lines or --file /dev/stdin)",
                    route.routing_key
                ),
                _ => format!("{} confirmed", counted(sent, "message", "messages")),
            };
            // Not by `RunSummary`: a success writes no termination message here, and its fields are in JSON only.
            let source = Program::Qpublish.name();
            tracing::info!(
                json.sent = sent,
                json.confirmed = confirmed,
                json.status = 0,
                json.source = source,
                "{text}"
            );
            return Ok(0);
        }
    };
    let summary = RunSummary::without_message(status, format!("{why}; {}", how_far(confirms, &source)));
    RunSummary { published: Some((sent, confirmed)), ..summary }.report();
    Ok(status)
}

/// Declares, and publishes until there is no more, a message is returned or nacked, or a stop signal comes; then waits
/// for the messages in flight, after a signal for [`GRACE`] only. Returns the signal, unless everything was read before
/// it and is answered by then.
async fn publish_all(
    publisher: &mut Publisher,
    declare: Option<&str>,
    source: &Arc<Source>,
    mut progress: Progress,
    signals: &mut Signals,
) -> Result<Option<Signal>, Failure> {
    match unless_stopped(signals, publisher.open(declare)).await {
        Ok(opened) => opened?,
        Err(signal) => return Ok(Some(signal)),
    }
    let mut bodies = Some(source.start().map_err(|error| Failure::system("can't start to read", &error))?);
    let mut run = async |bodies: &mut Option<Receiver<Body>>| loop {
        tokio::select! {
            biased;
            ended = publisher.run(bodies, |number| source.name(number)) => return ended,
            () = progress.due() => progress.show(&publisher.confirms),
        }
    };
    let signal = match unless_stopped(signals, run(&mut bodies)).await {
        Ok(ended) => return ended.map(|()| None),
        Err(signal) => signal,
    };
    let all_was_read = bodies.take().is_none();
    // A second signal ends this wait.
    match timeout(GRACE, unless_stopped(signals, run(&mut bodies))).await {
        Ok(Ok(ended)) if all_was_read => ended.map(|()| None),
        _ => Ok(Some(signal)),
    }
}

/// The failure for a returned or nacked message.
fn not_queued(message: NotQueued, route: &Route, source: &Source) -> Failure {
    let mut which = source.name(message.first);
    if message.last > message.first {
        which += &format!(" or a later one, up to {},", source.name(message.last));
    }
    if message.nacked {
        let why = "the queue is full (x-max-length with reject-publish), or can't take it for now";
        Failure::new(Exit::Unconfirmed, format!("{which} was refused: {why}"))
    } else {
        Failure::config(format!("{which} was returned: {}", route.why_returned()))
    }
}

/// How many messages are confirmed, and where to go on.
fn how_far(confirms: &Confirms, source: &Source) -> String {
    if confirms.sent() == 0 {
        return "nothing was published".to_owned();
    }
    let (confirmed, without_gap) = (confirms.confirmed(), confirms.without_gap());
    let sent = counted(confirms.sent(), "message", "messages");
    let mut text = format!("confirmed: {confirmed} of {sent} sent, {without_gap} from the start without a gap");
    if !matches!(source, Source::Input(_)) {
        text += &format!("; to resume, begin with {}", source.name(without_gap + 1));
    }
    if !confirms.none_in_flight() {
        text += "; what was sent and not confirmed may have arrived or not";
    }
    text
}

/// The status and the reason of a run that a signal ended.
fn stopped(signal: Signal) -> (u8, String) {
    (status_of_signal(signal as i32), format!("stopped by {signal}"))
}
