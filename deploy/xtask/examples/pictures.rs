//! Draws the sample pictures of the demo anew: `cargo run -p xtask --example pictures`.
//!
//! They are checked in, so this runs only when the samples change. The same program draws the same bytes each time.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use image::codecs::jpeg::JpegEncoder;
use image::codecs::png::PngEncoder;
use image::{Rgb, RgbImage};

const WIDTH: u32 = 480;
const HEIGHT: u32 = 320;

/// A picture: its file, and the colour at a place with both coordinates from 0 to 1.
type Picture = (&'static str, fn(f64, f64) -> [f64; 3]);

const PICTURES: &[Picture] =
    &[("sunset.jpg", sunset), ("hills.jpg", hills), ("four-fields.png", four_fields), ("rings.png", rings)];

fn main() -> anyhow::Result<()> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/pictures");
    for (name, colour) in PICTURES {
        let picture = RgbImage::from_fn(WIDTH, HEIGHT, |x, y| {
            let [r, g, b] = colour(f64::from(x) / f64::from(WIDTH), f64::from(y) / f64::from(HEIGHT)).map(channel);
            Rgb([r, g, b])
        });
        let file = BufWriter::new(File::create(directory.join(name))?);
        if name.ends_with(".png") {
            picture.write_with_encoder(PngEncoder::new(file))?;
        } else {
            picture.write_with_encoder(JpegEncoder::new_with_quality(file, 85))?;
        }
    }
    Ok(())
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to a byte")]
fn channel(value: f64) -> u8 {
    value.clamp(0.0, 255.0).round() as u8
}

fn mix(a: [f64; 3], b: [f64; 3], part: f64) -> [f64; 3] {
    let part = part.clamp(0.0, 1.0);
    [0, 1, 2].map(|i| a[i] + (b[i] - a[i]) * part)
}

/// A low sun over the sea.
fn sunset(x: f64, y: f64) -> [f64; 3] {
    const HORIZON: f64 = 0.65;
    let sky = mix([38.0, 40.0, 92.0], [246.0, 150.0, 80.0], y / HORIZON);
    let from_sun = ((x - 0.35) * 1.5).hypot(y - 0.5);
    if y < HORIZON {
        return mix([255.0, 236.0, 170.0], sky, (from_sun - 0.11) * 12.0);
    }
    let glitter = 0.5 + 0.5 * ((y * 160.0).sin() * (x * 40.0 + y * 90.0).cos());
    let path = (1.0 - (x - 0.35).abs() * 7.0).clamp(0.0, 1.0) * glitter;
    mix(mix([70.0, 62.0, 104.0], [22.0, 26.0, 58.0], (y - HORIZON) * 3.0), [255.0, 200.0, 130.0], path)
}

/// Three ridges in the haze.
fn hills(x: f64, y: f64) -> [f64; 3] {
    let ridge = |height: f64, waves: f64, shift: f64| {
        height + 0.06 * (x * waves + shift).sin() + 0.03 * (x * waves * 2.3 + shift).cos()
    };
    let layers = [
        (ridge(0.75, 7.0, 0.4), [34.0, 70.0, 44.0]),
        (ridge(0.58, 9.0, 2.0), [78.0, 122.0, 96.0]),
        (ridge(0.45, 6.0, 4.0), [140.0, 172.0, 170.0]),
    ];
    layers
        .iter()
        .find(|(top, _)| y > *top)
        .map_or_else(|| mix([120.0, 176.0, 226.0], [226.0, 236.0, 240.0], y / 0.5), |(_, colour)| *colour)
}

/// Red, green, blue and yellow: a thumbnail that is turned, mirrored or has its channels swapped shows at once.
fn four_fields(x: f64, y: f64) -> [f64; 3] {
    match (x < 0.5, y < 0.5) {
        (true, true) => [214.0, 40.0, 40.0],
        (false, true) => [40.0, 160.0, 70.0],
        (true, false) => [40.0, 80.0, 200.0],
        (false, false) => [240.0, 200.0, 40.0],
    }
}

/// Rings of two colours around the middle.
fn rings(x: f64, y: f64) -> [f64; 3] {
    let radius = ((x - 0.5) * 1.5).hypot(y - 0.5);
    if (radius * 10.0).floor() % 2.0 < 1.0 { [250.0, 244.0, 230.0] } else { [60.0, 30.0, 90.0] }
}
