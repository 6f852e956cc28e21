//! The depthwise convolution over NCHW planes, pixels being the vector dimension.
//!
//! Both kernels go down a plane row by row and keep all results that a row of the input takes part in: [`Correlate`] the
//! output rows that are not complete yet, [`CorrelateSums`] the rows of the gradient that it still meets.
//!
//! ```text
//!                    y[t-2]  y[t-1]  y[t]        a kernel of 3 rows, stride 1
//!   x[t] * w[2][.]     +=
//!   x[t] * w[1][.]             +=
//!   x[t] * w[0][.]                     +=        then y[t-2] is complete
//! ```
//!
//! So a value is loaded once for each column of the kernel, not once for each of its taps, and rows of zeros above and
//! below the plane cost nothing. At stride 2 the planes are padded and split by the parity of their rows and columns, and
//! two rows of the input come at each step.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::Element;
use super::pointwise::slot;
use crate::isa::{Isa, Kernel};

/// The most rows of a kernel.
pub const MAX_TAP_ROWS: usize = 7;
/// The most columns of a kernel that sees bare planes.
pub const MAX_COLUMNS: usize = 7;
/// The most columns of a kernel in one [`CorrelateSums`].
const MAX_TAP_COLUMNS: usize = 5;

/// How many rows of taps there is code for that `kernel` rows fit into; those beyond are zero.
pub const fn tap_rows(kernel: usize, stride: usize) -> usize {
    match (stride, kernel) {
        (1, 0..=2) => 2,
        (2, 0..=3) => 3,
        (1, 4) => 4,
        (_, 4..=5) => 5,
        (_, 6..=7) => 7,
        _ => kernel,
    }
}

/// Evaluates an expression with the constants that stand for a stride and what [`tap_rows`] gives: rows of taps, rows of
/// the output that a row of the input takes part in, and the stride.
macro_rules! with_rows {
    ($stride:expr, $rows:expr, $K:ident $J:ident $S:ident => $body:expr) => {
        with_rows!($stride, $rows, $K $J $S => $body, 2 2 1, 3 3 1, 4 4 1, 5 5 1, 7 7 1, 3 2 2, 5 3 2, 7 4 2)
    };
    ($stride:expr, $rows:expr, $K:ident $J:ident $S:ident => $body:expr, $($k:literal $j:literal $s:literal),*) => {
        match ($stride, $rows) {
            $(($s, $k) => {
                const $K: usize = $k;
                const $J: usize = $j;
                const $S: usize = $s;
                $body
            })*
            (stride, rows) => unreachable!("{rows} rows of taps at stride {stride}: see tap_rows"),
        }
    };
}

/// Planes of one channel as a kernel's taps see them. Row `i` starts `first + i % stride * part + i / stride * pitch` after
/// the beginning of `x`.
///
/// Padded planes stand side by side and make long rows. *Bare* ones are as they come, one for each vector of a tile; what a
/// tap sees beyond a plane's edges is masked. Where two of their rows fit into a vector, they go through it together, as
/// at a stride of 2: the output's rows `2 t` and `2 t + 1` are one row of sums. At a stride of 2, a vector is every other
/// value of two.
#[derive(Clone)]
pub struct View<'a, T> {
    /// The planes.
    pub x: &'a [T],
    /// The first row that is seen: in bare planes it may lie above them.
    pub first: isize,
    /// 1 or 2.
    pub stride: usize,
    /// From the part of the even rows to that of the odd ones.
    pub part: usize,
    /// From one row of a part to the next.
    pub pitch: usize,
    /// The rows that are not zero.
    pub real: Range<usize>,
    /// Where the view of each column of the kernel starts in a row.
    pub columns: &'a [isize],
    /// Bare planes.
    pub bare: Option<Bare>,
}

/// Planes that are not padded, of some channels of some images: of either, how many there are and the distance of one to
/// the next.
#[derive(Clone, Copy)]
pub struct Bare {
    /// Height and width of each plane.
    pub size: [usize; 2],
    /// Images, whose planes share a kernel.
    pub images: (usize, usize),
    /// Channels.
    pub channels: (usize, usize),
    /// Columns from what one result sees to what the next does: 1 or 2.
    pub step: usize,
    /// Distance from what is read or written to what is asked for meanwhile.
    pub ahead: usize,
}

