//! Permutation of each pixel's channels in NHWC memory, a vector at a time.

use super::Element;
use crate::isa::{Isa, Kernel};

/// Neighbouring channels of which some go to a vector.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Window {
    /// The first one.
    pub first: usize,
    /// How many there are.
    pub len: usize,
}

/// `y[p][lane] = x[p][window.first + index[window][lane]]` for one vector of channels, of the one window in which a lane's index
/// is below [`PermuteChannels::NOWHERE`].
pub struct PermuteChannels<'a, T> {
    /// The first pixel's channels.
    pub x: *const T,
    /// The vector's channels in the first pixel.
    pub y: *mut T,
    /// Distances of pixels in `x` and `y`.
    pub steps: [usize; 2],
    /// Number of pixels.
    pub pixels: usize,
    /// Number of channels.
    pub columns: usize,
    /// Where they come from.
    pub windows: &'a [Window],
    /// For each window, for each lane, the place there.
    pub index: &'a [u32],
    /// Distances from what is read and written to what is asked for meanwhile; 0 where that is in a cache.
    pub ahead: [usize; 2],
}

/// A [`PermuteChannels`] that may run: see [`PermuteChannels::promise`].
pub struct CheckedPermuteChannels<'a, T>(PermuteChannels<'a, T>);

impl<'a, T: Element> PermuteChannels<'a, T> {
    /// The index of lanes that a window has nothing for.
    pub const NOWHERE: u32 = u32::MAX;

    /// Turns the description into a kernel.
    ///
    /// # Safety
    /// Until it has run, every pixel's windows must be readable and the vector's channels writable.
    pub unsafe fn promise(self) -> CheckedPermuteChannels<'a, T> {
        CheckedPermuteChannels(self)
    }

    /// `R` pixels from those at `x` and `y` on.
    ///
    /// # Safety
    /// As for [`PermuteChannels::promise`]; they must exist.
    #[inline(always)]
    unsafe fn tile<I: Isa, const R: usize>(&self, isa: I, x: *const T, y: *mut T) {
        let mut values = [T::splat(isa, T::default()); R];
        let mut index = self.index.as_ptr();
        // SAFETY: the caller's promise; there are a vector's indices for each window.
        unsafe {
            for window in self.windows {
                let (places, mask) = (index.cast::<I::u32s>().read_unaligned(), T::mask(isa, window.len));
                let mut from = x.wrapping_add(window.first);
                for value in &mut values {
                    if self.ahead[0] > 0 {
                        isa.prefetch_far(from.wrapping_add(self.ahead[0]));
                    }
                    *value = T::pick_some(isa, T::load_masked(isa, mask, from), places, *value);
                    from = from.wrapping_add(self.steps[0]);
                }
                index = index.add(T::lanes::<I>());
            }
            let (lanes, mut to) = (T::lanes::<I>(), y);
            for value in values {
                if self.ahead[1] > 0 {
                    isa.prefetch_far(to.wrapping_add(self.ahead[1]));
                }
                if self.columns < lanes {
                    T::store_masked(isa, T::mask(isa, self.columns), to, value);
                } else {
                    T::store(isa, to, value);
                }
                to = to.wrapping_add(self.steps[1]);
            }
        }
    }
}

impl<T: Element> Kernel for CheckedPermuteChannels<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        if !const { T::PICKS && I::PICKS } {
            unreachable!("no instruction picks lanes");
        }
        let Self(kernel) = self;
        let lanes = T::lanes::<I>();
        assert!(kernel.columns <= lanes && kernel.index.len() == kernel.windows.len() * lanes, "indices");
        let (mut x, mut y, mut left) = (kernel.x, kernel.y, kernel.pixels);
        // SAFETY: promised to `promise`; the pixels exist.
        unsafe {
            while left > 0 {
                let pixels = if left >= 8 {
                    kernel.tile::<I, 8>(isa, x, y);
                    8
                } else {
                    kernel.tile::<I, 1>(isa, x, y);
                    1
                };
                (x, y) = (x.wrapping_add(pixels * kernel.steps[0]), y.wrapping_add(pixels * kernel.steps[1]));
                left -= pixels;
            }
        }
    }
}
