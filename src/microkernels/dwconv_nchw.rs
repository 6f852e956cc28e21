//! The depthwise convolution over NCHW planes, pixels being the vector dimension.
//!
//! Both kernels go down a plane row by row and keep all results that a row of the input takes part
//! in: [`DwConvNchw`] the output rows that are not complete yet, [`DwConvNchwGradWeight`] the rows
//! of the gradient that it still meets.
//!
//! ```text
//!                    y[t-2]  y[t-1]  y[t]        a kernel of 3 rows, stride 1
//!   x[t] * w[2][.]     +=
//!   x[t] * w[1][.]             +=
//!   x[t] * w[0][.]                     +=        then y[t-2] is complete
//! ```
//!
//! So a value is loaded once for each column of the kernel, not once for each of its taps. Planes
//! are read as they come: rows above and below them are left out, what a tap sees beside them is
//! masked ([`TapView`]).

use std::marker::PhantomData;

use super::tap_view::{Alternate, Edges, Layout, MAX_COLUMNS, Masked, TapView, Whole};
use crate::simd::element::{Element, one_lane};
use crate::simd::{Isa, Kernel, line};

/// The most columns of a kernel in one [`DwConvNchwGradWeight`].
const MAX_TAP_COLUMNS: usize = 5;

/// Evaluates an expression with the constants that stand for a stride and rows of taps: rows of
/// taps, rows of the output that a row of the input takes part in, and the stride.
macro_rules! with_rows {
    ($stride:expr, $rows:expr, $K:ident $J:ident $S:ident => $body:expr) => {
        with_rows!($stride, $rows, $K $J $S => $body, 3 3 1, 5 5 1, 7 7 1, 3 2 2, 5 3 2, 7 4 2)
    };
    ($stride:expr, $rows:expr, $K:ident $J:ident $S:ident => $body:expr, $($k:literal $j:literal $s:literal),*) => {
        match ($stride, $rows) {
            $(($s, $k) => {
                const $K: usize = $k;
                const $J: usize = $j;
                const $S: usize = $s;
                $body
            })*
            (stride, rows) => unreachable!("{rows} rows of taps at a stride of {stride}"),
        }
    };
}

/// Memory for results, in which others may write to what is between them.
pub struct Results<'a, T> {
    pub(super) start: *mut T,
    pub(super) len: usize,
    memory: PhantomData<&'a mut T>,
}

impl<'a, T> Results<'a, T> {
    /// So many values.
    ///
    /// # Safety
    /// For `'a`, what is written of them must be writable, and nobody else's.
    pub unsafe fn new(start: *mut T, len: usize) -> Self {
        Self { start, len, memory: PhantomData }
    }
}

/// `y[t][p] = bias + sum over taps of weights[tap] * x[stride * t + tap row][p + tap column]`.
pub struct DwConvNchw<'a, T: Element> {
    /// The input.
    pub view: TapView<'a, T::Wide>,
    /// Rows of the kernel: 3, 5 or 7.
    pub tap_rows: usize,
    /// The channels' kernels, `[column][row]`.
    pub weights: &'a [T::Wide],
    /// The channels' bias.
    pub bias: &'a [T::Wide],
    /// The output.
    pub y: Results<'a, T>,
    /// From one image and from one channel of the output to the next.
    pub y_steps: [usize; 2],
    /// Rows of the output, and their length.
    pub size: [usize; 2],
}

/// The most vectors of pixels of a tile: as many as give 8 independent sums, which hide the latency
/// of multiply-adds, if registers hold them. Portable code has tiles of one, to be small.
const fn tile_vectors<T: Element, I: Isa>(rows: usize) -> usize {
    let (held, wanted) = ((I::REGISTER_COUNT - 2) / (rows + 1), 8usize.div_ceil(rows));
    match if held < wanted { held } else { wanted } {
        _ if one_lane::<T, I>() => 1,
        // Images come in fours.
        3 if held > 3 => 4,
        vectors => vectors,
    }
}

