//! The Prometheus text format, version 0.0.4
//! (<https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format>).
//!
//! For series that come and go with plugins: they are rendered from live state at each scrape, because the metrics
//! exporter cannot remove a series.

use std::fmt::{Display, Write as _};

/// A page that is being written. Samples of one family must follow its header.
#[derive(Debug, Default)]
pub struct Page {
    text: String,
    family: &'static str,
}

/// The type of a metric family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Buckets, sum and count.
    Histogram,
}

impl Page {
    /// Begins a family. `name` has its prefix and suffix already.
    pub fn family(&mut self, name: &'static str, kind: Kind, help: &str) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        self.family = name;
        // Writing to a String cannot fail.
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// A sample of the family begun last.
    pub fn sample(&mut self, labels: &[(&str, &str)], value: impl Display) {
        self.suffixed("", labels, value);
    }

    /// A sample of the family begun last, with a suffix such as `_bucket`.
    pub fn suffixed(&mut self, suffix: &str, labels: &[(&str, &str)], value: impl Display) {
        self.text.push_str(self.family);
        self.text.push_str(suffix);
        for (index, (name, value)) in labels.iter().enumerate() {
            self.text.push(if index == 0 { '{' } else { ',' });
            self.text.push_str(name);
            self.text.push_str("=\"");
            for c in value.chars() {
                match c {
                    '\\' => self.text.push_str("\\\\"),
                    '"' => self.text.push_str("\\\""),
                    '\n' => self.text.push_str("\\n"),
                    other => self.text.push(other),
                }
            }
            self.text.push('"');
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        let _ = writeln!(self.text, " {value}");
    }

    /// The page so far.
    #[must_use]
    pub fn into_text(self) -> String {
        self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_look_as_the_format_says() {
        let mut page = Page::default();
        page.family("plugvisor_x_total", Kind::Counter, "What is counted.");
        page.sample(&[], 3);
        page.sample(&[("a", "plain"), ("b", "q\"b\\n\n")], 0.5);
        page.family("plugvisor_t_seconds", Kind::Histogram, "Times.");
        page.suffixed("_bucket", &[("le", "+Inf")], 1);
        let expected = r#"# HELP plugvisor_x_total What is counted.
# TYPE plugvisor_x_total counter
plugvisor_x_total 3
plugvisor_x_total{a="plain",b="q\"b\\n\n"} 0.5
# HELP plugvisor_t_seconds Times.
# TYPE plugvisor_t_seconds histogram
plugvisor_t_seconds_bucket{le="+Inf"} 1
"#;
        assert_eq!(page.into_text(), expected);
    }
}
