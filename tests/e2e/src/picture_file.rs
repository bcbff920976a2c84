//! Pictures as files: PNG for people, and the bare bytes that a guest dumps. The native program, the end-to-end tests
//! and the demo use it.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use pvgpu_scenarios::Picture;

/// Writes the picture as PNG, whatever the name of the file.
pub fn write_png(picture: &Picture, path: &Path) -> io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    encode_png(picture, &mut file)?;
    file.flush()
}

fn encode_png(picture: &Picture, output: impl Write) -> io::Result<()> {
    let mut encoder = png::Encoder::new(output, picture.width, picture.height);
    encoder.set_color(png::ColorType::Rgba);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&picture.rgba)?;
    Ok(writer.finish()?)
}

/// Reads a PNG of eight bits for each of red, green, blue and alpha.
pub fn read_png(path: &Path) -> io::Result<Picture> {
    decode_png(io::BufReader::new(File::open(path)?))
}

/// Reads a PNG of eight bits for each of red, green, blue and alpha from `input`.
pub fn decode_png(input: impl io::BufRead + io::Seek) -> io::Result<Picture> {
    let mut reader = png::Decoder::new(input).read_info()?;
    let size = reader.output_buffer_size().unwrap_or(0);
    let mut rgba = vec![0; size];
    let info = reader.next_frame(&mut rgba)?;
    if (info.color_type, info.bit_depth) != (png::ColorType::Rgba, png::BitDepth::Eight) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(Picture {
        width: info.width,
        height: info.height,
        rgba,
    })
}

/// Writes the picture's bytes alone: four for each pixel, row after row.
pub fn write_rgba(picture: &Picture, path: &Path) -> io::Result<()> {
    fs::write(path, &picture.rgba)
}

/// Reads the bytes of a picture of that size; the file must hold exactly as many.
pub fn read_rgba(path: &Path, width: u32, height: u32) -> io::Result<Picture> {
    let rgba = fs::read(path)?;
    let expected = u64::from(width) * u64::from(height) * 4;
    if rgba.len() as u64 != expected {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "{} has {} bytes, a picture of {width}x{height} has {expected}",
                path.display(),
                rgba.len()
            ),
        ));
    }
    Ok(Picture {
        width,
        height,
        rgba,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_png_gives_back_the_pixels_that_went_in() {
        let picture = Picture {
            width: 3,
            height: 2,
            rgba: (0..24).collect(),
        };
        let mut bytes = Vec::new();
        encode_png(&picture, &mut bytes).unwrap();
        let back = decode_png(io::Cursor::new(bytes)).unwrap();
        assert_eq!(back, picture);
    }
}