impl<T: Element> DwConvNchw<'_, T> {
    /// `K` rows of taps at stride `S`: `J` rows of sums.
    #[inline(always)]
    fn rows<I: Isa, const K: usize, const J: usize, const S: usize>(&self, isa: I) {
        let (lanes, [rows, columns]) = (T::lanes::<I>(), self.size);
        let (layout, view) = (Layout::new(&self.view, self.y_steps), self.view.clone());
        let mut at = 0;
        while at < columns {
            let inside = view.inside::<I>(at, columns);
            // Neighbouring vectors inside an only image are as good as those of many images.
            let several = inside > 1 && layout.images.0 == 1;
            let along = Layout { images: (inside, [view.step * lanes, lanes]), ..layout };
            let (layout, vectors) = if several { (along, inside) } else { (layout, 1) };
            // SAFETY: vectors of these columns.
            unsafe {
                if const { S > 1 } && view.step > 1 {
                    let edges = Alternate::<_, MAX_COLUMNS>::new::<T, I>(isa, &view, view.columns, columns, at);
                    self.channels::<I, K, J, S>(isa, edges, &layout, at, rows);
                } else if const { S == 1 } && inside > 0 {
                    self.channels::<I, K, J, S>(isa, Whole, &layout, at, rows);
                } else {
                    let edges = Masked::<_, MAX_COLUMNS>::new::<T, I>(isa, &view, view.columns, self.size, at);
                    self.channels::<I, K, J, S>(isa, edges, &layout, at, rows.div_ceil(S));
                }
            }
            at += vectors * lanes;
        }
    }

    /// Vectors of the columns from `at` on, of all channels.
    ///
    /// # Safety
    /// As for [`DwConvNchw::tiles`].
    #[inline(always)]
    unsafe fn channels<I: Isa, const K: usize, const J: usize, const S: usize>(
        &self,
        isa: I,
        edges: impl Edges<T, I>,
        layout: &Layout,
        at: usize,
        rows: usize,
    ) {
        let Layout { images: (count, steps), channels } = *layout;
        let starts =
            |c: usize, steps: [usize; 2]| [0, 1].map(|i| ([self.view.step * at, at][i] + c * channels.1[i], steps[i]));
        let mut c = 0;
        while c < channels.0 {
            // SAFETY: the caller's promise.
            unsafe {
                if const { tile_vectors::<T, I>(J) == 4 } && count == 1 && channels.0 - c >= 4 {
                    c += self.tile::<I, K, J, S, 4, false, _>(isa, c, edges, starts(c, channels.1), rows);
                } else if const { tile_vectors::<T, I>(J) == 2 } && count == 1 && channels.0 - c >= 2 {
                    c += self.tile::<I, K, J, S, 2, false, _>(isa, c, edges, starts(c, channels.1), rows);
                } else {
                    self.tiles::<I, K, J, S>(isa, c, edges, count, starts(c, steps), rows);
                    c += 1;
                }
            }
        }
    }

    /// `count` vectors of a channel's columns: the indices in `x` and `y` of the first, and the
    /// distance from one to the next.
    ///
    /// # Safety
    /// `run` must have checked the slices, in which the vectors must be.
    #[inline(always)]
    unsafe fn tiles<I: Isa, const K: usize, const J: usize, const S: usize>(
        &self,
        isa: I,
        channel: usize,
        edges: impl Edges<T, I>,
        count: usize,
        starts: [(usize, usize); 2],
        rows: usize,
    ) {
        let mut vector = 0;
        while vector < count {
            let rest = count - vector;
            let starts = starts.map(|(start, step)| (start + vector * step, step));
            // SAFETY: the caller's promise.
            unsafe {
                // Constants: tiles that the registers do not hold are not compiled.
                vector += if const { tile_vectors::<T, I>(J) == 4 } && rest >= 4 {
                    self.tile::<I, K, J, S, 4, true, _>(isa, channel, edges, starts, rows)
                } else if const { tile_vectors::<T, I>(J) == 3 } && rest >= 3 {
                    self.tile::<I, K, J, S, 3, true, _>(isa, channel, edges, starts, rows)
                } else if const { tile_vectors::<T, I>(J) >= 2 } && rest >= 2 {
                    self.tile::<I, K, J, S, 2, true, _>(isa, channel, edges, starts, rows)
                } else {
                    self.tile::<I, K, J, S, 1, true, _>(isa, channel, edges, starts, rows)
                };
            }
        }
    }

    /// `V` vectors of columns, all rows: of one channel, whose kernel they share, or each of
    /// another, from `channel` on; returns how many vectors these are.
    ///
    /// # Safety
    /// As for [`DwConvNchw::tiles`].
    #[inline(always)]
    unsafe fn tile<
        I: Isa,
        const K: usize,
        const J: usize,
        const S: usize,
        const V: usize,
        const SHARED: bool,
        E: Edges<T, I>,
    >(
        &self,
        isa: I,
        channel: usize,
        edges: E,
        [(x_start, x_step), (y_start, y_step)]: [(usize, usize); 2],
        rows: usize,
    ) -> usize {
        let columns = self.view.columns;
        let len = columns.len() * K;
        let channels = if SHARED { 1 } else { V };
        let bias = &self.bias[channel..channel + channels];
        let weights = &self.weights[channel * len..(channel + channels) * len];
        let start: [_; V] = std::array::from_fn(|v| T::splat_wide(isa, bias[if SHARED { 0 } else { v }]));
        let (real, width) = (self.view.real(), self.view.size[1]);
        let (mut x_row, mut y_row) = (self.view.row(x_start), self.y.start.wrapping_add(y_start));
        // Sums of output rows t, t - 1 ...
        let mut sums = [start; J];
        for t in 0..rows + J - 1 {
            for s in 0..S {
                if real.contains(&(S * t + s)) {
                    let (rows, row) = ([s, S * t + s], (x_row.wrapping_add(s * width), x_step));
                    // SAFETY: a row of the plane.
                    unsafe { self.add_row::<I, K, J, S, V, SHARED, E>(isa, &edges, rows, row, weights, &mut sums) };
                }
            }
            if t + 1 >= J {
                for (v, &sum) in sums[J - 1].iter().enumerate() {
                    // SAFETY: a row of the output; the mask keeps the vector inside it.
                    unsafe {
                        let ptr = y_row.add(v * y_step);
                        self.view.prefetch_results(isa, ptr);
                        match edges.results(t + 2 == rows + J) {
                            Some(mask) => T::store_masked(isa, mask, ptr, sum),
                            None => T::store(isa, ptr, sum),
                        }
                    }
                }
                y_row = y_row.wrapping_add(self.view.rows * self.size[1]);
            }
            x_row = x_row.wrapping_add(S * width);
            for j in (1..J).rev() {
                sums[j] = sums[j - 1];
            }
            sums[0] = start;
        }
        V
    }

    /// Adds row `i` of the input, row `s` of those of one row of results, to the sums that see it;
    /// of several vectors, `x_step` apart.
    ///
    /// # Safety
    /// As for [`DwConvNchw::tiles`].
    #[inline(always)]
    unsafe fn add_row<
        I: Isa,
        const K: usize,
        const J: usize,
        const S: usize,
        const V: usize,
        const SHARED: bool,
        E: Edges<T, I>,
    >(
        &self,
        isa: I,
        edges: &E,
        [s, i]: [usize; 2],
        (row, x_step): (*const T::Wide, usize),
        weights: &[T::Wide],
        sums: &mut [[T::Vector<I>; V]; J],
    ) {
        let (columns, masks) = (self.view.columns, edges.row(i));
        let len = columns.len() * K;
        (0..V).for_each(|v| self.view.prefetch(isa, row.wrapping_add(v * x_step), edges.span()));
        for c in (0..columns.len()).step_by(E::TOGETHER) {
            // What this column of taps sees, and perhaps the next.
            let mut x = [[T::splat(isa, T::default()); V]; 2];
            let [first, second] = &mut x;
            for (v, (first, second)) in first.iter_mut().zip(second).enumerate() {
                let ptr = row.wrapping_offset(columns[c]).wrapping_add(v * x_step);
                // SAFETY: `check` saw that it can be read.
                [*first, *second] = unsafe { edges.load(isa, masks, c, ptr) };
            }
            let both = E::TOGETHER == 2 && c + 1 < columns.len();
            for (side, x) in x.into_iter().enumerate() {
                if side > 0 && !both {
                    break;
                }
                for (j, sums) in sums.iter_mut().enumerate() {
                    if s + S * j < K {
                        let tap = (c + side) * K + s + S * j;
                        // SAFETY: the channels' taps.
                        let weight = |v| T::splat_wide(isa, unsafe { *weights.get_unchecked(v * len + tap) });
                        let shared = weight(0);
                        for (v, (sum, x)) in sums.iter_mut().zip(x).enumerate() {
                            *sum = T::mul_add(isa, if SHARED { shared } else { weight(v) }, x, *sum);
                        }
                    }
                }
            }
        }
    }
}

