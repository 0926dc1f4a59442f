//! One picture in, one smaller picture out. Pure: bytes and bounds, no threads, no wire.

use std::io::Cursor;

use image::{
    DynamicImage, GenericImageView as _, ImageDecoder as _, ImageError, ImageFormat, ImageReader, Limits, RgbImage,
    codecs::{jpeg::JpegEncoder, png::PngEncoder},
    metadata::Orientation,
};

/// What a picture may cost.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Pixels per side of the picture that comes.
    pub(super) picture_edge: u32,
    /// Bytes of the decoded picture.
    pub(super) decoded_bytes: u64,
}

impl Bounds {
    /// Pixels per side of a thumbnail.
    pub(super) const MOST_THUMBNAIL_EDGE: u32 = 2048;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Png,
    Jpeg,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    /// Pixels of the longer side.
    pub(super) edge: u32,
    /// `None`: as the picture came.
    pub(super) format: Option<Format>,
    /// 1 to 100.
    pub(super) jpeg_quality: u8,
}

#[derive(Debug)]
pub(super) struct Scaled {
    pub(super) file: Vec<u8>,
    pub(super) format: Format,
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) original_width: u32,
    pub(super) original_height: u32,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum ScaleError {
    #[error("the picture is neither PNG nor JPEG")]
    NotAPicture,
    #[error("the picture is too large: {0}")]
    TooLarge(String),
    #[error("the picture cannot be decoded: {0}")]
    Broken(String),
    #[error("the thumbnail cannot be encoded: {0}")]
    Encode(ImageError),
}

/// Whether the bytes begin like a picture that [`thumbnail`] decodes.
pub(super) fn format_of(file: &[u8]) -> Option<Format> {
    match image::guess_format(file) {
        Ok(ImageFormat::Png) => Some(Format::Png),
        Ok(ImageFormat::Jpeg) => Some(Format::Jpeg),
        _ => None,
    }
}

/// Scales the picture to fit `wanted.edge`; never enlarges it.
pub(super) fn thumbnail(file: &[u8], wanted: Wanted, bounds: Bounds) -> Result<Scaled, ScaleError> {
    let format = format_of(file).ok_or(ScaleError::NotAPicture)?;
    let (picture, orientation) = decode(file, format, bounds)?;
    let (mut original_width, mut original_height) = picture.dimensions();
    let mut small = if original_width.max(original_height) > wanted.edge {
        picture.thumbnail(wanted.edge, wanted.edge)
    } else {
        picture
    };
    // The box is square, so the small picture can be turned in place of the large one.
    small.apply_orientation(orientation);
    if turns_a_quarter(orientation) {
        std::mem::swap(&mut original_width, &mut original_height);
    }
    let format = wanted.format.unwrap_or(format);
    let file = encode(&small, format, wanted.jpeg_quality).map_err(ScaleError::Encode)?;
    Ok(Scaled { file, format, width: small.width(), height: small.height(), original_width, original_height })
}

fn decode(file: &[u8], format: Format, bounds: Bounds) -> Result<(DynamicImage, Orientation), ScaleError> {
    let format = match format {
        Format::Png => ImageFormat::Png,
        Format::Jpeg => ImageFormat::Jpeg,
    };
    let failed = |error: ImageError| match error {
        ImageError::Limits(_) => ScaleError::TooLarge(format!(
            "at most {} pixels per side and {} bytes decoded are taken",
            bounds.picture_edge, bounds.decoded_bytes
        )),
        error => ScaleError::Broken(error.to_string()),
    };
    let mut limits = Limits::default();
    limits.max_image_width = Some(bounds.picture_edge);
    limits.max_image_height = Some(bounds.picture_edge);
    limits.max_alloc = Some(bounds.decoded_bytes);
    let mut reader = ImageReader::with_format(Cursor::new(file), format);
    reader.limits(limits.clone());
    let mut decoder = reader.into_decoder().map_err(failed)?;
    // Reading the header has cost nothing yet; refuse here what decoding would allocate.
    let (width, height) = decoder.dimensions();
    if width > bounds.picture_edge || height > bounds.picture_edge {
        return Err(ScaleError::TooLarge(format!(
            "it has {width} × {height} pixels, and at most {} per side are taken",
            bounds.picture_edge
        )));
    }
    if decoder.total_bytes() > bounds.decoded_bytes {
        return Err(ScaleError::TooLarge(format!(
            "decoded it takes {} bytes, and at most {} are taken",
            decoder.total_bytes(),
            bounds.decoded_bytes
        )));
    }
    // Cameras store the sensor's rows and note how they were held. A picture with an unreadable note stays as it is.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let picture = DynamicImage::from_decoder(decoder).map_err(failed)?;
    Ok((picture, orientation))
}