impl Bare {
    /// Values from the beginning of the first plane to the end of the last, where planes have so many pixels and their
    /// distances are `steps`; none if there are no planes.
    fn len(&self, [image, channel]: [usize; 2], pixels: usize) -> usize {
        let last = |count: usize, step: usize| Some(count.checked_sub(1)? * step);
        last(self.images.0, image).zip(last(self.channels.0, channel)).map_or(0, |(i, c)| i + c + pixels)
    }
}

impl<T: Element> View<'_, T> {
    /// That vectors of so many columns can be read in all rows: whole ones of padded planes, of bare ones what is inside.
    fn check<I: Isa>(&self, columns: usize) {
        assert!((1..=2).contains(&self.stride), "stride");
        if let Some(bare) = self.bare {
            let [height, width] = bare.size;
            assert_eq!((self.part, self.pitch), (width, self.stride * width), "rows");
            assert!(self.vector_rows() == 1 || columns == width && 2 * width <= T::lanes::<I>(), "stride");
            assert!(self.columns.len() <= MAX_COLUMNS && self.first % width as isize == 0, "columns");
            let row = |i: usize| self.first / width as isize + i as isize;
            let Range { start, end } = self.real.clone();
            let rows = self.vector_rows() as isize;
            assert!(end <= start || row(start) + rows > 0 && row(end) <= height as isize, "real");
            assert!(rows * bare.step as isize == self.stride as isize, "step");
            assert!(self.x.len() >= bare.len([bare.images.1, bare.channels.1], height * width), "x");
            return;
        }
        let Some(last) = self.real.end.checked_sub(1) else { return };
        let row = (self.stride - 1) * self.part + last / self.stride * self.pitch;
        let column = self.columns.iter().max().copied().unwrap_or(0) as usize;
        assert!(self.first >= 0 && self.columns.iter().all(|&column| column >= 0), "columns");
        assert!(self.x.len() >= self.first as usize + row + column + columns.next_multiple_of(T::lanes::<I>()), "x");
    }

    /// Rows of a vector.
    fn vector_rows(&self) -> usize {
        self.bare.map_or(1, |bare| self.stride / bare.step)
    }

    /// How many vectors of columns from `at` on, `end` of which are results, can be loaded whole in all rows.
    #[inline(always)]
    fn inside<I: Isa>(&self, at: usize, end: usize) -> usize {
        let Some(Bare { size: [_, width], .. }) = self.bare else { return 1 };
        let [first, last] = [self.columns.iter().min(), self.columns.iter().max()].map(|c| c.copied().unwrap_or(0));
        // The last column is seen, and is a result's.
        let end = end.min(width.saturating_add_signed(-last));
        if self.stride > 1 || at as isize + first < 0 { 0 } else { end.saturating_sub(at) / T::lanes::<I>() }
    }

    /// How vectors of so many columns of results go through them, the steps of results being `steps`.
    #[inline(always)]
    fn layout<I: Isa>(&self, columns: usize, steps: [usize; 2]) -> Layout {
        match self.bare {
            Some(Bare { images, channels, step, ahead, .. }) => Layout {
                columns,
                step,
                images: (images.0, [images.1, steps[0]]),
                channels: (channels.0, [channels.1, steps[1]]),
                ahead: Some(ahead),
            },
            None => Layout { columns: 1, step: 1, images: (1, [0, 0]), channels: (1, [0, 0]), ahead: None }
                .along::<T, I>(columns),
        }
    }

    /// How many channels there are.
    fn channels(&self) -> usize {
        self.bare.map_or(1, |bare| bare.channels.0)
    }

    /// Row 0, from a place in it on.
    #[inline(always)]
    fn row(&self, place: usize) -> *const T {
        self.x.as_ptr().wrapping_offset(self.first).wrapping_add(place)
    }
}

/// How vectors go through planes: those of the same columns of all images of a channel, one channel after the other, and
/// then those of further columns. Of images and channels, there are so many, and steps from one to the next of `x` and of
/// the results.
#[derive(Clone, Copy)]
struct Layout {
    columns: usize,
    /// Columns of `x` from one column of results to the next.
    step: usize,
    images: (usize, [usize; 2]),
    channels: (usize, [usize; 2]),
    ahead: Option<usize>,
}

