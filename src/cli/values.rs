//! The values of options, from flags and from variables.

pub(crate) use crate::broker::reach::address::amqp_name;

pub(crate) fn switch(text: &str) -> Result<bool, String> {
    match text.trim().to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Ok(true),
        "false" | "no" | "off" | "0" => Ok(false),
        _ => Err("not true or false, yes or no, on or off, 1 or 0".to_owned()),
    }
}

/// Drops one newline at the end: variables that are filled from a file have one.
pub(crate) fn queue_name(text: &str) -> Result<String, String> {
    let line = text.strip_suffix("\r\n").or(text.strip_suffix('\n'));
    amqp_name(line.unwrap_or(text))
}

/// An empty variable counts as unset, except BROKER_URL and QUEUE (an error) and QCONSUME_TERMINATION_LOG (turns it
/// off).
pub(super) fn without_empty_variables(command: clap::Command) -> clap::Command {
    const MAY_BE_EMPTY: [&str; 3] = ["BROKER_URL", "QUEUE", "QCONSUME_TERMINATION_LOG"];
    let mut empty: Vec<_> = std::env::vars_os().filter(|(_, value)| value.is_empty()).map(|(name, _)| name).collect();
    empty.retain(|name| !MAY_BE_EMPTY.iter().any(|known| name == known));
    if empty.is_empty() {
        return command;
    }
    command.mut_args(|arg| match arg.get_env() {
        Some(name) if empty.iter().any(|empty| empty == name) => arg.env(None),
        _ => arg,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switches_take_the_usual_words_and_no_others() {
        for on in ["true", "YES", "On", "1", " true ", "true\n"] {
            assert_eq!(switch(on), Ok(true), "{on:?}");
        }
        for off in ["false", "No", "OFF", "0", "false ", "\t0"] {
            assert_eq!(switch(off), Ok(false), "{off:?}");
        }
        for wrong in ["", " ", "disabled", "null", "\"false\"", "f", "y", "2", "enabled"] {
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
