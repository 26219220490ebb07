//! What a worker's log says about a message.

/// The number of the message that this line says was acknowledged.
pub(super) fn acknowledged(line: &str) -> Option<u64> {
    let (_, rest) = line.split_once("message acknowledged")?;
    let (_, id) = rest.split_once("id=\"")?;
    id.split_once('"')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_number_of_an_acknowledged_message_is_found() {
        let line = r#"qconsume: command succeeded; message acknowledged id="17" attempt=1 size=3 seconds=0.1 status=0"#;
        assert_eq!(super::acknowledged(line), Some(17));
        assert_eq!(
            super::acknowledged(r#"qconsume: message taken id="17""#),
            None
        );
    }
}