impl Layout {
    /// Neighbouring vectors of so many columns of an only image as if they were of many.
    #[inline(always)]
    fn along<T: Element, I: Isa>(self, columns: usize) -> Self {
        let lanes = T::lanes::<I>();
        Self { images: (columns.div_ceil(lanes), [lanes; 2]), ..self }
    }
}

/// How the vectors of a tile are loaded and stored.
trait Edges<T: Element, I: Isa>: Copy {
    /// What is needed to load from one row.
    type Row<'a>: Copy
    where
        Self: 'a;

    /// That of row `i`.
    fn row(&self, i: usize) -> Self::Row<'_>;

    /// A vector of a row, seen by column `c` of those at hand.
    ///
    /// # Safety
    /// The view must have been checked.
    unsafe fn load(&self, isa: I, row: Self::Row<'_>, c: usize, ptr: *const T::Wide) -> T::Vector<I>;

    /// Distance from what is read or written to what is asked for meanwhile, if anything is.
    fn ahead(&self) -> Option<usize>;

    /// Asks for what comes some time after a vector.
    #[inline(always)]
    fn ask<V>(&self, isa: I, ptr: *const V) {
        if let Some(ahead) = self.ahead() {
            isa.prefetch_far(ptr.wrapping_add(ahead));
        }
    }

    /// [`Edges::ask`] of a vector that is loaded.
    #[inline(always)]
    fn ask_row(&self, isa: I, ptr: *const T::Wide) {
        self.ask(isa, ptr);
    }

    /// Which of a vector's values are results: of a row's last vector or of another, and of the last row or of another;
    /// none if all are.
    fn results(&self, last_vector: bool, last_row: bool) -> Option<T::Mask<I>>;
}

/// Vectors of which every value can be loaded: of padded planes, or inside bare ones.
#[derive(Clone, Copy)]
struct Whole<M> {
    /// The results of a row's last vector, if they are not all of it.
    last: Option<M>,
    ahead: Option<usize>,
}

impl<M> Whole<M> {
    /// Those of so many columns.
    #[inline(always)]
    fn new<T: Element<Mask<I> = M>, I: Isa>(isa: I, layout: &Layout, columns: usize) -> Self {
        let rest = columns % T::lanes::<I>();
        // Vectors inside bare planes have no rest.
        let last = (layout.ahead.is_none() && rest > 0).then(|| T::mask(isa, rest));
        Self { last, ahead: layout.ahead }
    }
}

impl<T: Element, I: Isa> Edges<T, I> for Whole<T::Mask<I>> {
    type Row<'a>
        = ()
    where
        Self: 'a;

    #[inline(always)]
    fn row(&self, _i: usize) {}
    #[inline(always)]
    unsafe fn load(&self, isa: I, _row: (), _c: usize, ptr: *const T::Wide) -> T::Vector<I> {
        // SAFETY: the caller's promise.
        unsafe { T::load_wide(isa, ptr) }
    }
    #[inline(always)]
    fn ahead(&self) -> Option<usize> {
        self.ahead
    }
    #[inline(always)]
    fn results(&self, last_vector: bool, _last_row: bool) -> Option<T::Mask<I>> {
        self.last.filter(|_| last_vector)
    }
}

/// Which of `len` lanes see columns of so many, lane `l` column `start + l`: the first one and the end.
fn seen(start: isize, len: usize, columns: usize) -> [usize; 2] {
    [-start, columns as isize - start].map(|lane| lane.clamp(0, len as isize) as usize)
}

/// Vectors of the same columns of bare planes at whose edges they are: all that is loaded lies inside a plane.
#[derive(Clone, Copy)]
struct Masked<M, const C: usize> {
    /// The plane's row that row 0 is, and its last one; none if a vector has one row.
    rows: Option<[isize; 2]>,
    /// For each column of the kernel: where all of a vector's rows are the plane's, only the second, only the first.
    columns: [[M; C]; 3],
    /// The results, if they are not all of a vector: of all rows, of the last one.
    results: [Option<M>; 2],
    ahead: Option<usize>,
}

impl<M: Copy, const C: usize> Masked<M, C> {
    /// Columns from `at` on, of so many rows and columns of results, as at most `C` columns of the kernel see them.
    #[inline(always)]
    fn new<T: Element<Mask<I> = M>, I: Isa>(
        isa: I,
        view: &View<T::Wide>,
        columns: &[isize],
        layout: &Layout,
        [rows, width]: [usize; 2],
        at: usize,
    ) -> Self {
        let len = (width - at).min(T::lanes::<I>());
        let [height, width] = view.bare.map_or([0, 0], |bare| bare.size);
        let row = |column: isize, row: usize| {
            let [first, end] = seen(at as isize + column, len, width);
            T::mask_between(isa, row * width + first, row * width + end)
        };
        let vector_rows = view.vector_rows();
        let none = T::mask(isa, 0);
        let mut masks = [[none; C]; 3];
        for (c, &column) in columns.iter().enumerate() {
            let second = if vector_rows == 2 { row(column, 1) } else { none };
            (masks[1][c], masks[2][c]) = (second, row(column, 0));
            masks[0][c] = T::either_mask(isa, masks[1][c], masks[2][c]);
        }
        let last = (rows - 1) % vector_rows;
        let results = [vector_rows - 1, last].map(|more| {
            let len = more * width + len;
            (len < T::lanes::<I>()).then(|| T::mask(isa, len))
        });
        let rows = (vector_rows == 2).then_some([view.first / width as isize, height as isize - 1]);
        Self { rows, columns: masks, results, ahead: layout.ahead }
    }
}

impl<T: Element, I: Isa, const C: usize> Edges<T, I> for Masked<T::Mask<I>, C> {
    type Row<'a>
        = &'a [T::Mask<I>; C]
    where
        Self: 'a;

