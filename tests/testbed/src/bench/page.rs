//! The results, and how they are written to standard output, and to the page with its plot.

use super::Bench;
use super::table::Table;
use crate::exec;
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// The beginning of the line below the first table.
const MEASURED: &str = "Measured on ";

/// The plot's file name, in the page's folder.
const PLOT: &str = "cost-curve.svg";

pub(super) struct Results {
    /// qconsume compared with amqp-consume.
    pub(super) table: Table,
    /// Parts of the page between two comments with a name, by their names.
    pub(super) blocks: Vec<(&'static str, String)>,
    /// The plot, as SVG.
    pub(super) plot: Option<String>,
}

impl Results {
    /// The results as text, for a terminal; `measured` is the line below the first table.
    pub(super) fn text(&self, measured: &str) -> String {
        let mut text = format!("{}\n{measured}\n", self.table.text());
        for (_, block) in &self.blocks {
            text += &format!("\n{block}");
        }
        text
    }

    /// Replaces the results in the page, and the plot beside it.
    pub(super) fn put_into(&self, page: &Path, measured: &str) -> Result<()> {
        let cannot = |file: &Path| format!("cannot write {}", file.display());
        let text = self.replaced(&fs::read_to_string(page)?, measured)?;
        fs::write(page, text).with_context(|| cannot(page))?;
        if let Some(plot) = &self.plot {
            let file = page.with_file_name(PLOT);
            fs::write(&file, plot).with_context(|| cannot(&file))?;
        }
        Ok(())
    }

    /// The page's text with new results: the first table with the line below it, and the blocks.
    fn replaced(&self, text: &str, measured: &str) -> Result<String> {
        let start = text.find("\n| ").context("the page has no table")? + 1;
        let last = text.find(MEASURED).context("the page has no last line")?;
        let end = last + text[last..].find('\n').map_or(0, |at| at + 1);
        let table = format!("{}\n{measured}\n", self.table.text());
        let mut text = format!("{}{table}{}", &text[..start], &text[end..]);
        for (name, block) in &self.blocks {
            let open = format!("<!-- bench {name} -->\n");
            let close = format!("<!-- end of bench {name} -->");
            let missing = || format!("the page has no block {name}");
            let start = text.find(&open).with_context(missing)? + open.len();
            let end = text.find(&close).with_context(missing)?;
            text.replace_range(start..end, block);
        }
        Ok(text)
    }
}

impl Bench {
    /// The line below the first table: what was measured, where and when.
    pub(super) fn circumstances(&self) -> Result<String> {
        let (major, minor, patch) = self.broker.version();
        let said = |command: &mut Command| exec::run(command, Duration::from_secs(30));
        let date = said(Command::new("date").args(["-u", "+%F"]))?;
        let tools = said(Command::new("dpkg-query").args(["-W", "-f", "${Version}", "amqp-tools"]))
            .unwrap_or_else(|_| "of an unknown version".to_owned());
        let qconsume = said(Command::new(&self.programs.qconsume).arg("--version"))?;
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
        Ok(format!(
            "{MEASURED}{}: {} ({} bytes), amqp-tools {tools}, RabbitMQ {major}.{minor}.{patch}, Linux {} on {} with {} processors.",
            date.trim(),
            qconsume.trim(),
            fs::metadata(&self.programs.qconsume)?.len(),
            kernel.trim(),
            std::env::consts::ARCH,
            std::thread::available_parallelism()?
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_gets_new_results_and_keeps_its_prose() {
        let mut table = Table::new(&["a"]);
        table.row(vec!["new".to_owned()]);
        let results = Results { table, blocks: vec![("scale", "new block\n".to_owned())], plot: None };
        let page = "# Title\n\n| a |\n| old |\n\nMeasured on Monday.\n\nProse.\n\n\
                    <!-- bench scale -->\nold block\n<!-- end of bench scale -->\n\nEnd.\n";
        let expected = "# Title\n\n| a   |\n| --- |\n| new |\n\nMeasured on Tuesday.\n\nProse.\n\n\
                        <!-- bench scale -->\nnew block\n<!-- end of bench scale -->\n\nEnd.\n";
        let replaced = results.replaced(page, "Measured on Tuesday.").unwrap();
        assert_eq!(replaced, expected);
        let without = page.replace("<!-- bench scale -->", "");
        assert!(results.replaced(&without, "Measured on Tuesday.").is_err());
    }
    /// Without such a place, a benchmark would fail only at its end, after an hour.
    #[test]
    fn the_page_in_the_repository_has_a_place_for_all_results() {
        let blocks = ["scale", "waiting", "reconnect"].map(|name| (name, format!("of {name}\n")));
        let results = Results { table: Table::new(&["a"]), blocks: blocks.to_vec(), plot: None };
        let page = include_str!("../../../../docs/benchmarks.md");
        let replaced = results.replaced(page, "Measured on Tuesday.").unwrap();
        for (name, _) in blocks {
            let block = format!("<!-- bench {name} -->\nof {name}\n<!-- end of bench {name} -->");
            assert!(replaced.contains(&block), "{name}");
        }
        assert!(page.contains(&format!("]({PLOT})")), "the plot isn't shown");
    }
}
