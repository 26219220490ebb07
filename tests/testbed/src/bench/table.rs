//! The table of results, in Markdown.

use super::Pair;

/// What is measured; says how it is written.
#[derive(Clone, Copy, Debug)]
pub(super) enum Unit {
    /// Seconds.
    Time,
    /// Bytes.
    Memory,
}

impl Unit {
    fn write(self, value: f64) -> String {
        match self {
            Self::Time if value < 1.0 => format!("{:.1} ms", value * 1e3),
            Self::Time => format!("{value:.2} s"),
            Self::Memory if value < 10e6 => format!("{:.0} KiB", value / 1024.0),
            Self::Memory => format!("{:.1} MiB", value / 1024.0 / 1024.0),
        }
    }
}

/// What stands above the columns, with their widths.
const HEAD: [(&str, usize); 5] = [
    ("", 35),
    ("amqp-consume", 12),
    ("qconsume", 9),
    ("ratio", 5),
    ("quartiles", 12),
];

/// The table so far.
pub(super) struct Table {
    pub(super) text: String,
}

impl Table {
    /// With its first two lines.
    pub(super) fn new() -> Self {
        let mut table = Self {
            text: String::new(),
        };
        table.line(&HEAD.map(|(name, _)| name.to_owned()));
        table.line(&HEAD.map(|(_, width)| "-".repeat(width)));
        table
    }

    /// Adds medians over the rounds, of their ratios too, as each round compares what ran within the same second.
    pub(super) fn row<T>(
        &mut self,
        what: &str,
        unit: Unit,
        rounds: &[Pair<T>],
        value: impl Fn(&T) -> f64,
    ) {
        let of = |value: &dyn Fn(&Pair<T>) -> f64| rounds.iter().map(value).collect::<Vec<_>>();
        let theirs = of(&|pair| value(&pair.amqp_consume));
        let ours = of(&|pair| value(&pair.qconsume));
        let ratios = of(&|pair| value(&pair.qconsume) / value(&pair.amqp_consume));
        let (low, high) = (quantile(&ratios, 0.25), quantile(&ratios, 0.75));
        self.line(&[
            what.to_owned(),
            unit.write(median(&theirs)),
            unit.write(median(&ours)),
            format!("{:.3}", median(&ratios)),
            format!("{low:.2} to {high:.2}"),
        ]);
    }

    fn line(&mut self, cells: &[String; 5]) {
        for (cell, (_, width)) in cells.iter().zip(HEAD) {
            self.text += &format!("| {cell:<width$} ");
        }
        self.text += "|\n";
    }
}

pub(super) fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// Between the two nearest values, if it falls between them.
fn quantile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = part * (sorted.len() - 1) as f64;
    let (low, high) = (
        sorted[place.floor() as usize],
        sorted[place.ceil() as usize],
    );
    low + (high - low) * place.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_the_medians_of_values_and_of_ratios() {
        let rounds = [(2.0, 1.0), (4.0, 3.0), (8.0, 9.0)].map(|(amqp_consume, qconsume)| Pair {
            amqp_consume,
            qconsume,
        });
        let mut table = Table::new();
        table.row("a", Unit::Time, &rounds, |value| *value);
        let row = table.text.lines().last().unwrap();
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        assert_eq!(
            cells,
            ["", "a", "4.00 s", "3.00 s", "0.750", "0.62 to 0.94", ""]
        );
    }
}
