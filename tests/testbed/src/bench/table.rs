//! Tables of results, in Markdown.

use super::Pair;

/// What is measured, and so how it is written.
#[derive(Clone, Copy, Debug)]
pub(super) enum Unit {
    /// Seconds.
    Time,
    /// Bytes.
    Memory,
}

impl Unit {
    pub(super) fn write(self, value: f64) -> String {
        match self {
            Self::Time if value < 1.0 => format!("{:.1} ms", value * 1e3),
            Self::Time => format!("{value:.2} s"),
            Self::Memory if value < 10e6 => format!("{:.0} KiB", value / 1024.0),
            Self::Memory => format!("{:.1} MiB", value / 1024.0 / 1024.0),
        }
    }
}

/// The head of the table that compares qconsume with amqp-consume.
pub(super) const BESIDE: [&str; 5] = ["", "amqp-consume", "qconsume", "ratio", "quartiles"];

/// A table's head and rows.
pub(super) struct Table(Vec<Vec<String>>);

impl Table {
    /// A table with only its head.
    pub(super) fn new(head: &[&str]) -> Self {
        Self(vec![head.iter().map(|name| (*name).to_owned()).collect()])
    }

    pub(super) fn row(&mut self, cells: Vec<String>) {
        self.0.push(cells);
    }

    /// Adds a row with the medians of the rounds, and of their ratios, as a round's two runs are only a second apart.
    pub(super) fn beside<T>(&mut self, what: &str, unit: Unit, rounds: &[Pair<T>], value: impl Fn(&T) -> f64) {
        let of = |value: &dyn Fn(&Pair<T>) -> f64| rounds.iter().map(value).collect::<Vec<_>>();
        let theirs = of(&|pair| value(&pair.amqp_consume));
        let ours = of(&|pair| value(&pair.qconsume));
        let ratios = of(&|pair| value(&pair.qconsume) / value(&pair.amqp_consume));
        let (low, high) = (quantile(&ratios, 0.25), quantile(&ratios, 0.75));
        self.row(vec![
            what.to_owned(),
            unit.write(median(&theirs)),
            unit.write(median(&ours)),
            format!("{:.3}", median(&ratios)),
            format!("{low:.2} to {high:.2}"),
        ]);
    }

    /// The table in Markdown; every column is as wide as its widest cell.
    pub(super) fn text(&self) -> String {
        let widths: Vec<_> = (0..self.0[0].len())
            .map(|column| {
                let cells = self.0.iter().map(|row| row[column].chars().count());
                cells.max().unwrap_or_default()
            })
            .collect();
        let rule = widths.iter().map(|width| "-".repeat(*width)).collect();
        let mut text = String::new();
        for row in [&self.0[0], &rule].into_iter().chain(&self.0[1..]) {
            for (cell, width) in row.iter().zip(&widths) {
                text += &format!("| {cell:<width$} ");
            }
            text += "|\n";
        }
        text
    }
}

/// A whole number with commas between its thousands.
pub(super) fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

pub(super) fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// A quantile, interpolated between the two nearest values.
pub(super) fn quantile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = part * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    low + (high - low) * place.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_number_has_commas() {
        assert_eq!([7.4, 999.0, 1024.0, 1_234_567.0].map(thousands), ["7", "999", "1,024", "1,234,567"]);
    }

    #[test]
    fn a_row_has_the_medians_of_values_and_of_ratios() {
        let rounds =
            [(2.0, 1.0), (4.0, 3.0), (8.0, 9.0)].map(|(amqp_consume, qconsume)| Pair { amqp_consume, qconsume });
        let mut table = Table::new(&BESIDE);
        table.beside("a", Unit::Time, &rounds, |value| *value);
        let text = table.text();
        let row = text.lines().last().unwrap();
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        assert_eq!(cells, ["", "a", "4.00 s", "3.00 s", "0.750", "0.62 to 0.94", ""]);
    }
}
