//! Numbers for the scenes: angles, matrices, colours. They must be the same on every processor, so nothing here calls the C
//! library's mathematics: it picks its code by what the processor can do, and a guest's processor can do less.

use std::f64::consts::TAU;

/// Sine and cosine of an angle in turns of 360 degrees.
pub fn sin_cos(turns: f32) -> (f32, f32) {
    let turns = f64::from(turns);
    let quarters = (turns * 4.0).round();
    let x = (turns - quarters / 4.0) * TAU;
    let square = x * x;
    // Taylor's series; |x| is at most an eighth of a turn, so that what is left out is less than an f32 can hold.
    let sine = x
        * (1.0
            - square / 6.0 * (1.0 - square / 20.0 * (1.0 - square / 42.0 * (1.0 - square / 72.0))));
    let cosine = 1.0
        - square / 2.0
            * (1.0
                - square / 12.0
                    * (1.0 - square / 30.0 * (1.0 - square / 56.0 * (1.0 - square / 90.0))));
    let (sine, cosine) = match quarters.rem_euclid(4.0) as u8 {
        0 => (sine, cosine),
        1 => (cosine, -sine),
        2 => (-sine, -cosine),
        _ => (-cosine, sine),
    };
    (sine as f32, cosine as f32)
}

/// A bright colour for each angle in turns: red at 0, green at a third.
pub fn hue(turns: f32) -> [f32; 3] {
    [0.0, 1.0 / 3.0, 2.0 / 3.0].map(|place| {
        let (_, cosine) = sin_cos(turns - place);
        0.55 + 0.45 * cosine
    })
}

/// A point or a direction.
pub type Vector = [f32; 3];

/// A sum.
pub fn add(a: Vector, b: Vector) -> Vector {
    [a[0] + b[0], a[1] + b[1], a[2] + b[2]]
}

/// `a`, `factor` times as long.
pub fn scale(a: Vector, factor: f32) -> Vector {
    a.map(|x| x * factor)
}

/// At a right angle to both.
pub fn cross(a: Vector, b: Vector) -> Vector {
    [
        a[1] * b[2] - a[2] * b[1],
        a[2] * b[0] - a[0] * b[2],
        a[0] * b[1] - a[1] * b[0],
    ]
}

/// The direction of `a`, one long.
pub fn normalize(a: Vector) -> Vector {
    let length = (a[0] * a[0] + a[1] * a[1] + a[2] * a[2]).sqrt();
    scale(a, 1.0 / length)
}

/// Turns `a` by so many turns about the y axis, then about the x axis.
pub fn rotate(a: Vector, about_y: f32, about_x: f32) -> Vector {
    let (sine, cosine) = sin_cos(about_y);
    let [x, y, z] = [
        a[0] * cosine + a[2] * sine,
        a[1],
        a[2] * cosine - a[0] * sine,
    ];
    let (sine, cosine) = sin_cos(about_x);
    [x, y * cosine - z * sine, y * sine + z * cosine]
}

/// The matrix, column after column, of an eye at distance `back` on the z axis that sees what is between `near` and `far`
/// before it; `zoom` is the cotangent of half its angle.
pub fn perspective(zoom: f32, near: f32, far: f32, back: f32) -> [f32; 16] {
    let depth = near - far;
    let (a, b) = ((far + near) / depth, 2.0 * far * near / depth);
    [
        zoom,
        0.0,
        0.0,
        0.0, //
        0.0,
        zoom,
        0.0,
        0.0, //
        0.0,
        0.0,
        a,
        -1.0, //
        0.0,
        0.0,
        b - a * back,
        back,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sine_and_cosine_are_those_of_the_c_library_but_for_rounding() {
        for step in -2000_i16..2000 {
            let turns = f32::from(step) / 700.0;
            let (sine, cosine) = sin_cos(turns);
            let expected = (f64::from(turns) * TAU).sin_cos();
            assert!((f64::from(sine) - expected.0).abs() < 1e-7, "{turns}");
            assert!((f64::from(cosine) - expected.1).abs() < 1e-7, "{turns}");
        }
    }

    #[test]
    fn what_is_turned_keeps_its_length() {
        let [x, y, z] = rotate([1.0, 2.0, 3.0], 0.3, 0.7);
        assert!((x * x + y * y + z * z - 14.0).abs() < 1e-5);
    }
}