fn turns_a_quarter(orientation: Orientation) -> bool {
    match orientation {
        Orientation::Rotate90 | Orientation::Rotate270 | Orientation::Rotate90FlipH | Orientation::Rotate270FlipH => {
            true
        }
        Orientation::NoTransforms
        | Orientation::Rotate180
        | Orientation::FlipHorizontal
        | Orientation::FlipVertical => false,
    }
}

fn encode(picture: &DynamicImage, format: Format, quality: u8) -> Result<Vec<u8>, ImageError> {
    let mut file = Vec::new();
    match format {
        Format::Png if picture.color().has_alpha() => picture.to_rgba8().write_with_encoder(PngEncoder::new(&mut file)),
        Format::Png => picture.to_rgb8().write_with_encoder(PngEncoder::new(&mut file)),
        Format::Jpeg => on_white(picture).write_with_encoder(JpegEncoder::new_with_quality(&mut file, quality)),
    }?;
    Ok(file)
}

/// JPEG has no transparency; without this, transparent pixels would show whatever colour lies under them.
fn on_white(picture: &DynamicImage) -> RgbImage {
    if !picture.color().has_alpha() {
        return picture.to_rgb8();
    }
    let picture = picture.to_rgba8();
    RgbImage::from_fn(picture.width(), picture.height(), |x, y| {
        let [red, green, blue, alpha] = picture.get_pixel(x, y).0;
        let blend = |colour: u8| {
            let sum = u32::from(colour) * u32::from(alpha) + 255 * (255 - u32::from(alpha));
            u8::try_from((sum + 127) / 255).unwrap_or(u8::MAX)
        };
        image::Rgb([blend(red), blend(green), blend(blue)])
    })
}

#[cfg(test)]
mod tests {
    use image::{GrayImage, Luma, Rgb, Rgba, RgbaImage};

    use super::*;

    const BOUNDS: Bounds = Bounds { picture_edge: 1000, decoded_bytes: 4_000_000 };

    fn wanted(edge: u32, format: Option<Format>) -> Wanted {
        Wanted { edge, format, jpeg_quality: 95 }
    }

    fn png(picture: impl Into<DynamicImage>) -> Vec<u8> {
        encode(&picture.into(), Format::Png, 0).unwrap()
    }

    fn decoded(scaled: &Scaled) -> DynamicImage {
        image::load_from_memory(&scaled.file).unwrap()
    }

