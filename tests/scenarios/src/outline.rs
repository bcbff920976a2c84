//! Outlines of shapes as paths of the soft GPU: points and verbs. Uses only additions and multiplications, so that
//! every machine makes the same points.

use alloc::vec::Vec;

use pvgpu_protocol::family::soft::verb;

/// Control points of a quarter of a circle lie this part of the radius away from its ends.
const QUARTER: f32 = 0.552_284_8;

/// Some contours. Where they overlap they unite; a contour that turns the other way cuts a hole.
#[derive(Clone, Debug, Default)]
pub struct Outline {
    /// Points in the order in which the verbs take them: x, y in pixels, y downwards.
    pub points: Vec<[f32; 2]>,
    /// Verbs, of [`verb`].
    pub verbs: Vec<u8>,
}

impl Outline {
    /// No contour.
    pub fn new() -> Self {
        Self::default()
    }

    fn push(&mut self, verb: u8, points: &[[f32; 2]]) -> &mut Self {
        self.verbs.push(verb);
        self.points.extend_from_slice(points);
        self
    }

    /// Starts a contour.
    pub fn start(&mut self, at: [f32; 2]) -> &mut Self {
        self.push(verb::MOVE, &[at])
    }

    /// A straight line.
    pub fn line(&mut self, to: [f32; 2]) -> &mut Self {
        self.push(verb::LINE, &[to])
    }

    /// A curve with one control point.
    pub fn curve(&mut self, control: [f32; 2], to: [f32; 2]) -> &mut Self {
        self.push(verb::QUAD, &[control, to])
    }

    /// Ends a contour.
    pub fn close(&mut self) -> &mut Self {
        self.push(verb::CLOSE, &[])
    }

    /// A contour of straight lines.
    pub fn polygon(&mut self, corners: &[[f32; 2]]) -> &mut Self {
        let mut corners = corners.iter();
        if let Some(first) = corners.next() {
            self.start(*first);
            for corner in corners {
                self.line(*corner);
            }
            self.close();
        }
        self
    }

    /// A rectangle.
    pub fn rectangle(&mut self, x: f32, y: f32, width: f32, height: f32) -> &mut Self {
        let (right, bottom) = (x + width, y + height);
        self.polygon(&[[x, y], [right, y], [right, bottom], [x, bottom]])
    }

    /// A whole ellipse, clockwise.
    pub fn ellipse(&mut self, centre: [f32; 2], rx: f32, ry: f32) -> &mut Self {
        self.start(add(centre, [rx, 0.0]));
        self.quarters(centre, rx, ry, &[0, 1, 2, 3]).close()
    }

    /// A circle, clockwise.
    pub fn circle(&mut self, centre: [f32; 2], radius: f32) -> &mut Self {
        self.ellipse(centre, radius, radius)
    }

    /// A circle that turns the other way: a hole.
    pub fn hole(&mut self, centre: [f32; 2], radius: f32) -> &mut Self {
        self.ellipse(centre, radius, -radius)
    }

    /// The lower half of a ring.
    pub fn bowl(&mut self, centre: [f32; 2], outer: f32, inner: f32) -> &mut Self {
        self.start(add(centre, [outer, 0.0]));
        self.quarters(centre, outer, outer, &[0, 1]);
        self.line(add(centre, [-inner, 0.0]));
        // From the left end back below the centre to the right one.
        self.quarters(centre, -inner, inner, &[0, 1]).close()
    }

    /// Quarters of an ellipse; number 0 starts at (rx, 0) and goes to (0, ry).
    fn quarters(&mut self, centre: [f32; 2], rx: f32, ry: f32, which: &[u8]) -> &mut Self {
        for quarter in which {
            let turn = |[x, y]: [f32; 2]| match quarter % 4 {
                0 => [x, y],
                1 => [-y, x],
                2 => [-x, -y],
                _ => [y, -x],
            };
            let points = [[1.0, QUARTER], [QUARTER, 1.0], [0.0, 1.0]].map(|point| {
                let [x, y] = turn(point);
                add(centre, [x * rx, y * ry])
            });
            self.push(verb::CUBIC, &points);
        }
        self
    }
}

fn add([a, b]: [f32; 2], [c, d]: [f32; 2]) -> [f32; 2] {
    [a + c, b + d]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Points that the verbs of an outline take.
    fn taken(outline: &Outline) -> usize {
        let points = |verb: &u8| match *verb {
            verb::MOVE | verb::LINE => 1,
            verb::QUAD => 2,
            verb::CUBIC => 3,
            _ => 0,
        };
        outline.verbs.iter().map(points).sum()
    }

    #[test]
    fn verbs_take_exactly_the_points_there_are() {
        let mut outline = Outline::new();
        outline
            .circle([5.0, 5.0], 3.0)
            .hole([5.0, 5.0], 2.0)
            .bowl([9.0, 9.0], 4.0, 2.0)
            .rectangle(1.0, 2.0, 3.0, 4.0)
            .polygon(&[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]);
        assert_eq!(taken(&outline), outline.points.len());
    }

    #[test]
    fn an_ellipse_ends_where_it_starts_and_touches_its_bounds() {
        let mut outline = Outline::new();
        outline.ellipse([10.0, 20.0], 4.0, 2.0);
        assert_eq!(outline.points.first(), outline.points.last());
        for end in [[10.0, 22.0], [6.0, 20.0], [10.0, 18.0]] {
            assert!(outline.points.contains(&end), "{end:?}");
        }
    }
}
