//! Durations in options, and optional deadlines.

use std::{
    future::{Future, pending},
    time::Duration,
};
use tokio::time::{Instant, sleep_until};

/// Ten years: more is a typo, and overflows clocks.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Parses `500ms`, `10s`, `5m`, `1h30m`, or plain seconds, which may have a fraction.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let plain = text.parse::<f64>().ok().map(Duration::try_from_secs_f64);
    let duration = match plain {
        Some(plain) => plain.map_err(|error| error.to_string()),
        None => humantime::parse_duration(text)
            .map_err(|_| "not a duration such as 500ms, 10s, 5m, 1h30m, or seconds".to_owned()),
    }?;
    if duration > LONGEST {
        return Err("longer than ten years".to_owned());
    }
    Ok(duration)
}

pub(crate) fn duration_above_zero(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err("must be more than 0".to_owned()),
        duration => Ok(duration),
    }
}

pub async fn sleep_until_or_never(deadline: Option<Instant>) {
    or_never(deadline.map(sleep_until)).await;
}

pub async fn or_never<F: Future>(future: Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => pending().await,
    }
}
