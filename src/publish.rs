//! qpublish: fills a queue, and says for certain what is in it.
//!
//! The story, top to bottom: connect, declare, read and publish, hear what became of each, report. Messages are persistent, and
//! mandatory unless somebody asks for the contrary, and the broker confirms each. So a message that no queue takes, which
//! amqp-publish loses without a word, is an error here.

mod options;
mod progress;
mod source;

pub use options::QpublishOptions;
#[cfg(fuzzing)]
pub use source::records;

use crate::{
    broker::{Gap, Publisher},
    exit::{Exit, Failure, status_of_signal},
    report::{RunSummary, counted},
    signals::{Signals, unless_stopped},
};
use nix::sys::signal::Signal;
use progress::Progress;
use source::Source;
use std::{mem, sync::Arc, time::Duration};
use tokio::time::timeout;

/// How long a signal leaves the broker to answer for what is in flight.
const GRACE: Duration = Duration::from_secs(3);

/// Publishes as the options say, and returns the exit status.
///
/// # Errors
/// Why not every message is confirmed.
pub async fn publish(mut options: QpublishOptions, mut signals: Signals) -> Result<u8, Failure> {
    let source = Arc::new(options.find_source()?);
    let mut broker = options.broker.connector(format!("qpublish {}", options.route.routing_key));
    let connection = match unless_stopped(&mut signals, broker.connect()).await {
        Ok(connected) => connected?,
        Err(signal) => {
            let summary = stopped(signal, " before anything was published");
            summary.report();
            return Ok(summary.status);
        }
    };
    let progress = Progress::new(options.output.shows_progress() && !source.is_typed(), source.total());
    let publisher = Publisher::new(connection, options.route, &options.properties, options.timeout);
    let mut run = Run { publisher, source, progress };
    let ended = run.run(options.declare.as_deref(), &mut signals).await;
    // What was answered is answered: a signal only cuts the goodbye short.
    let _ = unless_stopped(&mut signals, run.publisher.close()).await;
    let published @ (sent, confirmed) = (run.publisher.sent(), run.publisher.tally.confirmed());
    let summary = match ended {
        Ok(Some(signal)) => stopped(signal, &format!("; {}", run.summary())),
        Ok(None) => {
            match &*run.source {
                Source::Arguments(none) if none.is_empty() => tracing::info!(
                    "queue {:?} is declared; nothing is published, as no message is given (with --declare, standard input is read by --lines or --file /dev/stdin)",
                    run.publisher.route.routing_key
                ),
                _ => tracing::info!(
                    json.sent = sent,
                    json.confirmed = confirmed,
                    "{} confirmed",
                    counted(sent, "message", "messages")
                ),
            }
            return Ok(0);
        }
        Err(failure) => RunSummary::without_message(failure.exit.status(), format!("{failure}; {}", run.summary())),
    };
    RunSummary { published: Some(published), ..summary }.report();
    Ok(summary.status)
}

struct Run {
    publisher: Publisher,
    source: Arc<Source>,
    progress: Progress,
}

impl Run {
    /// Declares and publishes; returns the signal that came before everything was confirmed.
    async fn run(&mut self, declare: Option<&str>, signals: &mut Signals) -> Result<Option<Signal>, Failure> {
        let all = async {
            self.publisher.open(declare).await?;
            let start = Arc::clone(&self.source).start();
            self.publisher.messages = start.map_err(|error| Failure::system("can't start to read", &error))?;
            self.publish().await
        };
        let ended = match unless_stopped(signals, all).await {
            Ok(ended) => ended.map(|()| None),
            Err(signal) => {
                let is_early = mem::take(&mut self.publisher.is_reading);
                match unless_stopped(signals, timeout(GRACE, self.publish())).await {
                    Ok(Ok(Err(failure))) if !is_early => Err(failure),
                    _ => Ok((is_early || !self.publisher.is_idle()).then_some(signal)),
                }
            }
        };
        self.publisher.tally.gap.map_or(ended, |gap| Err(self.refusal(gap)))
    }

    async fn publish(&mut self) -> Result<(), Failure> {
        loop {
            tokio::select! {
                biased;
                ended = self.publisher.publish() => return ended.map_err(|(failure, message)| match message {
                    Some(message) => Failure::new(failure.exit, format!("{} is {failure}", self.source.name(message))),
                    None => failure,
                }),
                after = self.progress.due() => self.progress.say(after, &self.publisher.tally),
            }
        }
    }

    /// The failure that a returned or refused message is.
    fn refusal(&self, gap: Gap) -> Failure {
        let mut which = self.source.name(gap.first);
        if gap.last > gap.first {
            which += &format!(" or a later one, up to {},", self.source.name(gap.last));
        }
        if gap.refused {
            let why = "the queue is full (x-max-length with reject-publish), or can't take it for now";
            Failure::new(Exit::Unconfirmed, format!("{which} was refused: {why}"))
        } else {
            Failure::config(format!("{which} came back: {}", self.publisher.route.missing()))
        }
    }

    /// How many messages are safe, and where to go on.
    fn summary(&self) -> String {
        let (sent, tally) = (self.publisher.sent(), &self.publisher.tally);
        if sent == 0 {
            return "nothing was published".to_owned();
        }
        let (confirmed, without_gap) = (tally.confirmed(), tally.without_gap());
        let sent = counted(sent, "message", "messages");
        let mut text = format!("confirmed: {confirmed} of {sent} sent, {without_gap} from the start without a gap");
        if !matches!(*self.source, Source::Input) {
            text += &format!("; to resume, begin with {}", self.source.name(without_gap + 1));
        }
        if !self.publisher.is_idle() {
            text += "; what was sent and not confirmed may have arrived or not";
        }
        text
    }
}

/// The end of a run that a signal has ended.
fn stopped(signal: Signal, how_far: &str) -> RunSummary {
    RunSummary::without_message(status_of_signal(signal as i32), format!("stopped by {signal}{how_far}"))
}
