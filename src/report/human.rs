//! Durations and numbers as people read them.

use std::{fmt, time::Duration};

/// Shows `250ms`, `1s 300ms`, `1m 30s`.
#[derive(Clone, Copy, Debug)]
pub struct HumanDuration(pub Duration);

impl fmt::Display for HumanDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = if self.0 >= Duration::from_secs(60) {
            Duration::from_secs(self.0.as_secs_f64().round() as u64)
        } else if self.0 >= Duration::from_secs(1) {
            Duration::from_millis((self.0.as_secs_f64() * 10.0).round() as u64 * 100)
        } else {
            Duration::from_millis(u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX))
        };
        humantime::format_duration(shown).fmt(f)
    }
}

pub fn counted(number: u64, one: &str, several: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { several })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_for_people_are_short() {
        let shown = |seconds| HumanDuration(Duration::from_secs_f64(seconds)).to_string();
        assert_eq!(shown(0.25), "250ms");
        assert_eq!(shown(59.951), "1m");
        assert_eq!(shown(90.04), "1m 30s");
        assert_eq!(shown(480.1), "8m");
        assert_eq!(shown(3599.6), "1h");
        assert_eq!(shown(1.26), "1s 300ms");
    }
}
