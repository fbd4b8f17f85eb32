//! Plots as SVG: three kinds, drawn here so that nothing else is needed. Colours come from the reader's theme where it has one.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use super::samples::Row;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 170.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 50.0;
const COLOURS: [&str; 8] = ["#2563eb", "#dc2626", "#16a34a", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4b5563"];

/// One line of a plot.
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// Points, sorted by x.
    pub points: Vec<(f64, f64)>,
}

/// A plot over two linear axes from zero.
pub struct Lines {
    /// Title.
    pub title: String,
    /// What x is.
    pub x: String,
    /// What y is.
    pub y: String,
    /// Lines.
    pub series: Vec<Series>,
}

/// A plot of stacked bars.
pub struct Bars {
    /// Title.
    pub title: String,
    /// What the length is.
    pub x: String,
    /// Each bar's name and its parts, in order.
    pub bars: Vec<(String, Vec<(String, f64)>)>,
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// A round number for the distance of ticks, about five of them up to `most`.
fn step(most: f64) -> f64 {
    if most <= 0.0 || !most.is_finite() {
        return 1.0;
    }
    let rough = most / 5.0;
    let power = 10_f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= rough).unwrap_or(rough)
}

struct Canvas(String);

impl Canvas {
    fn new(title: &str, height: f64) -> Self {
        let mut canvas = Self(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
        ));
        canvas.text(LEFT, 22.0, "start", title);
        canvas
    }

    // Writing to a String cannot fail.
    fn line(&mut self, from: (f64, f64), to: (f64, f64), colour: &str) {
        let ((x1, y1), (x2, y2)) = (from, to);
        let _ =
            writeln!(self.0, "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\"/>");
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, text: &str) {
        let _ = writeln!(self.0, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>", escape(text));
    }

    fn rect(&mut self, at: (f64, f64), size: (f64, f64), colour: &str) {
        let ((x, y), (width, height)) = (at, size);
        let _ = writeln!(
            self.0,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>"
        );
    }

    fn legend(&mut self, names: impl Iterator<Item = String>) {
        for ((name, colour), n) in names.zip(COLOURS.iter().cycle()).zip(0_u32..) {
            let y = TOP + 10.0 + 18.0 * f64::from(n);
            self.rect((WIDTH - RIGHT + 12.0, y - 9.0), (10.0, 10.0), colour);
            self.text(WIDTH - RIGHT + 28.0, y, "start", &name);
        }
    }

    fn done(mut self) -> String {
        self.0 += "</svg>\n";
        self.0
    }
}

