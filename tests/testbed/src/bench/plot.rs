//! The plot of the part `scale`: an SVG with two panels. It has a background of its own, so that it is readable on
//! light and dark pages.

use super::scale::{Figures, Point};
use super::table::thousands;

/// The panels' left edges, in pixels of a picture that is 800 wide.
const PANELS: [f64; 2] = [60.0, 464.0];
const TOP: f64 = 96.0;
const WIDTH: f64 = 300.0;
const HEIGHT: f64 = 220.0;

/// The beginning of the SVG.
const HEAD: &str = r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 380" width="800" height="380" role="img">
<title>Messages a second, and the broker's processor time a message, by the number of workers</title>
<!-- Drawn by make bench: don't edit. -->
<style>
  text { font: 14px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, "DejaVu Sans", sans-serif; fill: #1f2328 }
  .title { font-weight: bold } .middle { text-anchor: middle } .end { text-anchor: end }
  .ground { fill: #ffffff; stroke: #d1d9e0 } .grid { stroke: #d1d9e0 } polyline { stroke-width: 2 }
  .one polyline { fill: none; stroke: #0969da } .one circle { fill: #0969da }
  .drain polyline { fill: none; stroke: #bc4c00 } .drain rect { fill: #bc4c00 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .ground { fill: #0d1117; stroke: #3d444d } .grid { stroke: #3d444d }
    .one polyline { stroke: #58a6ff } .one circle { fill: #58a6ff }
    .drain polyline { stroke: #f0883e } .drain rect { fill: #f0883e }
  }
</style>
<rect class="ground" x="0.5" y="0.5" width="799" height="379" rx="8"/>
"##;

/// One of the two curves in each panel.
struct Curve {
    class: &'static str,
    /// The name in the legend.
    name: &'static str,
    /// The legend's left edge, in pixels.
    left: f64,
    figures: fn(&Point) -> &Figures,
}

const CURVES: [Curve; 2] = [
    Curve { class: "one", name: "one message a process", left: 60.0, figures: |it| &it.one_message },
    Curve { class: "drain", name: "--drain", left: 290.0, figures: |it| &it.drain },
];

/// Draws the points; there must be at least two.
pub(super) fn draw(points: &[Point]) -> String {
    let mut svg = HEAD.to_owned();
    for Curve { class, name, left, .. } in CURVES {
        svg += &format!(
            "<g class=\"{class}\"><polyline points=\"{left},28 {},28\"/>{}</g>\n<text x=\"{}\" y=\"33\">{name}</text>\n",
            left + 32.0,
            mark(class, left + 16.0, 28.0),
            left + 40.0
        );
    }
    let [first, second] = PANELS;
    svg += &panel(points, first, "messages a second", |it| it.rate);
    svg += &panel(points, second, "broker's processor time, ms a message", |it| it.broker * 1e3);
    svg + "</svg>\n"
}

fn panel(points: &[Point], left: f64, title: &str, value: fn(&Figures) -> f64) -> String {
    let all = points.iter().flat_map(|point| CURVES.map(|curve| value((curve.figures)(point))));
    let highest = all.fold(0.0, f64::max);
    let step = step(highest);
    let steps = (highest / step).ceil();
    let y = |value: f64| TOP + HEIGHT * (1.0 - value / (step * steps));
    let logarithm = |workers: usize| (workers as f64).ln();
    let most = points.iter().map(|point| logarithm(point.workers)).fold(0.0, f64::max);
    let x = |workers: usize| left + WIDTH * logarithm(workers) / most;
    let (right, middle) = (left + WIDTH, left + WIDTH / 2.0);

    let mut svg = format!("<text class=\"title\" x=\"{left}\" y=\"{}\">{title}</text>\n", TOP - 22.0);
    for tick in 0..=steps as usize {
        let value = tick as f64 * step;
        let at = y(value);
        let label = if step < 1.0 { format!("{value:.*}", (-step.log10()).ceil() as usize) } else { thousands(value) };
        svg += &format!(
            "<line class=\"grid\" x1=\"{left}\" y1=\"{at:.1}\" x2=\"{right}\" y2=\"{at:.1}\"/>\
             <text class=\"end\" x=\"{}\" y=\"{:.1}\">{label}</text>\n",
            left - 8.0,
            at + 5.0
        );
    }
    for Point { workers, .. } in points {
        svg += &format!(
            "<text class=\"middle\" x=\"{:.1}\" y=\"{}\">{}</text>\n",
            x(*workers),
            TOP + HEIGHT + 22.0,
            thousands(*workers as f64)
        );
    }
    svg += &format!(
        "<text class=\"middle\" x=\"{middle}\" y=\"{}\">workers at once (logarithmic)</text>\n",
        TOP + HEIGHT + 46.0
    );
    for Curve { class, figures, .. } in CURVES {
        let places = points.iter().map(|point| (x(point.workers), y(value(figures(point)))));
        let (mut line, mut marks) = (String::new(), String::new());
        for (x, y) in places {
            line += &format!("{x:.1},{y:.1} ");
            marks += &mark(class, x, y);
        }
        svg += &format!("<g class=\"{class}\"><polyline points=\"{}\"/>{marks}</g>\n", line.trim());
    }
    svg
}

/// A mark, as colour alone isn't enough: a circle for one message a process, a square for `--drain`.
fn mark(class: &str, x: f64, y: f64) -> String {
    match class {
        "one" => format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\"/>"),
        _ => format!("<rect x=\"{:.1}\" y=\"{:.1}\" width=\"8\" height=\"8\"/>", x - 4.0, y - 4.0),
    }
}

/// The distance between two lines of the grid: 1, 2 or 5 times a power of ten, so that there are four to ten lines.
fn step(highest: f64) -> f64 {
    let power = 10f64.powf((highest / 4.0).log10().floor());
    let steps = [5.0, 2.0].map(|factor| factor * power);
    steps.into_iter().find(|step| *step <= highest / 4.0).unwrap_or(power)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(workers: usize, rate: f64) -> Point {
        let figures = Figures { rate, broker: 0.002, worker: 0.004 };
        Point { workers, one_message: figures, drain: figures }
    }

    /// The circles of the first panel. The first circle in the SVG is the legend's.
    fn circles(svg: &str) -> Vec<(f64, f64)> {
        let number = |text: &str| text.split('"').next().unwrap().parse().unwrap();
        let circles = svg.split("<circle cx=\"").skip(2).take(3);
        circles.map(|text| (number(text), number(text.split("cy=\"").nth(1).unwrap()))).collect()
    }

    #[test]
    fn heights_are_in_proportion_and_workers_on_a_logarithmic_scale() {
        let svg = draw(&[point(1, 100.0), point(10, 200.0), point(100, 400.0)]);
        let (bottom, [left, ..]) = (TOP + HEIGHT, PANELS);
        // The grid's highest line is 400, its lines are 100 apart.
        let expected = [0.25, 0.5, 1.0].map(|part| bottom - part * HEIGHT);
        for (index, ((x, y), expected)) in circles(&svg).into_iter().zip(expected).enumerate() {
            assert!((y - expected).abs() < 0.1, "{y} instead of {expected}");
            let expected = left + WIDTH * index as f64 / 2.0;
            assert!((x - expected).abs() < 0.1, "{x} instead of {expected}");
        }
    }

    #[test]
    fn a_grid_has_round_numbers_and_four_to_ten_lines() {
        assert_eq!([4.0, 9.9, 1000.0].map(step), [1.0, 2.0, 200.0]);
        for tenth in 1..1000 {
            let highest = f64::from(tenth) / 10.0;
            let lines = (highest / step(highest)).ceil();
            assert!((4.0..=10.0).contains(&lines), "{lines} up to {highest}");
        }
    }
}