    #[inline(always)]
    fn row(&self, i: usize) -> &[T::Mask<I>; C] {
        match self.rows {
            Some([first, _]) if first + (i as isize) < 0 => &self.columns[1],
            Some([first, last]) if first + i as isize == last => &self.columns[2],
            _ => &self.columns[0],
        }
    }
    #[inline(always)]
    unsafe fn load(&self, isa: I, row: &[T::Mask<I>; C], c: usize, ptr: *const T::Wide) -> T::Vector<I> {
        // SAFETY: the caller's promise.
        unsafe { T::load_wide_masked(isa, row[c], ptr) }
    }
    #[inline(always)]
    fn ahead(&self) -> Option<usize> {
        self.ahead
    }
    #[inline(always)]
    fn results(&self, _last_vector: bool, last_row: bool) -> Option<T::Mask<I>> {
        self.results[usize::from(last_row)]
    }
}

/// Vectors of every other column of bare planes, which two vectors hold.
#[derive(Clone, Copy)]
struct Alternate<M, const C: usize> {
    /// For each column of the kernel, what is the plane's of either vector.
    columns: [[M; 2]; C],
    /// The results, if they are not all of a vector.
    results: Option<M>,
    ahead: Option<usize>,
}

impl<M: Copy, const C: usize> Alternate<M, C> {
    /// Columns from `at` on, of so many columns of results, as at most `C` columns of the kernel see them.
    #[inline(always)]
    fn new<T: Element<Mask<I> = M>, I: Isa>(
        isa: I,
        view: &View<T::Wide>,
        columns: &[isize],
        layout: &Layout,
        width: usize,
        at: usize,
    ) -> Self {
        let (lanes, len) = (T::lanes::<I>(), width - at);
        let [_, width] = view.bare.map_or([0, 0], |bare| bare.size);
        let mut masks = [[T::mask(isa, 0); 2]; C];
        for (masks, &column) in masks.iter_mut().zip(columns) {
            *masks = [0, lanes].map(|more| {
                let [first, end] = seen((layout.step * at + more) as isize + column, lanes, width);
                T::mask_between(isa, first, end)
            });
        }
        Self { columns: masks, results: (len < lanes).then(|| T::mask(isa, len)), ahead: layout.ahead }
    }
}

impl<T: Element, I: Isa, const C: usize> Edges<T, I> for Alternate<T::Mask<I>, C> {
    type Row<'a>
        = ()
    where
        Self: 'a;

