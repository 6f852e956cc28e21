//! How the taps of a depthwise kernel see NCHW planes: which vectors of a row are loaded whole,
//! which by masks, and which are every other value of two.

use std::ops::Range;

use crate::simd::Isa;
use crate::simd::element::Element;

/// The most columns of a kernel.
pub const MAX_COLUMNS: usize = 7;

/// Planes of some channels of some images as a kernel's taps see them: of images and channels, how
/// many there are and the distance from one to the next.
///
/// A tile's vectors are of the same columns of several images, or of several channels of an only
/// one. What a tap sees beside a plane is masked. At a step of 2, a vector is every other value of
/// two. Where two rows fit into a vector, they go through it together, as at a stride of 2: the
/// output's rows `2 t` and `2 t + 1` are one row of sums.
#[derive(Clone)]
pub struct TapView<'a, T> {
    /// The planes.
    pub x: &'a [T],
    /// Height and width of each.
    pub size: [usize; 2],
    /// Images, whose planes share a kernel.
    pub images: (usize, usize),
    /// Channels.
    pub channels: (usize, usize),
    /// Rows and columns from what one result sees to what the next does: 1 or 2.
    pub step: usize,
    /// Rows of a vector: 1 or 2.
    pub rows: usize,
    /// The plane's row that the first result's first row of taps sees.
    pub top: isize,
    /// The plane's column that the first result sees through each column of the kernel.
    pub columns: &'a [isize],
    /// Prefetch distances, from what is read and from the results.
    pub prefetch: [usize; 2],
}

impl<T: Element> TapView<'_, T> {
    /// Rows of the planes from one row of sums to the next.
    pub(super) fn stride(&self) -> usize {
        self.step * self.rows
    }

    /// The rows, counted from `top` on, whose vectors have a row of the plane.
    pub(super) fn real(&self) -> Range<usize> {
        let start = (1 - self.rows as isize - self.top).max(0) as usize;
        start..self.size[0].saturating_add_signed(-self.top).max(start)
    }

    /// Values from the beginning of the first plane to the end of the last, where planes have
    /// `pixels` and from one image and one channel to the next there are `steps`; none if there are
    /// no planes.
    pub(super) fn len(&self, [image, channel]: [usize; 2], pixels: usize) -> usize {
        let last = |count: usize, step: usize| Some(count.checked_sub(1)? * step);
        last(self.images.0, image).zip(last(self.channels.0, channel)).map_or(0, |(i, c)| i + c + pixels)
    }

    /// That all planes can be read, and `results` values hold as many planes of results, `steps`
    /// apart, of these rows and columns.
    pub(super) fn check<I: Isa>(&self, results: usize, steps: [usize; 2], [rows, columns]: [usize; 2]) {
        let [height, width] = self.size;
        let double = self.step == 1 && columns == width && 2 * width <= T::lanes::<I>();
        assert!((1..=2).contains(&self.step) && (self.rows == 1 || self.rows == 2 && double), "rows");
        assert!(self.columns.len() <= MAX_COLUMNS, "columns");
        // Every other value of a vector is what the next column sees.
        assert!(self.step == 1 || self.columns.windows(2).all(|columns| columns[0] + 1 == columns[1]), "neighbours");
        assert!(self.x.len() >= self.len([self.images.1, self.channels.1], height * width), "x");
        assert!(results >= self.len(steps, rows * columns), "results");
    }

    /// How many vectors of columns from `at` on, `end` of which are results, can be loaded whole in
    /// all rows.
    #[inline(always)]
    pub(super) fn inside<I: Isa>(&self, at: usize, end: usize) -> usize {
        let [first, last] = [self.columns.iter().min(), self.columns.iter().max()].map(|c| c.copied().unwrap_or(0));
        // The last column is seen, and is a result's.
        let end = end.min(self.size[1].saturating_add_signed(-last) / self.step);
        let outside = self.rows > 1 || (self.step * at) as isize + first < 0;
        if outside { 0 } else { end.saturating_sub(at) / T::lanes::<I>() }
    }

    /// Prefetches what will be read some time after these vectors.
    #[inline(always)]
    pub(super) fn prefetch<I: Isa>(&self, isa: I, x: *const T, vectors: usize) {
        (0..vectors).for_each(|v| isa.prefetch_l2(x.wrapping_add(self.prefetch[0] + v * T::lanes::<I>())));
    }

    /// Prefetches the results that come some time after a vector.
    #[inline(always)]
    pub(super) fn prefetch_results<I: Isa, Y>(&self, isa: I, y: *const Y) {
        isa.prefetch_l2(y.wrapping_add(self.prefetch[1]));
    }

    /// Row 0, from an index in it on.
    #[inline(always)]
    pub(super) fn row(&self, index: usize) -> *const T {
        self.x.as_ptr().wrapping_offset(self.top * self.size[1] as isize).wrapping_add(index)
    }
}

