//! The report as text.

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
            ("  also arrived, but unconfirmed", &self.stowaways),
            ("messages gone", &self.gone),
            ("successes (exits 0, one for each message)", &self.claims),
            ("exits 75", &self.unknown),
            ("  whose message was acknowledged after all", &self.unknown_but_gone),
            ("workers, by how they ended", &list(&self.by_end)),
            ("faults", &list(&self.faults)),
            ("late deliveries, on a dead connection", &self.late),
            ("workers that got a second message", &self.second),
            ("successes undone by a fault at the same time", &self.excused.len()),
            ("successes undone between a node and the leader", &self.parted.len()),
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