    #[inline(always)]
    fn row(&self, _i: usize) {}
    #[inline(always)]
    unsafe fn load(&self, isa: I, _row: (), c: usize, ptr: *const T::Wide) -> T::Vector<I> {
        let [first, second] = self.columns[c];
        // SAFETY: the caller's promise.
        unsafe {
            let second = T::load_wide_masked(isa, second, ptr.wrapping_add(T::lanes::<I>()));
            T::split(isa, T::load_wide_masked(isa, first, ptr), second)[0]
        }
    }
    #[inline(always)]
    fn ahead(&self) -> Option<usize> {
        self.ahead
    }
    #[inline(always)]
    fn ask_row(&self, isa: I, ptr: *const T::Wide) {
        [0, T::lanes::<I>()].into_iter().for_each(|more| Edges::<T, I>::ask(self, isa, ptr.wrapping_add(more)));
    }
    #[inline(always)]
    fn results(&self, _last_vector: bool, _last_row: bool) -> Option<T::Mask<I>> {
        self.results
    }
}

/// Memory for results, in which others may write to what is between them.
pub struct Results<'a, T> {
    start: *mut T,
    len: usize,
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

impl<'a, T> From<&'a mut [MaybeUninit<T>]> for Results<'a, T> {
    fn from(y: &'a mut [MaybeUninit<T>]) -> Self {
        Self { start: y.as_mut_ptr().cast(), len: y.len(), memory: PhantomData }
    }
}

/// `y[t][p] = start + sum over taps of weights[tap] * x[stride * t + tap row][p + its column's view]`.
pub struct Correlate<'a, T: Element> {
    /// The input.
    pub view: View<'a, T::Wide>,
    /// Rows of the kernel: what [`tap_rows`] says.
    pub tap_rows: usize,
    /// The channels' kernels, `[column][row]`.
    pub weights: &'a [T::Wide],
    /// The channels' bias.
    pub bias: &'a [T::Wide],
    /// The output.
    pub y: Results<'a, T>,
    /// From one row of the output to the next.
    pub y_pitch: usize,
    /// From one image and from one channel of the output to the next, where planes are bare.
    pub y_steps: [usize; 2],
    /// Rows of the output, and their length.
    pub size: [usize; 2],
}

/// Vectors of pixels beside so many rows of sums.
const fn tile_vectors(registers: usize, rows: usize) -> usize {
    match (registers - 2) / (rows + 1) {
        4.. => 4,
        vectors => vectors,
    }
}