/// How vectors go through planes: those of the same columns of all images of a channel, one channel
/// after the other, and then those of further columns. Of images and channels: their number, and
/// the steps from one to the next in `x` and in the results.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    pub(super) images: (usize, [usize; 2]),
    pub(super) channels: (usize, [usize; 2]),
}

impl Layout {
    /// That of planes whose results are so far apart.
    pub(super) fn new<T>(view: &TapView<'_, T>, steps: [usize; 2]) -> Self {
        let both = |(count, step), own| (count, [step, own]);
        Self { images: both(view.images, steps[0]), channels: both(view.channels, steps[1]) }
    }
}

/// How the vectors of a tile are loaded and stored.
pub(super) trait Edges<T: Element, I: Isa>: Copy {
    /// What is needed to load from one row.
    type Row<'a>: Copy
    where
        Self: 'a;

    /// That of row `i`.
    fn row(&self, i: usize) -> Self::Row<'_>;

    /// How many columns of the kernel are loaded together: 1 or 2.
    const TOGETHER: usize;

    /// Vectors of a row, seen by column `c` of those at hand and, of [`Edges::TOGETHER`], by the
    /// next one.
    ///
    /// # Safety
    /// The view must have been checked.
    unsafe fn load(&self, isa: I, row: Self::Row<'_>, c: usize, ptr: *const T::Wide) -> [T::Vector<I>; 2];

    /// Vectors of memory that one is loaded from.
    #[inline(always)]
    fn span(&self) -> usize {
        1
    }

    /// Which of a vector's values are results, of the last row or of another; none if all are.
    fn results(&self, last_row: bool) -> Option<T::Mask<I>>;
}

/// Vectors inside planes, of which every value can be loaded.
#[derive(Clone, Copy)]
pub(super) struct Whole;

impl<T: Element, I: Isa> Edges<T, I> for Whole {
    type Row<'a> = ();

    const TOGETHER: usize = 1;

    #[inline(always)]
    fn row(&self, _i: usize) {}
    #[inline(always)]
    unsafe fn load(&self, isa: I, _row: (), _c: usize, ptr: *const T::Wide) -> [T::Vector<I>; 2] {
        // SAFETY: the caller's promise.
        [unsafe { T::load_wide(isa, ptr) }; 2]
    }
    #[inline(always)]
    fn results(&self, _last_row: bool) -> Option<T::Mask<I>> {
        None
    }
}

/// Which of `len` lanes see one of `columns`, lane `l` column `start + l`: the first one and the
/// end.
pub(super) fn seen(start: isize, len: usize, columns: usize) -> [usize; 2] {
    [-start, columns as isize - start].map(|lane| lane.clamp(0, len as isize) as usize)
}

/// Vectors at the edges of planes: all that is loaded lies inside a plane.
#[derive(Clone, Copy)]
pub(super) struct Masked<M, const C: usize> {
    /// The plane's row that row 0 is, and its last one; none if a vector has one row.
    rows: Option<[isize; 2]>,
    /// For each column of the kernel: where all of a vector's rows are the plane's, only the
    /// second, only the first.
    columns: [[M; C]; 3],
    /// The results, if they are not all of a vector: of all rows, of the last one.
    results: [Option<M>; 2],
}

impl<M: Copy, const C: usize> Masked<M, C> {
    /// Columns from `at` on, of these rows and columns of results, as at most `C` columns of the
    /// kernel see them.
    #[inline(always)]
    pub(super) fn new<T: Element<Mask<I> = M>, I: Isa>(
        isa: I,
        view: &TapView<T::Wide>,
        columns: &[isize],
        [rows, width]: [usize; 2],
        at: usize,
    ) -> Self {
        let len = (width - at).min(T::lanes::<I>());
        let [height, width] = view.size;
        let row = |column: isize, row: usize| {
            let [first, end] = seen(at as isize + column, len, width);
            T::mask_between(isa, row * width + first, row * width + end)
        };
        let none = T::mask(isa, 0);
        let mut masks = [[none; C]; 3];
        for (c, &column) in columns.iter().enumerate() {
            let second = if view.rows == 2 { row(column, 1) } else { none };
            (masks[1][c], masks[2][c]) = (second, row(column, 0));
            masks[0][c] = T::either_mask(isa, masks[1][c], masks[2][c]);
        }
        let last = (rows - 1) % view.rows;
        let results = [view.rows - 1, last].map(|more| {
            let len = more * width + len;
            (len < T::lanes::<I>()).then(|| T::mask(isa, len))
        });
        let rows = (view.rows == 2).then_some([view.top, height as isize - 1]);
        Self { rows, columns: masks, results }
    }
}

impl<T: Element, I: Isa, const C: usize> Edges<T, I> for Masked<T::Mask<I>, C> {
    type Row<'a>
        = &'a [T::Mask<I>; C]
    where
        Self: 'a;
    const TOGETHER: usize = 1;

