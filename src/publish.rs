//! qpublish: fills a queue, and reports which messages the broker has confirmed.
//!
//! Messages are persistent, and the broker confirms each. They are mandatory, so a message that no queue takes is an
//! error, where amqp-publish loses it without a word; with --no-mandatory, it is lost here, too.

mod input;
mod options;

#[cfg(fuzzing)]
pub use input::records;
pub use options::QpublishOptions;

use crate::{
    broker::{Confirms, NotQueued, OpenConnection, Publisher, Route},
    exit::{Exit, Failure, status_of_signal},
    program::Program,
    report::{HumanDuration, Reminder, RunSummary, counted, show_progress},
    signals::{Signals, unless_stopped},
};
use input::Input;
use nix::sys::signal::Signal;
use std::{
    mem::{replace, take},
    sync::Arc,
    time::Duration,
};
use tokio::time::{sleep, timeout};

/// After a stop signal: how long to wait for the messages in flight.
const GRACE: Duration = Duration::from_secs(3);

/// Publishes as the options say, and returns the exit status.
///
/// # Errors
/// If a file can't be read, or there is no connection.
pub async fn publish(mut options: QpublishOptions, mut signals: Signals) -> Result<u8, Failure> {
    let input = Arc::new(take(&mut options.input).complete(options.route.declare.is_some())?);
    let mut connector = options.broker.connector(format!("qpublish {}", options.route.routing_key));
    let mut connection = match unless_stopped(&mut signals, connector.connect()).await {
        Ok(connected) => connected?,
        Err(signal) => return Ok(report_end(Ok(Some(signal)), &Confirms::default(), &input, &options.route)),
    };
    let mut publisher = None;
    let ended = run(&mut publisher, &mut connection, &options, &input, &mut signals).await;
    let confirms = publisher.map(|publisher| publisher.confirms).unwrap_or_default();
    // The confirms are counted: a signal now only shortens the closing.
    let _ = unless_stopped(&mut signals, connection.close()).await;
    Ok(report_end(ended, &confirms, &input, &options.route))
}

/// Declares, and publishes until there is no more, a message is returned or nacked, or a stop signal comes; then waits
/// for the messages in flight, after a signal for [`GRACE`] only. Returns the signal, unless the reading had ended
/// before it and all answers came within [`GRACE`]: then as if no signal had come.
async fn run<'a>(
    publisher: &mut Option<Publisher<'a>>,
    connection: &'a mut OpenConnection,
    options: &'a QpublishOptions,
    input: &Arc<Input>,
    signals: &mut Signals,
) -> Result<Option<Signal>, Failure> {
    let QpublishOptions { route, properties, output, .. } = options;
    let on_terminal = output.shows_progress() && !input.is_typed();
    let name = |number| input.name(number);
    let mut bodies = None;
    let publish_all = async {
        let opened = Publisher::open(connection, route, properties, options.timeout).await?;
        let publisher = publisher.insert(opened);
        bodies = Some(input.start(publisher.properties_size)?);
        let (mut reminder, mut confirmed_before) = (Reminder::default(), 0);
        loop {
            tokio::select! {
                biased;
                ended = publisher.run(&mut bodies, name) => return ended,
                () = sleep(Duration::from_secs(1)), if on_terminal => {
                    let confirmed = publisher.confirms.confirmed();
                    let rate = confirmed.saturating_sub(replace(&mut confirmed_before, confirmed));
                    show_progress(&input.progress(&publisher.confirms, rate));
                }
                time = reminder.due(), if !on_terminal => {
                    let confirmed = counted(publisher.confirms.confirmed(), "message", "messages");
                    tracing::info!("still publishing, for {} now: {confirmed} confirmed", HumanDuration(time));
                }
            }
        }
    };
    let signal = match unless_stopped(signals, publish_all).await {
        Ok(ended) => return ended.map(|()| None),
        Err(signal) => signal,
    };
    let Some(publisher) = publisher else { return Ok(Some(signal)) };
    // Stops the reading, unless it has ended: with the last message, a failure, or a message that no queue took.
    let reading_had_ended = bodies.take().is_none();
    // A second signal ends this wait.
    match timeout(GRACE, unless_stopped(signals, publisher.run(&mut bodies, name))).await {
        Ok(Ok(ended)) if reading_had_ended => ended.map(|()| None),
        _ => Ok(Some(signal)),
    }
}

/// Logs how the run has ended, writes the termination message of a failure, and returns the exit status.
fn report_end(ended: Result<Option<Signal>, Failure>, confirms: &Confirms, input: &Input, route: &Route) -> u8 {
    // A returned or nacked message is the reason to report, whatever else has happened.
    let ended = confirms.not_queued.map_or(ended, |message| Err(not_queued(message, input, route)));
    let (sent, confirmed) = (confirms.sent(), confirms.confirmed());
    let (status, why) = match ended {
        Err(failure) => (failure.exit.status(), failure.message),
        Ok(Some(signal)) => (status_of_signal(signal as i32), format!("stopped by {signal}")),
        Ok(None) => {
            let text = format!("{} confirmed", counted(sent, "message", "messages"));
            let source = Program::Qpublish.name();
            // Not by `RunSummary`, which adds the status and the source to the text, too: a success needs neither.
            tracing::info!(
                json.sent = sent,
                json.confirmed = confirmed,
                json.status = 0,
                json.source = source,
                "{text}"
            );
            return 0;
        }
    };
    let text = format!("{why}; {}", how_far(confirms, input));
    RunSummary { published: Some((sent, confirmed)), ..RunSummary::without_message(status, text) }.report();
    status
}

fn not_queued(message: NotQueued, input: &Input, route: &Route) -> Failure {
    let (first, last) = (input.name(message.first), input.name(message.last));
    let is_range = message.last > message.first;
    if message.nacked {
        let why = "the queue is full (x-max-length with reject-publish), or can't take it for now";
        let also =
            if is_range { format!("; a message was returned, too: {first} or a later one") } else { String::new() };
        Failure::new(Exit::Unconfirmed, format!("{last} was refused: {why}{also}"))
    } else {
        let which = if is_range { format!("{first} or a later one, up to {last},") } else { first };
        Failure::config(format!("{which} was returned: {}", route.why_returned()))
    }
}

/// How many messages are confirmed, and where to go on.
fn how_far(confirms: &Confirms, input: &Input) -> String {
    if confirms.sent() == 0 {
        return "nothing was published".to_owned();
    }
    let (sent, without_gap) = (counted(confirms.sent(), "message", "messages"), confirms.without_gap());
    let mut text = format!(
        "confirmed: {} of {sent} sent, {without_gap} from the start without a gap; to resume, begin with {}",
        confirms.confirmed(),
        input.name(without_gap + 1)
    );
    if confirms.any_in_flight() {
        text += "; what was sent and not confirmed may have arrived or not";
    }
    text
}
