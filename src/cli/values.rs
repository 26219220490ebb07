//! What the values of options look like.

pub(crate) use crate::broker::reach::address::name;

/// A switch's variable.
pub(crate) fn switch(text: &str) -> Result<bool, String> {
    match text.trim().to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Ok(true),
        "false" | "no" | "off" | "0" => Ok(false),
        _ => Err("not true or false, yes or no, on or off, 1 or 0".to_owned()),
    }
}

/// A queue's name, without the newline that a file behind the variable ends with.
pub(crate) fn queue_name(text: &str) -> Result<String, String> {
    let line = text.strip_suffix("\r\n").or(text.strip_suffix('\n'));
    name(line.unwrap_or(text))
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