impl<T: Element> Kernel for DwConvNchw<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let [rows, columns] = self.size;
        if rows == 0 || columns == 0 {
            return;
        }
        self.view.check::<I>(self.y.len, self.y_steps, self.size);
        let channels = self.view.channels.0;
        assert_eq!(self.weights.len(), channels * self.view.columns.len() * self.tap_rows, "weights");
        assert_eq!(self.bias.len(), channels, "bias");
        with_rows!(self.view.stride(), self.tap_rows, K J S => self.rows::<I, K, J, S>(isa));
    }
}

/// `sums[tap] += sum over t and p of g[t][p] * x[stride * t + tap row][p + its column's view]`: the
/// weight gradient.
pub struct DwConvNchwGradWeight<'a, T: Element> {
    /// The input.
    pub view: TapView<'a, T::Wide>,
    /// Rows of the kernel: 3, 5 or 7.
    pub tap_rows: usize,
    /// The gradient by the output.
    pub g: &'a [T],
    /// From one image and from one channel of the gradient to the next.
    pub g_steps: [usize; 2],
    /// Rows of the gradient, and their length.
    pub size: [usize; 2],
    /// A cache line for each tap of each channel, `[column][row]`.
    pub slots: &'a mut [T::Wide],
}

/// Columns of a kernel of `taps` rows and columns in a tile: those whose sums registers hold,
/// beside `rows` rows of the gradient.
const fn tile_columns<I: Isa>(taps: usize, rows: usize) -> usize {
    match (I::REGISTER_COUNT - 1 - rows) / taps {
        0 => 1,
        columns if columns >= taps && taps <= MAX_TAP_COLUMNS => taps,
        4.. => 3,
        columns => columns,
    }
}