impl<T: Element> Correlate<'_, T> {
    /// `K` rows of taps at stride `S`: `J` rows of sums.
    #[inline(always)]
    fn rows<I: Isa, const K: usize, const J: usize, const S: usize>(&mut self, isa: I) {
        let (lanes, [rows, columns]) = (T::lanes::<I>(), self.size);
        let layout = self.view.layout::<I>(columns, self.y_steps);
        let mut at = 0;
        while at < layout.columns {
            let inside = self.view.inside::<I>(at, columns);
            // SAFETY: vectors of these columns.
            unsafe {
                if inside > 0 {
                    let edges = Whole::new::<T, I>(isa, &layout, columns);
                    let several = inside > 1 && layout.images.0 == 1;
                    let layout = if several { layout.along::<T, I>(inside * lanes) } else { layout };
                    self.channels::<I, K, J, S>(isa, edges, &layout, at, rows);
                    at += if several { inside * lanes } else { lanes };
                } else if S > 1 && layout.step > 1 {
                    let seen = self.view.columns;
                    let edges = Alternate::<_, MAX_COLUMNS>::new::<T, I>(isa, &self.view, seen, &layout, columns, at);
                    self.channels::<I, K, J, S>(isa, edges, &layout, at, rows);
                    at += lanes;
                } else {
                    let columns = self.view.columns;
                    let edges = Masked::<_, MAX_COLUMNS>::new::<T, I>(isa, &self.view, columns, &layout, self.size, at);
                    self.channels::<I, K, J, S>(isa, edges, &layout, at, rows.div_ceil(S));
                    at += lanes;
                }
            }
        }
    }

    /// Vectors of the columns from `at` on, of all channels.
    ///
    /// # Safety
    /// As for [`Correlate::tiles`].
    #[inline(always)]
    unsafe fn channels<I: Isa, const K: usize, const J: usize, const S: usize>(
        &mut self,
        isa: I,
        edges: impl Edges<T, I>,
        layout: &Layout,
        at: usize,
        rows: usize,
    ) {
        let Layout { step, images: (count, steps), channels, .. } = *layout;
        for c in 0..channels.0 {
            let places = [0, 1].map(|i| ([step * at, at][i] + c * channels.1[i], steps[i]));
            // SAFETY: the caller's promise.
            unsafe { self.tiles::<I, K, J, S>(isa, c, edges, count, places, rows) };
        }
    }

    /// So many vectors of a channel's columns, at places in `x` and `y`: of the first one, and from one to the next.
    ///
    /// # Safety
    /// `run` must have checked the slices, in which the vectors must be.
    #[inline(always)]
    unsafe fn tiles<I: Isa, const K: usize, const J: usize, const S: usize>(
        &mut self,
        isa: I,
        channel: usize,
        edges: impl Edges<T, I>,
        count: usize,
        places: [(usize, usize); 2],
        rows: usize,
    ) {
        let mut vector = 0;
        while vector < count {
            let rest = count - vector;
            let places = places.map(|(start, step)| (start + vector * step, step));
            // SAFETY: the caller's promise.
            unsafe {
                // Constants: tiles that the registers do not hold are not compiled.
                vector += if const { tile_vectors(I::REGISTER_COUNT, J) >= 4 } && rest >= 4 {
                    self.tile::<I, K, J, S, 4>(isa, channel, edges, places, rest == 4, rows)
                } else if const { tile_vectors(I::REGISTER_COUNT, J) >= 3 } && rest >= 3 {
                    self.tile::<I, K, J, S, 3>(isa, channel, edges, places, rest == 3, rows)
                } else if const { tile_vectors(I::REGISTER_COUNT, J) >= 2 } && rest >= 2 {
                    self.tile::<I, K, J, S, 2>(isa, channel, edges, places, rest == 2, rows)
                } else {
                    self.tile::<I, K, J, S, 1>(isa, channel, edges, places, rest == 1, rows)
                };
            }
        }
    }

    /// `V` vectors of columns, all rows; returns how many vectors these are.
    ///
    /// # Safety
    /// As for [`Correlate::tiles`].
    #[inline(always)]
    unsafe fn tile<I: Isa, const K: usize, const J: usize, const S: usize, const V: usize>(
        &mut self,
        isa: I,
        channel: usize,
        edges: impl Edges<T, I>,
        [(x_start, x_step), (y_start, y_step)]: [(usize, usize); 2],
        last: bool,
        rows: usize,
    ) -> usize {
        let start = T::splat_wide(isa, self.bias[channel]);
        let len = self.view.columns.len() * K;
        let weights = &self.weights[channel * len..(channel + 1) * len];
        let View { part, pitch, ref real, .. } = self.view;
        let (mut x_row, mut y_row) = (self.view.row(x_start), self.y.start.wrapping_add(y_start));
        // Sums of output rows t, t - 1 ...
        let mut sums = [[start; V]; J];
        for t in 0..rows + J - 1 {
            for s in 0..S {
                let i = S * t + s;
                if !real.contains(&i) {
                    continue;
                }
                let row = x_row.wrapping_add(s * part);
                let masks = edges.row(i);
                (0..V).for_each(|v| edges.ask_row(isa, row.wrapping_add(v * x_step)));
                let columns = self.view.columns.iter().zip(weights.chunks_exact(K));
                for (c, (&column, weights)) in columns.enumerate() {
                    let mut x = [start; V];
                    for (v, x) in x.iter_mut().enumerate() {
                        // SAFETY: `check` saw that it can be read.
                        *x = unsafe { edges.load(isa, masks, c, row.wrapping_offset(column).wrapping_add(v * x_step)) };
                    }
                    for (j, sums) in sums.iter_mut().enumerate() {
                        if s + S * j < K {
                            let weight = T::splat_wide(isa, weights[s + S * j]);
                            for (sum, x) in sums.iter_mut().zip(x) {
                                *sum = T::mul_add(isa, weight, x, *sum);
                            }
                        }
                    }
                }
            }
            if t + 1 >= J {
                for (v, &sum) in sums[J - 1].iter().enumerate() {
                    // SAFETY: a row of the output; the mask keeps the vector inside it.
                    unsafe {
                        let ptr = y_row.add(v * y_step);
                        edges.ask(isa, ptr);
                        match edges.results(last && v == V - 1, t + 2 == rows + J) {
                            Some(mask) => T::store_masked(isa, mask, ptr, sum),
                            None => T::store(isa, ptr, sum),
                        }
                    }
                }
                y_row = y_row.wrapping_add(self.y_pitch);
            }
            x_row = x_row.wrapping_add(pitch);
            for j in (1..J).rev() {
                sums[j] = sums[j - 1];
            }
            sums[0] = [start; V];
        }
        V
    }
}

