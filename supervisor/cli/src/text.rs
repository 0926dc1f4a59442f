//! Text on its way to a terminal: what others wrote loses its power over the terminal, what we wrote may have colour.
//!
//! Names, errors and log lines come from plugins. A control character among them could move the cursor, rewrite lines
//! that were printed before, or (U+202E and its kind) show text in another order than it has.

use std::fmt::Write;

/// How a piece of text looks on a terminal that has colours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Style {
    #[default]
    Plain,
    Good,
    Warning,
    Bad,
    Faint,
    Title,
}

impl Style {
    /// The SGR parameter (ECMA-48 8.3.117).
    const fn parameter(self) -> Option<&'static str> {
        match self {
            Self::Plain => None,
            Self::Good => Some("32"),
            Self::Warning => Some("33"),
            Self::Bad => Some("31"),
            Self::Faint => Some("2"),
            Self::Title => Some("1"),
        }
    }
}

/// One line, made of pieces that were cleaned when they were added.
#[derive(Clone, Debug, Default)]
pub(crate) struct Line {
    pieces: Vec<(Style, String)>,
}

impl Line {
    pub(crate) fn new(text: impl AsRef<str>) -> Self {
        Self::default().add(Style::Plain, text)
    }

    /// Adds text in a style.
    pub(crate) fn add(mut self, style: Style, text: impl AsRef<str>) -> Self {
        self.pieces.push((style, clean(text.as_ref())));
        self
    }

    /// Characters, colours not counted. A character is counted as one column; plugin names are ASCII.
    fn width(&self) -> usize {
        self.pieces.iter().map(|(_, text)| text.chars().count()).sum()
    }

    /// The line's bytes for the terminal.
    pub(crate) fn render(&self, colour: bool) -> String {
        let mut rendered = String::new();
        for (style, text) in &self.pieces {
            match style.parameter().filter(|_| colour && !text.is_empty()) {
                Some(parameter) => {
                    rendered.push_str("\x1b[");
                    rendered.push_str(parameter);
                    rendered.push('m');
                    rendered.push_str(text);
                    rendered.push_str("\x1b[0m");
                }
                None => rendered.push_str(text),
            }
        }
        rendered
    }
}

/// Columns, as wide as their widest cell.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<Line>>,
}

impl Table {
    pub(crate) fn new(titles: &[&str]) -> Self {
        Self { rows: vec![titles.iter().map(|title| Line::default().add(Style::Title, title)).collect()] }
    }

    pub(crate) fn row(&mut self, cells: Vec<Line>) {
        self.rows.push(cells);
    }

    /// One line for each row, the titles first, without blanks at the ends.
    pub(crate) fn lines(self) -> Vec<Line> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width =
            |column: usize| self.rows.iter().filter_map(|row| row.get(column)).map(Line::width).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        self.rows
            .into_iter()
            .map(|row| {
                let last = row.iter().rposition(|cell| cell.width() > 0).unwrap_or(0);
                let mut line = Line::default();
                for (column, cell) in row.into_iter().enumerate().take(last + 1) {
                    let blanks = if column == last { 0 } else { widths[column] - cell.width() + 2 };
                    line.pieces.extend(cell.pieces);
                    line.pieces.push((Style::Plain, " ".repeat(blanks)));
                }
                line
            })
            .collect()
    }
}

/// Replaces what a terminal would obey, or would show in a misleading order, by what can be read.
pub(crate) fn clean(text: &str) -> String {
    let mut cleaned = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\t' => cleaned.push_str("    "),
            '\n' => cleaned.push_str("\\n"),
            '\r' => cleaned.push_str("\\r"),
            c if c.is_ascii_control() => write!(cleaned, "\\x{:02x}", u32::from(c)).expect("a String takes everything"),
            c if is_misleading(c) => write!(cleaned, "\\u{{{:x}}}", u32::from(c)).expect("a String takes everything"),
            c => cleaned.push(c),
        }
    }
    cleaned
}

/// The same for JSON text: there these characters stand in strings only, so `\uXXXX` keeps the value.
pub(crate) fn clean_json(json: &str) -> String {
    let mut cleaned = String::with_capacity(json.len());
    for c in json.chars() {
        if c == '\x7f' || is_misleading(c) {
            let mut units = [0; 2];
            for unit in c.encode_utf16(&mut units) {
                write!(cleaned, "\\u{unit:04x}").expect("a String takes everything");
            }
        } else {
            cleaned.push(c);
        }
    }
    cleaned
}

/// C1 controls (U+009B begins a control sequence as ESC [ does), marks that change the direction of text, characters
/// without width, line and paragraph separators, and tags.
fn is_misleading(c: char) -> bool {
    matches!(c,
        '\u{80}'..='\u{9f}' | '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_sequences_become_text() {
        assert_eq!(clean("\x1b[2Jx\x07\r\n"), "\\x1b[2Jx\\x07\\r\\n");
        assert_eq!(clean("\u{9b}31m\u{202e}abc"), "\\u{9b}31m\\u{202e}abc");
        assert_eq!(clean("Grüße, 世界"), "Grüße, 世界");
    }

    #[test]
    fn json_keeps_its_value() {
        let value = serde_json::json!({ "line": "\u{9b}31m\u{202e}\x7f\x1b\u{e0001}Grüße" });
        let cleaned = clean_json(&value.to_string());
        assert!(!cleaned.chars().any(|c| c.is_control() || is_misleading(c)), "{cleaned}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&cleaned).unwrap(), value);
    }

    #[test]
    fn columns_line_up_and_colours_do_not_count() {
        let mut table = Table::new(&["NAME", "STATE"]);
        table.row(vec![Line::default().add(Style::Bad, "a-long-name"), Line::new("x")]);
        table.row(vec![Line::new("b"), Line::new("")]);
        let lines: Vec<String> = table.lines().iter().map(|line| line.render(false)).collect();
        assert_eq!(lines, ["NAME         STATE", "a-long-name  x", "b"]);
    }

    #[test]
    fn only_our_own_colour_reaches_a_terminal() {
        let line = Line::default().add(Style::Bad, "FAILED\x1b[0m");
        assert_eq!(line.render(true), "\x1b[31mFAILED\\x1b[0m\x1b[0m");
        assert_eq!(line.render(false), "FAILED\\x1b[0m");
    }
}
