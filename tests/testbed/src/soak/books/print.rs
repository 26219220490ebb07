//! The report, as people read it.

use super::Report;
use std::collections::BTreeMap;
use std::fmt::{self, Display};

impl Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let failed = |what: &str| {
            let failures = self.failures.iter();
            failures.filter(|text| text.starts_with(what)).count()
        };
        let rows: [(&str, &dyn Display); 14] = [
            ("messages published", &self.published),
            ("  and without confirmation", &self.stowaways),
            ("messages gone", &self.gone),
            ("exits 0 (one a message)", &self.claims),
            ("75s", &self.unknown),
            ("  of these done and gone all the same", &self.unknown_but_gone),
            ("workers by their end", &list(&self.by_end)),
            ("faults", &list(&self.faults)),
            ("deliveries that came late, on a dead connection", &self.late),
            ("workers with a second message", &self.second),
            ("exits 0 undone by a fault right after them", &self.excused.len()),
            ("exits 0 undone between a node and the leader", &self.parted.len()),
            ("lost", &failed("LOST")),
            ("false successes", &failed("FALSE")),
        ];
        writeln!(formatter, "{}", self.title)?;
        for (name, value) in rows {
            writeln!(formatter, "  {name:<48} {value}")?;
        }
        write!(formatter, "{}", self.standstills)?;
        for text in &self.excused {
            writeln!(formatter, "  excused: {text}")?;
        }
        for text in &self.parted {
            writeln!(formatter, "  undone: {text}")?;
        }
        for text in &self.failures {
            writeln!(formatter, "  FAILED: {text}")?;
        }
        let verdict = if self.passed() { "passed" } else { "FAILED" };
        writeln!(formatter, "  {verdict}")
    }
}

fn list<K: Display>(counts: &BTreeMap<K, impl Display>) -> String {
    let items: Vec<String> = counts.iter().map(|(name, count)| format!("{name}: {count}")).collect();
    items.join(", ")
}