/// That rows of results, or bare planes of them, are all in a slice of so many values.
fn check_results<T>(len: usize, pitch: usize, steps: [usize; 2], [rows, columns]: [usize; 2], view: &View<T>) {
    let needed = match view.bare {
        Some(bare) => {
            assert_eq!(pitch, view.stride / bare.step * columns, "pitch");
            bare.len(steps, rows * columns)
        }
        None => (rows - 1) * pitch + columns,
    };
    assert!(len >= needed, "results");
}

impl<T: Element> Kernel for Correlate<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let [rows, columns] = self.size;
        if rows == 0 || columns == 0 {
            return;
        }
        self.view.check::<I>(columns);
        let channels = self.view.channels();
        assert_eq!(self.weights.len(), channels * self.view.columns.len() * self.tap_rows, "weights");
        assert_eq!(self.bias.len(), channels, "bias");
        check_results(self.y.len, self.y_pitch, self.y_steps, self.size, &self.view);
        with_rows!(self.view.stride, self.tap_rows, K J S => self.rows::<I, K, J, S>(isa));
    }
}

/// `sums[tap] += sum over t and p of g[t][p] * x[stride * t + tap row][p + its column's view]`: the weight gradient.
pub struct CorrelateSums<'a, T: Element> {
    /// The input.
    pub view: View<'a, T::Wide>,
    /// Rows of the kernel: what [`tap_rows`] says.
    pub tap_rows: usize,
    /// The gradient by the output; zero where a column is none of the output's.
    pub g: &'a [T],
    /// From one row of the gradient to the next.
    pub g_pitch: usize,
    /// From one image and from one channel of the gradient to the next, where planes are bare.
    pub g_steps: [usize; 2],
    /// Rows of the gradient, and their length.
    pub size: [usize; 2],
    /// A slot (see [`slot`]) for each tap of each channel, `[column][row]`.
    pub slots: &'a mut [T::Wide],
}

/// Columns of taps beside so many rows of them and rows of the gradient.
const fn tile_columns(registers: usize, tap_rows: usize, rows: usize) -> usize {
    match (registers - 1 - rows) / tap_rows {
        0 => 1,
        columns @ 1..=MAX_TAP_COLUMNS => columns,
        _ => MAX_TAP_COLUMNS,
    }
}