impl Lines {
    /// As SVG.
    pub fn draw(&self) -> String {
        let most = |pick: fn(&(f64, f64)) -> f64| {
            let values = self.series.iter().flat_map(|s| &s.points).map(pick);
            values.fold(0.0, f64::max).max(f64::MIN_POSITIVE)
        };
        let (most_x, most_y) = (most(|p| p.0), most(|p| p.1) * 1.05);
        let place = |x: f64, y: f64| {
            (LEFT + x / most_x * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y / most_y * (HEIGHT - TOP - BOTTOM))
        };
        let mut canvas = Canvas::new(&self.title, HEIGHT);
        for (most, along_x) in [(most_x, true), (most_y, false)] {
            let distance = step(most);
            let mut at = 0.0;
            while at <= most * 1.001 {
                let label = format!("{at}");
                if along_x {
                    let (x, y) = place(at, 0.0);
                    canvas.line((x, y), (x, y + 5.0), "#6b7280");
                    canvas.text(x, y + 18.0, "middle", &label);
                } else {
                    let (x, y) = place(0.0, at);
                    canvas.line((x, y), (WIDTH - RIGHT, y), "#e5e7eb");
                    canvas.text(x - 8.0, y + 4.0, "end", &label);
                }
                at += distance;
            }
        }
        canvas.line(place(0.0, 0.0), place(most_x, 0.0), "#6b7280");
        canvas.text((LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 12.0, "middle", &self.x);
        canvas.text(LEFT, TOP - 4.0, "end", &self.y);
        for (series, colour) in self.series.iter().zip(COLOURS.iter().cycle()) {
            for two in series.points.windows(2) {
                canvas.line(place(two[0].0, two[0].1), place(two[1].0, two[1].1), colour);
            }
            for (x, y) in &series.points {
                let (x, y) = place(*x, *y);
                canvas.rect((x - 3.0, y - 3.0), (6.0, 6.0), colour);
            }
        }
        canvas.legend(self.series.iter().map(|series| series.name.clone()));
        canvas.done()
    }
}

impl Bars {
    /// As SVG.
    pub fn draw(&self) -> String {
        let mut names: Vec<&String> = Vec::new();
        for name in self.bars.iter().flat_map(|(_, parts)| parts).map(|(name, _)| name) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let total = |parts: &[(String, f64)]| parts.iter().map(|(_, value)| value).sum::<f64>();
        let most = self.bars.iter().map(|(_, parts)| total(parts)).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
        let left = LEFT + 70.0;
        let scale = (WIDTH - left - RIGHT) / most;
        let bottom = TOP + 34.0 * self.bars.len() as f64;
        let mut canvas = Canvas::new(&self.title, bottom.max(TOP + 18.0 * names.len() as f64) + BOTTOM);
        for ((name, parts), n) in self.bars.iter().zip(0_u32..) {
            let y = TOP + 34.0 * f64::from(n);
            canvas.text(left - 8.0, y + 16.0, "end", name);
            let mut x = left;
            for (part, value) in parts {
                let colour = names.iter().position(|name| *name == part).unwrap_or(0) % COLOURS.len();
                canvas.rect((x, y), (value * scale, 24.0), COLOURS[colour]);
                x += value * scale;
            }
        }
        let (distance, mut at) = (step(most), 0.0);
        while at <= most * 1.001 {
            canvas.line((left + at * scale, bottom), (left + at * scale, bottom + 5.0), "#6b7280");
            canvas.text(left + at * scale, bottom + 18.0, "middle", &format!("{at}"));
            at += distance;
        }
        canvas.text((left + WIDTH - RIGHT) / 2.0, bottom + 38.0, "middle", &self.x);
        canvas.legend(names.into_iter().cloned());
        canvas.done()
    }
}

/// VMM, metric, store, MiB of memory.
type Line = (String, String, String, u32);

/// A metric over the changed set, a line for each VMM, memory size and store.
fn over_changed(rows: &[Row], metrics: &[&str]) -> Vec<Series> {
    let mut lines: BTreeMap<Line, Vec<(f64, f64)>> = BTreeMap::new();
    for row in rows.iter().filter(|row| metrics.contains(&row.metric.as_str()) && row.sandboxes == 1) {
        let key = (row.vmm.clone(), row.metric.clone(), row.store.clone(), row.memory_mib);
        let points = lines.entry(key).or_default();
        let x = f64::from(row.changed_mib);
        // One point for each x: the case that came first.
        if points.iter().all(|(other, _)| (other - x).abs() > 0.5) {
            points.push((x, row.p50));
        }
    }
    let name = |(vmm, metric, store, memory): (String, String, String, u32)| {
        let metric =
            if metrics.len() > 1 { format!(" {}", metric.trim_start_matches("resume_")) } else { String::new() };
        format!("{vmm}{metric} {} GiB {store}", f64::from(memory) / 1024.0)
    };
    lines
        .into_iter()
        .map(|(key, mut points)| {
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            Series { name: name(key), points }
        })
        .collect()
}

/// The phases of pauses that the service names in its answers.
fn phases(rows: &[Row]) -> Vec<(String, Vec<(String, f64)>)> {
    let mut bars: Vec<(String, Vec<(String, f64)>)> = Vec::new();
    let mut first: Option<(u32, u32, String)> = None;
    for row in rows.iter().filter(|row| row.vmm == "stasis" && row.unit == "ms" && row.sandboxes == 1) {
        let Some((pause, phase)) = row.metric.split_once('.') else { continue };
        let place = (row.memory_mib, row.changed_mib, row.store.clone());
        if !["first_pause", "repeat_pause"].contains(&pause)
            || ["cpu", "after_run_ahead"].contains(&phase)
            || *first.get_or_insert(place.clone()) != place
        {
            continue;
        }
        match bars.iter_mut().find(|(name, _)| name == pause) {
            Some((_, parts)) => parts.push((phase.to_owned(), row.p50)),
            None => bars.push((pause.to_owned(), vec![(phase.to_owned(), row.p50)])),
        }
    }
    bars
}

/// Writes the plots of these rows into `dir`, and answers the names of the files.
pub fn write(rows: &[Row], dir: &Path) -> std::io::Result<Vec<String>> {
    std::fs::create_dir_all(dir)?;
    let lines = |title: &str, metrics: &[&str], x: &str| Lines {
        title: title.to_owned(),
        x: x.to_owned(),
        y: "ms".to_owned(),
        series: over_changed(rows, metrics),
    };
    let pause = lines("Repeat pause until durable", &["repeat_pause"], "changed, MiB");
    let hot_sets = ["resume_hot.hot_set", "resume_warm.hot_set", "resume_cold.hot_set"];
    let resume = lines("Wake until the first pass over the hot set is done", &hot_sets, "working set, MiB");
    let bars = Bars { title: "Pauses by phase".to_owned(), x: "ms".to_owned(), bars: phases(rows) };
    let drawn = [
        ("pause.svg", (!pause.series.is_empty()).then(|| pause.draw())),
        ("resume.svg", (!resume.series.is_empty()).then(|| resume.draw())),
        ("phases.svg", (!bars.bars.is_empty()).then(|| bars.draw())),
    ];
    let mut names = Vec::new();
    for (name, svg) in drawn {
        if let Some(svg) = svg {
            std::fs::write(dir.join(name), svg)?;
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "round numbers")]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round() {
        assert_eq!([0.0, 0.9, 5.0, 130.0, 1000.0].map(step), [1.0, 0.2, 1.0, 50.0, 200.0]);
    }

    #[test]
    fn a_plot_names_its_series_and_escapes_them() {
        let series = vec![Series { name: "a<b".to_owned(), points: vec![(1.0, 2.0), (3.0, 4.0)] }];
        let svg = Lines { title: "t".to_owned(), x: "x".to_owned(), y: "y".to_owned(), series }.draw();
        assert!(svg.contains("a&lt;b") && svg.ends_with("</svg>\n") && !svg.contains("NaN"), "{svg}");
        let empty = Lines { title: "t".to_owned(), x: "x".to_owned(), y: "y".to_owned(), series: vec![] }.draw();
        assert!(!empty.contains("NaN") && !empty.contains("inf"), "{empty}");
    }
}