    /// Left half red, right half blue.
    fn halves(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, _| if x < width / 2 { Rgb([255, 0, 0]) } else { Rgb([0, 0, 255]) })
    }

    #[test]
    fn scales_to_fit_and_keeps_the_picture() {
        let scaled = thumbnail(&png(halves(400, 200)), wanted(40, None), BOUNDS).unwrap();
        assert_eq!((scaled.width, scaled.height), (40, 20));
        assert_eq!((scaled.original_width, scaled.original_height), (400, 200));
        assert_eq!(scaled.format, Format::Png);
        assert_eq!(decoded(&scaled).to_rgb8(), halves(40, 20));
    }

    #[test]
    fn a_pixel_is_the_mean_of_those_it_stands_for() {
        let checkers = GrayImage::from_fn(64, 64, |x, y| Luma([if (x + y) % 2 == 0 { 0 } else { 200 }]));
        let scaled = thumbnail(&png(checkers), wanted(16, None), BOUNDS).unwrap();
        for pixel in decoded(&scaled).to_luma8().pixels() {
            assert!(pixel.0[0].abs_diff(100) <= 1, "{pixel:?}");
        }
    }

    #[test]
    fn jpeg_in_and_out() {
        let jpeg = encode(&halves(320, 320).into(), Format::Jpeg, 95).unwrap();
        let scaled = thumbnail(&jpeg, wanted(32, None), BOUNDS).unwrap();
        assert_eq!(scaled.format, Format::Jpeg);
        let small = decoded(&scaled).to_rgb8();
        let close = |x, y, to: [u8; 3]| small.get_pixel(x, y).0.iter().zip(to).all(|(a, b)| a.abs_diff(b) < 24);
        assert!(close(4, 16, [255, 0, 0]), "{:?}", small.get_pixel(4, 16));
        assert!(close(28, 16, [0, 0, 255]), "{:?}", small.get_pixel(28, 16));
    }

    #[test]
    fn a_small_picture_keeps_its_size() {
        let scaled = thumbnail(&png(halves(8, 4)), wanted(256, None), BOUNDS).unwrap();
        assert_eq!(decoded(&scaled).to_rgb8(), halves(8, 4));
    }

    #[test]
    fn a_line_does_not_vanish() {
        let scaled = thumbnail(&png(halves(900, 1)), wanted(9, None), BOUNDS).unwrap();
        assert_eq!((scaled.width, scaled.height), (9, 1));
    }

    #[test]
    fn transparency_survives_as_png_and_is_white_as_jpeg() {
        let clear = png(RgbaImage::from_pixel(64, 64, Rgba([255, 0, 0, 0])));
        let kept = thumbnail(&clear, wanted(16, None), BOUNDS).unwrap();
        assert!(decoded(&kept).to_rgba8().pixels().all(|pixel| pixel.0[3] == 0));
        let white = thumbnail(&clear, wanted(16, Some(Format::Jpeg)), BOUNDS).unwrap();
        assert!(decoded(&white).to_rgb8().pixels().all(|pixel| pixel.0.iter().all(|colour| *colour > 250)));
    }

    #[test]
    fn a_camera_held_upright_gives_an_upright_thumbnail() {
        use image::ImageEncoder as _;
        // An Exif block of one entry: orientation (0x0112) is 6, "turn a quarter clockwise to show".
        let exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
        let mut file = Vec::new();
        let mut encoder = JpegEncoder::new_with_quality(&mut file, 95);
        encoder.set_exif_metadata(exif.to_vec()).unwrap();
        halves(200, 100).write_with_encoder(encoder).unwrap();
        let scaled = thumbnail(&file, wanted(40, None), BOUNDS).unwrap();
        assert_eq!((scaled.width, scaled.height), (20, 40));
        assert_eq!((scaled.original_width, scaled.original_height), (100, 200));
        let small = decoded(&scaled).to_rgb8();
        assert!(small.get_pixel(10, 4).0[0] > 200, "the left half is on top");
        assert!(small.get_pixel(10, 36).0[2] > 200, "the right half is below");
    }

    #[test]
    fn what_is_no_picture_is_refused() {
        for file in [&b""[..], b"GIF89a", b"hello", b"\x89PNG"] {
            let refused = thumbnail(file, wanted(16, None), BOUNDS).unwrap_err();
            assert!(matches!(refused, ScaleError::NotAPicture), "{refused}");
        }
    }

    #[test]
    fn a_truncated_png_is_refused() {
        let whole = png(halves(300, 300));
        for length in [9, 20, 33, 40, whole.len() / 2, whole.len() - 20] {
            let refused = thumbnail(&whole[..length], wanted(16, None), BOUNDS).unwrap_err();
            assert!(matches!(refused, ScaleError::Broken(_)), "{length}: {refused}");
        }
    }

    /// A header of 60000 × 60000 pixels in a file of a few bytes.
    fn bomb() -> Vec<u8> {
        let mut file = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR".to_vec();
        file.extend([0, 0, 0xea, 0x60, 0, 0, 0xea, 0x60, 8, 6, 0, 0, 0]);
        file.extend(crc32(&file[12..]).to_be_bytes());
        file.extend(b"\0\0\0\0IDAT");
        file.extend(crc32(b"IDAT").to_be_bytes());
        file
    }

    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(u32::MAX, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 })
        })
    }

    #[test]
    fn a_bomb_is_refused_by_its_header_and_the_limit_is_named() {
        let refused = thumbnail(&bomb(), wanted(16, None), BOUNDS).unwrap_err();
        assert!(matches!(refused, ScaleError::TooLarge(_)), "{refused}");
        assert!(refused.to_string().contains("1000"), "{refused}");
    }

    #[test]
    fn decoded_bytes_are_bounded_as_well() {
        let file = png(halves(900, 900));
        let bounds = Bounds { decoded_bytes: 900 * 900 * 3 - 1, ..BOUNDS };
        let refused = thumbnail(&file, wanted(16, None), bounds).unwrap_err();
        assert!(refused.to_string().contains("2429999"), "{refused}");
    }
}