    #[inline(always)]
    fn row(&self, i: usize) -> &[T::Mask<I>; C] {
        match self.rows {
            Some([first, _]) if first + (i as isize) < 0 => &self.columns[1],
            Some([first, last]) if first + i as isize == last => &self.columns[2],
            _ => &self.columns[0],
        }
    }
    #[inline(always)]
    unsafe fn load(&self, isa: I, row: &[T::Mask<I>; C], c: usize, ptr: *const T::Wide) -> [T::Vector<I>; 2] {
        // SAFETY: the caller's promise.
        [unsafe { T::load_wide_masked(isa, row[c], ptr) }; 2]
    }
    #[inline(always)]
    fn results(&self, last_row: bool) -> Option<T::Mask<I>> {
        self.results[usize::from(last_row)]
    }
}

/// Vectors of every other column of planes, which two vectors hold: beside what a column of the
/// kernel sees, those hold what the next one does.
#[derive(Clone, Copy)]
pub(super) struct Alternate<M, const C: usize> {
    /// For each column of the kernel, what is the plane's of either vector.
    columns: [[M; 2]; C],
    /// The results, if they are not all of a vector.
    results: Option<M>,
}

impl<M: Copy, const C: usize> Alternate<M, C> {
    /// Columns from `at` on, of `width` columns of results, as at most `C` columns of the kernel
    /// see them.
    #[inline(always)]
    pub(super) fn new<T: Element<Mask<I> = M>, I: Isa>(
        isa: I,
        view: &TapView<T::Wide>,
        columns: &[isize],
        width: usize,
        at: usize,
    ) -> Self {
        let (lanes, len) = (T::lanes::<I>(), width - at);
        let mut masks = [[T::mask(isa, 0); 2]; C];
        for (masks, &column) in masks.iter_mut().zip(columns) {
            *masks = [0, lanes].map(|more| {
                let [first, end] = seen((view.step * at + more) as isize + column, lanes, view.size[1]);
                T::mask_between(isa, first, end)
            });
        }
        Self { columns: masks, results: (len < lanes).then(|| T::mask(isa, len)) }
    }
}

impl<T: Element, I: Isa, const C: usize> Edges<T, I> for Alternate<T::Mask<I>, C> {
    type Row<'a>
        = ()
    where
        Self: 'a;
    const TOGETHER: usize = 2;

    #[inline(always)]
    fn row(&self, _i: usize) {}
    #[inline(always)]
    unsafe fn load(&self, isa: I, _row: (), c: usize, ptr: *const T::Wide) -> [T::Vector<I>; 2] {
        let [first, second] = self.columns[c];
        // SAFETY: the caller's promise.
        unsafe {
            let second = T::load_wide_masked(isa, second, ptr.wrapping_add(T::lanes::<I>()));
            T::split(isa, T::load_wide_masked(isa, first, ptr), second)
        }
    }
    #[inline(always)]
    fn span(&self) -> usize {
        2
    }
    #[inline(always)]
    fn results(&self, _last_row: bool) -> Option<T::Mask<I>> {
        self.results
    }
}