impl<T: Element> CorrelateSums<'_, T> {
    /// `K` rows of taps at stride `S`: `J` rows of the gradient.
    #[inline(always)]
    fn rows<I: Isa, const K: usize, const J: usize, const S: usize>(&mut self, isa: I) {
        let (mut at, end) = (0, self.view.columns.len());
        while at < end {
            let columns = end - at;
            // SAFETY: the columns are below `end`.
            unsafe {
                if const { tile_columns(I::REGISTER_COUNT, K, J) >= 5 } && columns >= 5 {
                    at += self.tile::<I, K, J, S, 5>(isa, at);
                } else if const { tile_columns(I::REGISTER_COUNT, K, J) >= 3 } && columns >= 3 {
                    at += self.tile::<I, K, J, S, 3>(isa, at);
                } else if const { tile_columns(I::REGISTER_COUNT, K, J) >= 2 } && columns >= 2 {
                    at += self.tile::<I, K, J, S, 2>(isa, at);
                } else {
                    at += self.tile::<I, K, J, S, 1>(isa, at);
                }
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
        let layout = self.view.layout::<I>(width, self.g_steps);
        for at in (0..layout.columns).step_by(lanes) {
            // SAFETY: vectors of these columns.
            unsafe {
                if self.view.inside::<I>(at, width) > 0 {
                    let edges = Whole::new::<T, I>(isa, &layout, width);
                    self.channels::<I, K, J, S, C>(isa, edges, &layout, (first, columns), at, rows);
                } else if S > 1 && layout.step > 1 {
                    let edges = Alternate::<_, C>::new::<T, I>(isa, &self.view, &columns, &layout, width, at);
                    self.channels::<I, K, J, S, C>(isa, edges, &layout, (first, columns), at, rows);
                } else {
                    let edges = Masked::<_, C>::new::<T, I>(isa, &self.view, &columns, &layout, self.size, at);
                    self.channels::<I, K, J, S, C>(isa, edges, &layout, (first, columns), at, rows.div_ceil(S));
                }
            }
        }
        C
    }

    /// Vectors of the columns from `at` on, of all channels.
    ///
    /// # Safety
    /// As for [`CorrelateSums::tile`].
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
        let Layout { step, images, channels, .. } = *layout;
        for c in 0..channels.0 {
            let slots = self.slots::<K, C>(c, first);
            let mut sums = [[T::splat(isa, T::default()); K]; C];
            for (i, sum) in sums.as_flattened_mut().iter_mut().enumerate() {
                // SAFETY: a slot is at least a vector long.
                *sum = unsafe { T::load_wide(isa, slots.add(i * slot::<T::Wide>())) };
            }
            for image in 0..images.0 {
                let starts = [0, 1].map(|i| [step * at, at][i] + c * channels.1[i] + image * images.1[i]);
                let last = image + 1 == images.0;
                // SAFETY: the caller's promise.
                unsafe { self.vector::<I, K, J, S, C>(isa, edges, columns, starts, last, rows, &mut sums) };
            }
            for (i, &sum) in sums.as_flattened().iter().enumerate() {
                // SAFETY: as for the loads.
                unsafe { T::store_wide(isa, slots.add(i * slot::<T::Wide>()), sum) };
            }
        }
    }

    /// The slots of a channel's taps of `C` columns of `K` rows.
    #[inline(always)]
    fn slots<const K: usize, const C: usize>(&mut self, channel: usize, first: usize) -> *mut T::Wide {
        let start = (channel * self.view.columns.len() + first) * K;
        self.slots[start * slot::<T::Wide>()..(start + C * K) * slot::<T::Wide>()].as_mut_ptr()
    }

    /// One vector of columns, all rows, `starts` being its places in `x` and `g`.
    ///
    /// # Safety
    /// As for [`CorrelateSums::tile`].
    #[inline(always)]
    unsafe fn vector<I: Isa, const K: usize, const J: usize, const S: usize, const C: usize>(
        &self,
        isa: I,
        edges: impl Edges<T, I>,
        columns: [isize; C],
        starts: [usize; 2],
        last: bool,
        rows: usize,
        sums: &mut [[T::Vector<I>; K]; C],
    ) {
        let zero = T::splat(isa, T::default());
        let View { part, pitch, ref real, .. } = self.view;
        let (mut x_row, mut g_row) = (self.view.row(starts[0]), self.g.as_ptr().wrapping_add(starts[1]));
        // Rows t, t - 1 ... of the gradient.
        let mut g = [zero; J];
        for t in 0..rows + J - 1 {
            for j in (1..J).rev() {
                g[j] = g[j - 1];
            }
            g[0] = zero;
            if t < rows {
                edges.ask(isa, g_row);
                // SAFETY: row t of the gradient; the mask keeps the vector inside it.
                g[0] = unsafe {
                    match edges.results(last, t + 1 == rows) {
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
                let row = x_row.wrapping_add(s * part);
                let masks = edges.row(i);
                edges.ask_row(isa, row);
                for (c, (column, sums)) in columns.into_iter().zip(&mut *sums).enumerate() {
                    // SAFETY: `check` saw that it can be read.
                    let x = unsafe { edges.load(isa, masks, c, row.wrapping_offset(column)) };
                    for (j, &g) in g.iter().enumerate() {
                        if s + S * j < K {
                            sums[s + S * j] = T::mul_add(isa, g, x, sums[s + S * j]);
                        }
                    }
                }
            }
            (x_row, g_row) = (x_row.wrapping_add(pitch), g_row.wrapping_add(self.g_pitch));
        }
    }
}

impl<T: Element> Kernel for CorrelateSums<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let [rows, columns] = self.size;
        if rows == 0 || columns == 0 {
            return;
        }
        self.view.check::<I>(columns);
        let taps = self.view.channels() * self.view.columns.len() * self.tap_rows;
        assert_eq!(self.slots.len(), taps * slot::<T::Wide>(), "slots");
        check_results(self.g.len(), self.g_pitch, self.g_steps, self.size, &self.view);
        with_rows!(self.view.stride, self.tap_rows, K J S => self.rows::<I, K, J, S>(isa));
    }
}
