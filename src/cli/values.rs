//! What the values of options look like.

use crate::{broker::address::NAME_MAX, verdict::Statuses};
use std::time::Duration;

/// Longest time that an option may name: ten years. More than that is a slip of the finger, and overflows clocks.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// A switch's variable.
pub(crate) fn switch(text: &str) -> Result<bool, String> {
    match text.trim().to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Ok(true),
        "false" | "no" | "off" | "0" => Ok(false),
        _ => Err("not true or false, yes or no, on or off, 1 or 0".to_owned()),
    }
}

/// `500ms`, `10s`, `5m`, `1h30m`, or plain seconds, with a fraction if need be.
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

/// A duration where none at all makes no sense.
pub(crate) fn duration_above_zero(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err("must be more than nothing".to_owned()),
        duration => Ok(duration),
    }
}

/// What AMQP has a short string for.
pub(crate) fn name(text: &str) -> Result<String, String> {
    if text.len() > NAME_MAX {
        return Err(format!("has {} bytes; AMQP allows {NAME_MAX}", text.len()));
    }
    Ok(text.to_owned())
}

/// A queue's name, without the newline that a file behind the variable ends with.
pub(crate) fn queue_name(text: &str) -> Result<String, String> {
    let line = text.strip_suffix('\n').unwrap_or(text);
    name(
        line.strip_suffix('\r')
            .filter(|_| line != text)
            .unwrap_or(line),
    )
}

/// A list of statuses and ranges.
pub(crate) fn statuses(text: &str) -> Result<Statuses, String> {
    let number = |text: &str| match text.trim().parse::<u8>() {
        Ok(0) => Err("0 is no failure".to_owned()),
        Ok(number) => Ok(number),
        Err(_) => Err(format!("{text:?} is no status from 1 to 255")),
    };
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let range = number(first)?..=number(last)?;
        if range.is_empty() {
            return Err(format!(
                "{part:?} is no range: its end comes before its start"
            ));
        }
        Ok(range)
    };
    text.split(',')
        .map(range)
        .collect::<Result<_, _>>()
        .map(Statuses)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switches_are_told_in_any_usual_way_and_nothing_else() {
        for on in ["true", "YES", "On", "1", " true ", "true\n"] {
            assert_eq!(switch(on), Ok(true), "{on:?}");
        }
        for off in ["false", "No", "OFF", "0", "false ", "\t0"] {
            assert_eq!(switch(off), Ok(false), "{off:?}");
        }
        for wrong in [
            "",
            " ",
            "disabled",
            "null",
            "\"false\"",
            "f",
            "y",
            "2",
            "enabled",
        ] {
            assert!(switch(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_queues_name_may_end_with_one_newline() {
        for text in ["q", "q\n", "q\r\n"] {
            assert_eq!(queue_name(text).as_deref(), Ok("q"));
        }
        assert_eq!(queue_name("q\n\n").as_deref(), Ok("q\n"));
        assert_eq!(queue_name("q\r").as_deref(), Ok("q\r"));
        assert!(queue_name(&"q".repeat(256)).is_err());
    }
}
