//! Matrix multiplication on an engine, on private copies of the matrices.
//!
//! The only `unsafe` is the call of `matrixmultiply`, which takes pointers ([`multiply`]).

#![allow(unsafe_code)]

use super::buffer::Buffer;
use super::engine::{Progress, Stop};
use pvgpu_protocol::family::soft::WORK_ROW;
use std::sync::Arc;
use zerocopy::IntoBytes;

/// Rows of A, and rows and columns of B, that are multiplied between two questions whether to go on: some hundred
/// microseconds.
const BLOCK: usize = 256;

/// A matrix of `f32` that lies in its buffer.
pub(super) struct Matrix {
    /// Where.
    pub(super) buffer: Arc<Buffer>,
    /// First byte.
    pub(super) offset: u64,
    /// Bytes from one row to the next.
    pub(super) stride: u64,
}

/// C = A B, or C += A B, with A of `m` rows and `k` columns and B of `n` columns.
pub(super) struct MatMul {
    pub(super) a: Matrix,
    pub(super) b: Matrix,
    pub(super) c: Matrix,
    pub(super) m: u32,
    pub(super) k: u32,
    pub(super) n: u32,
    pub(super) accumulate: bool,
}

/// A private copy of rows.
struct Rows {
    values: Vec<f32>,
    rows: usize,
    columns: usize,
}

fn index(value: u32) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

impl Rows {
    fn zeros(rows: u32, columns: u32) -> Self {
        let (rows, columns) = (index(rows), index(columns));
        Self {
            values: vec![0.0; rows.saturating_mul(columns)],
            rows,
            columns,
        }
    }

    /// Each row with its place in the matrix, of which `first` is the first row here.
    fn at<'a>(
        &'a mut self,
        matrix: &'a Matrix,
        first: u32,
    ) -> impl Iterator<Item = (u64, &'a mut [f32])> {
        let places = (u64::from(first)..).map(|row| {
            let row = row.saturating_mul(matrix.stride);
            matrix.offset.saturating_add(row)
        });
        places.zip(self.values.chunks_exact_mut(self.columns.max(1)))
    }

    fn read(&mut self, matrix: &Matrix, first: u32) -> Result<(), Stop> {
        for (offset, row) in self.at(matrix, first) {
            matrix.buffer.memory().read(offset, row.as_mut_bytes())?;
        }
        Ok(())
    }

    fn write(&mut self, matrix: &Matrix, first: u32) -> Result<(), Stop> {
        for (offset, row) in self.at(matrix, first) {
            matrix.buffer.memory().write(offset, row.as_bytes())?;
        }
        Ok(())
    }
}

impl MatMul {
    /// What it costs, in the units of the command set.
    pub(super) fn work(&self) -> u64 {
        let (m, k, n) = (u64::from(self.m), u64::from(self.k), u64::from(self.n));
        m * k * n / 8 + (2 * m + k) * WORK_ROW
    }

    /// Multiplies a block of rows of A at a time.
    pub(super) fn execute(&self, progress: &Progress) -> Result<(), Stop> {
        let mut b = Rows::zeros(self.k, self.n);
        b.read(&self.b, 0)?;
        let block = u32::try_from(BLOCK).unwrap_or(u32::MAX);
        let mut first = 0;
        while first < self.m {
            progress.check()?;
            let rows = block.min(self.m - first);
            let mut a = Rows::zeros(rows, self.k);
            a.read(&self.a, first)?;
            let mut c = Rows::zeros(rows, self.n);
            if self.accumulate {
                c.read(&self.c, first)?;
            }
            multiply(&a, &b, &mut c, progress)?;
            c.write(&self.c, first)?;
            first += rows;
        }
        Ok(())
    }
}

/// C += A B, in blocks. Does nothing when the sizes don't fit each other.
fn multiply(a: &Rows, b: &Rows, c: &mut Rows, progress: &Progress) -> Result<(), Stop> {
    let holds = |rows: &Rows| rows.rows.checked_mul(rows.columns) == Some(rows.values.len());
    let fit = a.columns == b.rows && c.rows == a.rows && c.columns == b.columns;
    let stride = |rows: &Rows| isize::try_from(rows.columns).ok();
    let (Some(a_stride), Some(b_stride), Some(c_stride)) = (stride(a), stride(b), stride(c)) else {
        return Ok(());
    };
    if !(fit && holds(a) && holds(b) && holds(c)) {
        return Ok(());
    }
    for column in (0..b.columns).step_by(BLOCK) {
        for row in (0..b.rows).step_by(BLOCK) {
            progress.check()?;
            let (a, b_block) = (
                a.values.get(row..),
                b.values.get(row * b.columns + column..),
            );
            let (Some(a), Some(b_block)) = (a, b_block) else {
                continue;
            };
            let Some(c_block) = c.values.get_mut(column..) else {
                continue;
            };
            // SAFETY: the vectors hold rows times columns values each (`holds`), rows follow each other without gaps, and
            // the sizes fit each other (`fit`). The blocks begin at column `row` of A, at `row` and `column` of B and at
            // `column` of C, and end within their last row and column (`min`). C is borrowed mutably, so that it is neither
            // A nor B.
            unsafe {
                matrixmultiply::sgemm(
                    c.rows,
                    BLOCK.min(b.rows - row),
                    BLOCK.min(b.columns - column),
                    1.0,
                    a.as_ptr(),
                    a_stride,
                    1,
                    b_block.as_ptr(),
                    b_stride,
                    1,
                    1.0,
                    c_block.as_mut_ptr(),
                    c_stride,
                    1,
                );
            }
        }
    }
    Ok(())
}
