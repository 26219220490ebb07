//! Writes the files that are generated from the programs' command lines: `docs/options.md` and the tables of exit
//! statuses. With a folder as its argument, it writes the man pages and the shell completions to that folder instead.

use anyhow::{Context, Result};
use clap::{Arg, ArgAction, Command};
use clap_complete::Shell;
use qconsume::{
    Program,
    cli::{QconsumeOptions, command_line},
    exit,
    publish::QpublishOptions,
};
use std::{
    collections::HashSet,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

/// The page of options.
const PAGE: &str = "docs/options.md";

/// The first sections, in this order; all others follow.
const SECTIONS: [&str; 7] = ["Broker", "TLS", "Destination", "Taking", "Running", "Settling", "Output"];

/// The pages with tables of exit statuses between markers.
const PAGES_WITH_STATUSES: [&str; 2] = ["README.md", "docs/exit-statuses.md"];

fn main() -> Result<()> {
    let Some(folder) = std::env::args_os().nth(1) else {
        write(PAGE, &page())?;
        return PAGES_WITH_STATUSES.iter().try_for_each(|page| write(page, &with_statuses(&read(page)?)?));
    };
    manuals(&PathBuf::from(folder))
}

fn read(page: &str) -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(page);
    fs::read_to_string(&path).with_context(|| path.display().to_string())
}

fn write(page: &str, text: &str) -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(page);
    fs::write(&path, text).with_context(|| path.display().to_string())
}

/// The page with new tables, for each program that it has markers for.
fn with_statuses(page: &str) -> Result<String> {
    let mut page = page.to_owned();
    for program in [Program::Qconsume, Program::Qpublish] {
        let begin = format!("<!-- exit statuses of {} -->\n", program.name());
        let Some((head, rest)) = page.split_once(&begin) else {
            continue;
        };
        let end = "<!-- end of exit statuses -->";
        let (_, tail) = rest.split_once(end).with_context(|| format!("no {end} after {begin}"))?;
        page = format!("{head}{begin}{}{end}{tail}", statuses(program));
    }
    Ok(page)
}

fn statuses(program: Program) -> String {
    let mut table = "| status | meaning | does a retry help? |\n|---|---|---|\n".to_owned();
    for (status, meaning, retry) in exit::table(program) {
        let words: Vec<_> = meaning.split(' ').map(code).collect();
        let _ = writeln!(table, "| {status} | {} | {retry} |", words.join(" "));
    }
    table
}

/// Marks options and variables as code.
fn code(word: &str) -> String {
    let bare = word.trim_end_matches([',', ';', ':']);
    if bare.starts_with("--") || matches!(bare, "BROKER_URL" | "QUEUE") {
        format!("`{bare}`{}", &word[bare.len()..])
    } else {
        word.to_owned()
    }
}

fn programs() -> [Command; 2] {
    [command_line::<QconsumeOptions>(), command_line::<QpublishOptions>()]
}

