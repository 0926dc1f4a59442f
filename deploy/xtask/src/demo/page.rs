//! The gallery's page: made by calling the plugin through the `plugvisor` command, then judged by its pixels and text.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::RgbImage;
use serde_json::{Value, json};

use super::checks::Checks;
use super::supervisor::Supervisor;

/// The longer side of the thumbnails asked for.
const EDGE: u32 = 160;

/// How far a channel of a thumbnail may be from the mean of the same region of the picture, of 255. JPEG and the choice
/// of the scaling filter cost a few; a wrong picture or a turned one costs dozens.
const TOLERANCE: f64 = 12.0;

/// The colours in the middle of each quarter of four-fields.png, row by row, as the program that draws it has them.
const FOUR_FIELDS: [[f64; 3]; 4] =
    [[214.0, 40.0, 40.0], [40.0, 160.0, 70.0], [40.0, 80.0, 200.0], [240.0, 200.0, 40.0]];

/// What goes into the page.
#[derive(Debug)]
pub(crate) struct Samples {
    pictures: BTreeMap<String, Vec<u8>>,
    texts: BTreeMap<String, Vec<u8>>,
}

impl Samples {
    /// Reads the checked-in samples.
    ///
    /// # Errors
    /// When they cannot be read.
    pub(crate) fn read(directory: &Path) -> anyhow::Result<Self> {
        let mut samples = Self { pictures: BTreeMap::new(), texts: BTreeMap::new() };
        for file in files(&directory.join("pictures"))?.into_iter().chain(files(directory)?) {
            let content = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.ends_with(".md") { &mut samples.texts } else { &mut samples.pictures }.insert(name, content);
        }
        if samples.pictures.is_empty() || samples.texts.is_empty() {
            bail!("{} has no pictures or no texts", directory.display());
        }
        Ok(samples)
    }

    /// One of the pictures, for load.
    ///
    /// # Errors
    /// When there is none of this name.
    pub(crate) fn picture(&self, name: &str) -> anyhow::Result<Vec<u8>> {
        self.pictures.get(name).cloned().with_context(|| format!("the samples have no {name}"))
    }

    fn requests(&self) -> Value {
        let files = self.pictures.iter().chain(&self.texts);
        let files =
            files.map(|(name, content)| json!({ "file": { "name": name, "content": STANDARD.encode(content) } }));
        let page = json!({ "page": { "title": "Plugvisor's gallery", "thumbnailEdge": EDGE } });
        std::iter::once(page).chain(files).collect()
    }
}

fn files(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))? {
        let path = entry.with_context(|| format!("cannot read {}", directory.display()))?.path();
        if path.is_file() {
            files.push(path);
        }
    }
    Ok(files)
}