/// Whether a kernel's columns are divided into tiles some of which are of `columns`.
const fn has_tile<I: Isa>(taps: usize, rows: usize, columns: usize) -> bool {
    let most = tile_columns::<I>(taps, rows);
    columns == most || columns == taps % most
}

impl<T: Element> DwConvNchwGradWeight<'_, T> {
    /// `K` rows and columns of taps at stride `S`: `J` rows of the gradient.
    #[inline(always)]
    fn rows<I: Isa, const K: usize, const J: usize, const S: usize>(&mut self, isa: I) {
        let (mut at, most) = (0, const { tile_columns::<I>(K, J) });
        while at < K {
            let columns = most.min(K - at);
            // SAFETY: the columns are the kernel's. Constants: tiles that there are not are not
            // compiled.
            unsafe {
                at += if const { has_tile::<I>(K, J, 5) } && columns == 5 {
                    self.tile::<I, K, J, S, 5>(isa, at)
                } else if const { has_tile::<I>(K, J, 3) } && columns == 3 {
                    self.tile::<I, K, J, S, 3>(isa, at)
                } else if const { has_tile::<I>(K, J, 2) } && columns == 2 {
                    self.tile::<I, K, J, S, 2>(isa, at)
                } else if const { has_tile::<I>(K, J, 1) } && columns == 1 {
                    self.tile::<I, K, J, S, 1>(isa, at)
                } else {
                    unreachable!("tiles of {columns} columns")
                };
            }
        }
    }

    /// `C` columns of taps from `first`, all pixels; returns how many columns these are.
    ///
    /// # Safety
    /// `run` must have checked the slices, and these columns must exist.
    #[inline(always)]
    unsafe fn tile<I: Isa, const K: usize, const J: usize, const S: usize, const C: usize>(
        &mut self,
        isa: I,
        first: usize,
    ) -> usize {
        let (lanes, [rows, width]) = (T::lanes::<I>(), self.size);
        let columns: [isize; C] = std::array::from_fn(|c| self.view.columns[first + c]);
        let layout = Layout::new(&self.view, self.g_steps);
        for at in (0..width).step_by(lanes) {
            // SAFETY: vectors of these columns.
            unsafe {
                if const { S > 1 } && self.view.step > 1 {
                    let edges = Alternate::<_, C>::new::<T, I>(isa, &self.view, &columns, width, at);
                    self.channels::<I, K, J, S, C>(isa, edges, &layout, (first, columns), at, rows);
                } else if const { S == 1 } && self.view.inside::<I>(at, width) > 0 {
                    let edges = Whole;
                    self.channels::<I, K, J, S, C>(isa, edges, &layout, (first, columns), at, rows);
                } else {
                    let edges = Masked::<_, C>::new::<T, I>(isa, &self.view, &columns, self.size, at);
                    self.channels::<I, K, J, S, C>(isa, edges, &layout, (first, columns), at, rows.div_ceil(S));
                }
            }
        }
        C
    }

    /// Vectors of the columns from `at` on, of all channels.
    ///
    /// # Safety
    /// As for [`DwConvNchwGradWeight::tile`].
    #[inline(always)]
    unsafe fn channels<I: Isa, const K: usize, const J: usize, const S: usize, const C: usize>(
        &mut self,
        isa: I,
        edges: impl Edges<T, I>,
        layout: &Layout,
        (first, columns): (usize, [isize; C]),
        at: usize,
        rows: usize,
    ) {
        let Layout { images, channels } = *layout;
        for c in 0..channels.0 {
            let slots = self.slots::<K, C>(c, first);
            let mut sums = [[T::splat(isa, T::default()); K]; C];
            for (i, sum) in sums.as_flattened_mut().iter_mut().enumerate() {
                // SAFETY: a slot is at least a vector long.
                *sum = unsafe { T::load_wide(isa, slots.add(i * line::<T::Wide>())) };
            }
            for image in 0..images.0 {
                let starts = [0, 1].map(|i| [self.view.step * at, at][i] + c * channels.1[i] + image * images.1[i]);
                // SAFETY: the caller's promise.
                unsafe { self.vector::<I, K, J, S, C, _>(isa, edges, columns, starts, rows, &mut sums) };
            }
            for (i, &sum) in sums.as_flattened().iter().enumerate() {
                // SAFETY: as for the loads.
                unsafe { T::store_wide(isa, slots.add(i * line::<T::Wide>()), sum) };
            }
        }
    }

    /// The slots of a channel's taps of `C` columns of `K` rows.
    #[inline(always)]
    fn slots<const K: usize, const C: usize>(&mut self, channel: usize, first: usize) -> *mut T::Wide {
        let start = (channel * self.view.columns.len() + first) * K;
        self.slots[start * line::<T::Wide>()..(start + C * K) * line::<T::Wide>()].as_mut_ptr()
    }

    /// One vector of columns, all rows, `starts` being its indices in `x` and `g`.
    ///
    /// # Safety
    /// As for [`DwConvNchwGradWeight::tile`].
    #[inline(always)]
    unsafe fn vector<I: Isa, const K: usize, const J: usize, const S: usize, const C: usize, E: Edges<T, I>>(
        &self,
        isa: I,
        edges: E,
        columns: [isize; C],
        starts: [usize; 2],
        rows: usize,
        sums: &mut [[T::Vector<I>; K]; C],
    ) {
        let zero = T::splat(isa, T::default());
        let (real, width) = (self.view.real(), self.view.size[1]);
        let (mut x_row, mut g_row) = (self.view.row(starts[0]), self.g.as_ptr().wrapping_add(starts[1]));
        // Rows t, t - 1 ... of the gradient.
        let mut g = [zero; J];
        for t in 0..rows + J - 1 {
            for j in (1..J).rev() {
                g[j] = g[j - 1];
            }
            g[0] = zero;
            if t < rows {
                self.view.prefetch_results(isa, g_row);
                // SAFETY: row t of the gradient; the mask keeps the vector inside it.
                g[0] = unsafe {
                    match edges.results(t + 1 == rows) {
                        Some(mask) => T::load_masked(isa, mask, g_row),
                        None => T::load(isa, g_row),
                    }
                };
            }
            for s in 0..S {
                let i = S * t + s;
                if !real.contains(&i) {
                    continue;
                }
                let row = x_row.wrapping_add(s * width);
                let masks = edges.row(i);
                self.view.prefetch(isa, row, edges.span());
                for (i, sums) in sums.chunks_mut(E::TOGETHER).enumerate() {
                    let c = i * E::TOGETHER;
                    // SAFETY: `check` saw that it can be read.
                    let x = unsafe { edges.load(isa, masks, c, row.wrapping_offset(columns[c])) };
                    for (x, sums) in x.into_iter().zip(sums) {
                        for (j, &g) in g.iter().enumerate() {
                            if s + S * j < K {
                                sums[s + S * j] = T::mul_add(isa, g, x, sums[s + S * j]);
                            }
                        }
                    }
                }
            }
            (x_row, g_row) = (x_row.wrapping_add(S * width), g_row.wrapping_add(self.view.rows * self.size[1]));
        }
    }
}

impl<T: Element> Kernel for DwConvNchwGradWeight<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let [rows, columns] = self.size;
        if rows == 0 || columns == 0 {
            return;
        }
        self.view.check::<I>(self.g.len(), self.g_steps, self.size);
        assert_eq!(self.view.columns.len(), self.tap_rows, "taps");
        let taps = self.view.channels.0 * self.tap_rows * self.tap_rows;
        assert_eq!(self.slots.len(), taps * line::<T::Wide>(), "slots");
        with_rows!(self.view.stride(), self.tap_rows, K J S => self.rows::<I, K, J, S>(isa));
    }
}
