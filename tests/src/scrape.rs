//! `/metrics`, `/healthz` and `/readyz` as a stranger sees them: plain HTTP/1.1 and the Prometheus text format 0.0.4.

use std::collections::BTreeMap;

use anyhow::{Context, bail};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// One line of a scrape.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The metric's name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its value.
    pub value: f64,
}

/// Everything `/metrics` said.
#[derive(Clone, Debug)]
pub struct Scrape(pub Vec<Sample>);

impl Scrape {
    /// Parses the text format strictly.
    ///
    /// # Errors
    /// Names the line that is not in the format.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let mut samples = Vec::new();
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(comment) = line.strip_prefix('#') {
                let known = comment.starts_with(" HELP ") || comment.starts_with(" TYPE ");
                anyhow::ensure!(known, "not HELP or TYPE: {line:?}");
                continue;
            }
            samples.push(sample(line).with_context(|| format!("not a sample: {line:?}"))?);
        }
        Ok(Self(samples))
    }

    /// The one sample of a metric without labels.
    #[must_use]
    pub fn value(&self, name: &str) -> Option<f64> {
        self.0.iter().find(|sample| sample.name == name && sample.labels.is_empty()).map(|sample| sample.value)
    }

    /// The samples that have this label.
    pub fn labelled<'a>(&'a self, label: &'a str, value: &'a str) -> impl Iterator<Item = &'a Sample> {
        self.0.iter().filter(move |sample| sample.labels.get(label).is_some_and(|found| found == value))
    }
}

fn sample(line: &str) -> anyhow::Result<Sample> {
    let (name, rest) = line.split_at(line.find(['{', ' ']).context("no value")?);
    anyhow::ensure!(
        name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b':'),
        "the name has other characters"
    );
    let mut labels = BTreeMap::new();
    let mut rest = rest;
    if let Some(mut inside) = rest.strip_prefix('{') {
        loop {
            if let Some(after) = inside.strip_prefix('}') {
                rest = after;
                break;
            }
            let (label, after) = inside.split_once("=\"").context("a label without a value")?;
            let (value, after) = quoted(after)?;
            anyhow::ensure!(labels.insert(label.to_owned(), value).is_none(), "the label {label} stands twice");
            inside = after.strip_prefix(',').unwrap_or(after);
        }
    }
    let value = rest.strip_prefix(' ').context("no space before the value")?;
    let value = match value {
        "+Inf" => f64::INFINITY,
        "-Inf" => f64::NEG_INFINITY,
        "NaN" => f64::NAN,
        number => number.parse().context("the value is no number")?,
    };
    Ok(Sample { name: name.to_owned(), labels, value })
}

fn quoted(text: &str) -> anyhow::Result<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' => match characters.next() {
                Some((_, 'n')) => value.push('\n'),
                Some((_, escaped @ ('\\' | '"'))) => value.push(escaped),
                other => bail!("an unknown escape: {other:?}"),
            },
            other => value.push(other),
        }
    }
    bail!("a label's value does not end")
}

/// GETs a path; the status and the body.
pub(crate) async fn get(address: &str, path: &str) -> anyhow::Result<(u16, String)> {
    let mut stream = TcpStream::connect(address).await.with_context(|| format!("cannot connect to {address}"))?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no end of the headers")?;
    anyhow::ensure!(
        !head.to_ascii_lowercase().contains("transfer-encoding"),
        "the answer is chunked, which this reader does not know"
    );
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("no status line")?;
    Ok((status, body.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_format_is_read_strictly() {
        let text = "# HELP a what\n# TYPE a counter\na{x=\"1\",y=\"q\\\"\\\\\\n}\"} 2\nb 1e3\nc{le=\"+Inf\"} +Inf\n";
        let scrape = Scrape::parse(text).unwrap();
        assert_eq!(scrape.0.len(), 3);
        assert_eq!(scrape.0[0].labels["y"], "q\"\\\n}");
        assert_eq!(scrape.0[1].value, 1000.0);
        assert_eq!(scrape.labelled("x", "1").count(), 1);
        for bad in ["a", "a{x=1} 2", "a{x=\"1\"}2", "a-b 1", "a x", "a{x=\"1\",x=\"2\"} 1", "#nonsense"] {
            assert!(Scrape::parse(bad).is_err(), "{bad}");
        }
    }
}