/// Has the page made, writes it to `file` and judges it.
///
/// # Errors
/// When the gallery does not answer.
pub(crate) fn make(supervisor: &Supervisor, samples: &Samples, file: &Path, checks: &mut Checks) -> anyhow::Result<()> {
    const METHOD: &str = "plugvisor.examples.gallery.v1.GalleryService/Build";
    let mut command = supervisor.command(&["call", METHOD, "--timeout", "60s", "--json", "-"]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start the plugvisor command")?;
    let mut input = child.stdin.take().context("the command has no input")?;
    input.write_all(samples.requests().to_string().as_bytes()).context("cannot hand over the pictures")?;
    drop(input);
    let output = child.wait_with_output().context("cannot wait for the plugvisor command")?;
    if !output.status.success() {
        bail!("the gallery made no page: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let mut page = Vec::new();
    let mut summary = Value::Null;
    for line in output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let mut part: Value = serde_json::from_slice(line).context("the gallery's answer is no JSON")?;
        if let Some(chunk) = part["chunk"].as_str() {
            page.extend(STANDARD.decode(chunk).context("a chunk of the page is not base64")?);
        } else if part["summary"].is_object() {
            summary = part["summary"].take();
        }
    }
    fs::write(file, &page).with_context(|| format!("cannot write {}", file.display()))?;
    let page = String::from_utf8(page).context("the page is not UTF-8")?;
    let next = "see `plugvisor logs gallery`";
    let counts = format!("{}, {}, {}", summary["pictures"], summary["texts"], summary["failed"]);
    let expected = format!("{}, {}, 0", samples.pictures.len(), samples.texts.len());
    checks.check("page: pictures, texts, failures", counts == expected, &counts, &expected, next);
    judge_text(&page, checks);
    judge_pictures(&page, samples, checks)
}

/// Markdown must have become HTML.
fn judge_text(page: &str, checks: &mut Checks) {
    for expected in ["<strong>sunset</strong>", "<em>hills</em>", "<li>", "<table>", "<blockquote>"] {
        let found = page.contains(expected);
        let seen = if found { "there" } else { "not there" };
        checks.check(&format!("page: {expected}"), found, seen, "there", "see `plugvisor logs markdown`");
    }
}

/// Every thumbnail must be its picture, made small.
fn judge_pictures(page: &str, samples: &Samples, checks: &mut Checks) -> anyhow::Result<()> {
    let thumbnails = thumbnails(page)?;
    let next = "open the page, and see `plugvisor logs thumbnailer`";
    let count = samples.pictures.len();
    checks.check("page: thumbnails", thumbnails.len() == count, thumbnails.len(), count, next);
    for (name, content) in &samples.pictures {
        let picture = image::load_from_memory(content).with_context(|| format!("{name} is broken"))?.to_rgb8();
        let best = thumbnails
            .iter()
            .map(|thumbnail| (difference(&picture, thumbnail), thumbnail))
            .min_by(|(a, _), (b, _)| a.total_cmp(b));
        let Some((difference, thumbnail)) = best else { continue };
        let (width, height) = thumbnail.dimensions();
        checks.check(
            &format!("page: {name}"),
            difference <= TOLERANCE && width.max(height) == EDGE,
            format!("{width}x{height} pixels, at most {difference:.1} of 255 from the picture"),
            format!("longer side {EDGE}, at most {TOLERANCE} of 255 from the picture"),
            next,
        );
        if name == "four-fields.png" {
            let difference = (0..4)
                .map(|field| {
                    let (left, top) = (f64::from(field % 2) / 2.0, f64::from(field / 2) / 2.0);
                    let middle = mean(thumbnail, (left + 0.1, top + 0.1), (left + 0.4, top + 0.4));
                    let field = usize::try_from(field).unwrap_or_default();
                    channels(middle, FOUR_FIELDS[field])
                })
                .fold(0.0, f64::max);
            checks.check(
                "page: red, green, blue and yellow are where they were drawn",
                difference <= TOLERANCE,
                format!("at most {difference:.1} of 255 off"),
                format!("at most {TOLERANCE}"),
                next,
            );
        }
    }
    Ok(())
}

/// Decodes every picture that the page holds as a data URI (RFC 2397).
fn thumbnails(page: &str) -> anyhow::Result<Vec<RgbImage>> {
    let mut found = Vec::new();
    for part in page.split("data:image/").skip(1) {
        let Some((_, rest)) = part.split_once(";base64,") else { continue };
        let end = rest.find(['"', '\'', ')']).unwrap_or(rest.len());
        let bytes = STANDARD.decode(&rest[..end]).context("a thumbnail is not base64")?;
        found.push(image::load_from_memory(&bytes).context("a thumbnail is no picture")?.to_rgb8());
    }
    Ok(found)
}

/// The largest difference of any channel, over a grid of regions that both pictures are divided into.
fn difference(picture: &RgbImage, thumbnail: &RgbImage) -> f64 {
    const GRID: u32 = 8;
    let mut largest: f64 = 0.0;
    for row in 0..GRID {
        for column in 0..GRID {
            let from = (f64::from(column) / f64::from(GRID), f64::from(row) / f64::from(GRID));
            let to = (f64::from(column + 1) / f64::from(GRID), f64::from(row + 1) / f64::from(GRID));
            largest = largest.max(channels(mean(picture, from, to), mean(thumbnail, from, to)));
        }
    }
    largest
}

fn channels(a: [f64; 3], b: [f64; 3]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// The mean colour of a region, its corners from 0 to 1.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "both are between 0 and the size")]
fn mean(picture: &RgbImage, from: (f64, f64), to: (f64, f64)) -> [f64; 3] {
    let at = |part: f64, size: u32| (part * f64::from(size)).round() as u32;
    let (width, height) = picture.dimensions();
    let mut sum = [0.0; 3];
    let mut count = 0.0;
    for y in at(from.1, height)..at(to.1, height) {
        for x in at(from.0, width)..at(to.0, width) {
            for (sum, channel) in sum.iter_mut().zip(picture.get_pixel(x, y).0) {
                *sum += f64::from(channel);
            }
            count += 1.0;
        }
    }
    sum.map(|sum| sum / f64::max(count, 1.0))
}

#[cfg(test)]
mod tests {
    use image::imageops::{self, FilterType};

    use super::*;

    fn sample(name: &str) -> RgbImage {
        let directory = crate::build::workspace_root().join("deploy/demo");
        let content = Samples::read(&directory).unwrap().picture(name).unwrap();
        image::load_from_memory(&content).unwrap().to_rgb8()
    }

    #[test]
    fn a_scaled_picture_is_near_and_every_other_is_far() {
        let names = ["sunset.jpg", "hills.jpg", "four-fields.png", "rings.png"];
        for small in names {
            let thumbnail = imageops::resize(&sample(small), 160, 107, FilterType::Triangle);
            for large in names {
                let difference = difference(&sample(large), &thumbnail);
                assert_eq!(difference <= TOLERANCE, small == large, "{small} against {large}: {difference}");
            }
        }
    }

    #[test]
    fn a_turned_picture_is_far() {
        let picture = sample("four-fields.png");
        let thumbnail = imageops::resize(&imageops::rotate180(&picture), 160, 107, FilterType::Triangle);
        assert!(difference(&picture, &thumbnail) > TOLERANCE);
    }
}