/// `man/*.1` and `completions/*` in this folder.
fn manuals(folder: &Path) -> Result<()> {
    let (man, completions) = (folder.join("man"), folder.join("completions"));
    for folder in [&man, &completions] {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    for mut command in programs() {
        let name = command.get_name().to_owned();
        for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
            clap_complete::generate_to(shell, &mut command, &name, &completions)?;
        }
        let path = man.join(format!("{name}.1"));
        fs::write(&path, manual(command)?).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// The man page. Exit statuses and examples get sections of their own, as the help has broken their lines for a
/// terminal.
fn manual(command: Command) -> Result<Vec<u8>> {
    let after = command.get_after_long_help().map(ToString::to_string);
    let after = after.unwrap_or_default();
    let examples = after.split_once("Examples:\n").map(|(_, text)| text);
    let program = Program::called(Some(command.get_name().as_ref()));
    let page = clap_mangen::Man::new(for_everybody(command));
    let mut roff = Vec::new();
    page.render_title(&mut roff)?;
    page.render_name_section(&mut roff)?;
    page.render_synopsis_section(&mut roff)?;
    page.render_description_section(&mut roff)?;
    page.render_options_section(&mut roff)?;
    roff.extend(b".SH \"EXIT STATUS\"\n");
    for (status, meaning, _) in exit::table(program) {
        roff.extend(format!(".TP\n.B {status}\n{}\n", roff_text(meaning)).bytes());
    }
    if let Some(examples) = examples {
        roff.extend(format!(".SH EXAMPLES\n.nf\n{}\n.fi\n", roff_text(examples.trim_end())).bytes());
    }
    page.render_version_section(&mut roff)?;
    Ok(roff)
}

/// Escapes text for roff: dashes would become hyphens, and some lines would become requests.
fn roff_text(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    let lines: Vec<_> = text
        .lines()
        .map(|line| if line.starts_with(['.', '\'']) { format!("\\&{line}") } else { line.to_owned() })
        .collect();
    lines.join("\n")
}

/// Hides the values that variables have on this machine, and shows the text of every option: clap_mangen 0.3 leaves it
/// out if the short help hides the option and the text is a single paragraph.
fn for_everybody(command: Command) -> Command {
    command.mut_args(|arg| arg.hide_env_values(true).hide_short_help(false))
}

fn page() -> String {
    let mut page = "# Options and variables

Generated from the programs' own definitions by `make docs`: don't edit.

A flag takes precedence over its variable, and the variable over the default. Durations are `500ms`, `10s`, `5m`, `1h30m`, or
plain seconds. See [exit-statuses.md](exit-statuses.md) for exit statuses, and
[settling-and-retries.md](settling-and-retries.md) for what happens to messages.
"
    .to_owned();
    for command in programs() {
        program(&mut page, &command);
    }
    page
}

fn program(page: &mut String, command: &Command) {
    let about = command.get_about().map(ToString::to_string);
    let _ = write!(page, "\n## {}\n\n{}.\n", command.get_name(), about.unwrap_or_default().trim_end_matches('.'));
    let mut sections: Vec<&str> = SECTIONS.to_vec();
    let shown = |arg: &&Arg| !arg.is_positional() && !arg.is_hide_set();
    let all: Vec<&Arg> = command.get_arguments().filter(shown).collect();
    sections.extend(all.iter().filter_map(|arg| arg.get_help_heading()));
    let mut seen = HashSet::new();
    sections.retain(|section| seen.insert(*section));
    for section in sections {
        let args: Vec<_> = all.iter().filter(|arg| arg.get_help_heading() == Some(section)).collect();
        if args.is_empty() {
            continue;
        }
        let _ = write!(page, "\n### {section}\n\n| option | variable | default | |\n|---|---|---|---|\n");
        for arg in args {
            row(page, arg);
        }
    }
}

fn row(page: &mut String, arg: &Arg) {
    let mut option = String::new();
    if let Some(short) = arg.get_short() {
        let _ = write!(option, "`-{short}`, ");
    }
    let takes = arg.get_action().takes_values();
    let value = arg.get_value_names().filter(|_| takes).unwrap_or_default();
    let _ = write!(option, "`--{}", arg.get_long().unwrap_or_default());
    for name in value {
        // The value needs the equals sign: qpublish would take the next word as a message.
        let _ = match arg.is_require_equals_set() {
            true => write!(option, "[={name}]"),
            false => write!(option, " {name}"),
        };
    }
    option.push('`');
    let variable = arg.get_env().map(|name| name.to_string_lossy());
    let default: Vec<_> = arg
        .get_default_values()
        .iter()
        .filter(|_| !matches!(arg.get_action(), ArgAction::SetTrue))
        .filter(|value| !value.is_empty())
        .map(|value| value.to_string_lossy())
        .collect();
    let (help, said) = help(arg);
    let default = if default.is_empty() { said } else { Some(default.join(", ")) };
    let code = |text: Option<String>| text.map_or_else(String::new, |text| format!("`{text}`"));
    let _ = writeln!(
        page,
        "| {option} | {} | {} | {} |",
        code(variable.map(|name| name.into_owned())),
        default.map_or_else(String::new, |text| if text.contains(' ') { text } else { format!("`{text}`") }),
        help.replace('|', "\\|")
    );
}

/// The text as sentences, and the default if the text says it.
fn help(arg: &Arg) -> (String, Option<String>) {
    let text = arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default();
    let mut default = None;
    let mut sentences: Vec<String> = Vec::new();
    for part in text.split("\n\n") {
        let mut part = part.replace('\n', " ");
        if let Some((before, rest)) = part.clone().split_once(" [default: ")
            && let Some((value, after)) = rest.split_once(']')
        {
            default = Some(value.to_owned());
            part = format!("{before}{after}");
        }
        sentences.push(format!("{}.", part.trim_end_matches('.')));
    }
    let values: Vec<_> = arg
        .get_possible_values()
        .iter()
        .filter(|_| arg.get_action().takes_values())
        .map(|value| match value.get_help() {
            Some(help) => format!("`{}`: {help}", value.get_name()),
            None => format!("`{}`", value.get_name()),
        })
        .collect();
    if !values.is_empty() {
        sentences.push(format!("{}.", values.join("; ")));
    }
    (sentences.join(" "), default)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_of_options_is_up_to_date() {
        let found = read(PAGE).unwrap_or_default();
        assert!(found == page(), "{PAGE} is stale: make docs");
    }

    #[test]
    fn a_default_that_is_empty_is_not_shown() {
        let row = page().lines().find(|line| line.contains("`--queue NAME`")).map(str::to_owned);
        let row = row.expect("there is the option");
        assert!(row.contains("| `QUEUE` |  |"), "{row}");
    }

    #[test]
    fn the_tables_of_exit_statuses_are_up_to_date() {
        for page in PAGES_WITH_STATUSES {
            let found = read(page).expect("the page is there");
            assert!(found.contains("<!-- exit statuses of qconsume -->"), "{page}");
            let new = with_statuses(&found).expect("it has its markers");
            assert!(found == new, "{page} is stale: make docs");
        }
    }

    #[test]
    fn every_option_but_the_port_has_a_variable_of_its_own() {
        let mut variables = HashSet::new();
        for arg in command_line::<QconsumeOptions>().get_arguments() {
            let no_run = matches!(arg.get_action(), ArgAction::Help | ArgAction::HelpShort | ArgAction::Version);
            if arg.is_positional() || no_run {
                continue;
            }
            match arg.get_env() {
                Some(name) => assert!(variables.insert(name.to_owned()), "{name:?} is there twice"),
                // `--usage` starts no run either.
                None => assert!(matches!(arg.get_long(), Some("port" | "usage")), "{arg:?}"),
            }
        }
    }

    #[test]
    fn manuals_and_completions_are_written_without_this_machines_values() {
        let folder = std::env::temp_dir().join(format!("qconsume-docgen-{}", std::process::id()));
        manuals(&folder).expect("they can be written");
        for program in ["qconsume", "qpublish"] {
            let man = fs::read_to_string(folder.join(format!("man/{program}.1"))).expect("the man page is there");
            assert!(man.contains("BROKER_URL") && !man.contains("BROKER_URL="), "{man}");
            for text in [
                "Trust the CAs in this file",
                "Try this long to reach the broker",
                "Use this virtual host",
                "QCONSUME_CACERT",
            ] {
                assert!(man.contains(text), "{text} isn't in {man}");
            }
            let statuses = "\n.SH \"EXIT STATUS\"\n.TP\n.B 0\nsuccess: ";
            assert!(man.contains(statuses), "{man}");
            assert!(!man.contains(".SH EXTRA"), "{man}");
            assert!(man.contains("\n.SH EXAMPLES\n.nf\n") && man.contains(&format!("\n  {program} ")), "{man}");
            for file in [format!("{program}.bash"), format!("{program}.fish"), format!("_{program}")] {
                let text = fs::read_to_string(folder.join("completions").join(file)).expect("the completion is there");
                assert!(text.contains("url-file"));
            }
        }
        fs::remove_dir_all(folder).expect("it was there");
    }
}
