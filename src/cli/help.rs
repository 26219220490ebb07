//! Makes clap's help fit a terminal of 80 columns. clap's own feature for that costs 30 KiB.

use super::AMQP_TOOLS;

/// What every terminal has.
const WIDTH: usize = 80;

/// The help, wrapped, with amqp-tools' options as the last ones; the short one with variables in short, and without
/// their values.
pub(super) fn fitted(help: &str, short: bool) -> String {
    let (mut text, mut for_last) = (String::new(), String::new());
    let mut heading = "";
    for line in help.lines() {
        if !line.is_empty() && !line.starts_with(' ') {
            heading = line.split(':').next().unwrap_or_default();
        }
        if heading == "Exit status" {
            text.push_str(&for_last);
            for_last.clear();
        }
        let part = if heading == AMQP_TOOLS {
            &mut for_last
        } else {
            &mut text
        };
        if short {
            wrap(part, &in_short(line));
        } else {
            wrap(part, line.trim_end());
        }
    }
    text.push_str(&for_last);
    text
}

/// `[env: QUEUE=job1]` as `[$QUEUE]`.
fn in_short(line: &str) -> String {
    let Some((before, rest)) = line.split_once("[env: ") else {
        return line.to_owned();
    };
    let (variable, after) = rest.split_once(']').unwrap_or((rest, ""));
    let name = variable.split('=').next().unwrap_or(variable);
    format!("{before}[${name}]{after}")
}

/// Adds a line, or the several that it takes: those behind the first begin where its text does.
fn wrap(text: &mut String, line: &str) {
    let margin = line.len() - line.trim_start().len();
    // An option's text is set off from it by two spaces at least.
    let indent = line[margin..].find("  ").map_or(margin, |gap| {
        let gap = margin + gap;
        gap + line[gap..].len() - line[gap..].trim_start().len()
    });
    let mut width = line[..indent].chars().count();
    text.push_str(&line[..indent]);
    let mut first = true;
    for word in words(&line[indent..]) {
        let length = word.chars().count();
        if !first && width + 1 + length > WIDTH {
            text.push('\n');
            text.extend(std::iter::repeat_n(' ', indent));
            width = indent;
        } else if !first {
            text.push(' ');
            width += 1;
        }
        text.push_str(word);
        width += length;
        first = false;
    }
    text.push('\n');
}

/// The words of a line; what is in brackets, as `[default: 10s]`, is one.
fn words(line: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0_usize;
    line.split(move |c| {
        match c {
            '[' => depth += 1,
            ']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ' ' && depth == 0
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_wrapped_where_their_text_begins() {
        let line = format!("  -x, --option <X>  {}end [env: A=b c]", "word ".repeat(14));
        let expected = format!(
            "  -x, --option <X>  {}\n{}word word end [env: A=b c]\n",
            "word ".repeat(12).trim_end(),
            " ".repeat(20)
        );
        assert_eq!(fitted(&line, false), expected);
    }

    #[test]
    fn what_is_in_brackets_stays_together() {
        let line = format!("          {}[default: a b]", "word ".repeat(12));
        assert!(fitted(&line, false).ends_with("\n          [default: a b]\n"));
    }

    #[test]
    fn in_short_a_variable_has_no_value() {
        assert_eq!(
            fitted("  -q  The queue [env: QUEUE=job1] [default: x]", true),
            "  -q  The queue [$QUEUE] [default: x]\n"
        );
    }

    #[test]
    fn amqp_tools_options_come_last() {
        let text =
            format!("One:\n  -a\n\n{AMQP_TOOLS}:\n  -b\n\nTwo:\n  -c\n\nExit status:\n  0\n");
        let sorted =
            format!("One:\n  -a\n\nTwo:\n  -c\n\n{AMQP_TOOLS}:\n  -b\n\nExit status:\n  0\n");
        assert_eq!(fitted(&text, false), sorted);
    }

    #[test]
    fn what_fits_is_left_as_it_is() {
        let text = "Usage: qconsume [OPTIONS] [--] COMMAND [ARG]...\n\nOptions:\n  -h, --help     Print help\n";
        assert_eq!(fitted(text, false), text);
        assert_eq!(fitted(text, true), text);
    }
}
