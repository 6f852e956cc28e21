//! Factors by which the images of a row of pixels are multiplied.

use std::ops::Range;

use crate::simd::element::Element;

/// Factors of the images that a row's pixels belong to.
#[derive(Clone, Copy)]
pub struct Factors<'a, T: Element> {
    /// Pixels of an image.
    pub pixels: usize,
    /// Pixels of the first image that are not the row's.
    pub skipped: usize,
    /// For each image, from the first one on, the factors that are multiplied, stored ones and
    /// others; nothing where they are 1.
    pub sets: (&'a [T], &'a [T::Wide]),
}

impl<T: Element> Factors<'_, T> {
    /// No factors at all.
    pub const ONE: Self = Factors { pixels: usize::MAX, skipped: 0, sets: (&[], &[]) };

    /// The factor of an image.
    #[inline(always)]
    pub(super) fn at(&self, image: usize) -> T::Wide {
        let stored = self.sets.0.get(image).map_or(T::Wide::ONE, |factor| factor.widen());
        stored * self.sets.1.get(image).copied().unwrap_or(T::Wide::ONE)
    }

    /// A row's pixels, image by image.
    #[inline(always)]
    pub(super) fn parts(&self, len: usize) -> impl Iterator<Item = (usize, Range<usize>)> + use<T> {
        let Self { pixels, skipped, sets } = *self;
        let images = (len.saturating_add(skipped)).div_ceil(pixels);
        let enough = [sets.0.len(), sets.1.len()].into_iter().all(|len| len == 0 || len >= images);
        assert!(skipped < pixels && enough, "factors");
        // Images are whole but for the first and the last one.
        let start = move |image: usize| if image == 0 { 0 } else { (image * pixels - skipped).min(len) };
        (0..images).map(move |image| (image, start(image)..if image + 1 < images { start(image + 1) } else { len }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_images() {
        let set = [2.0f32, 3.0, 5.0, 7.0];
        for (pixels, len) in (4..8usize).flat_map(|pixels| (0..13).map(move |len| (pixels, len))) {
            for skipped in 0..pixels {
                let factors = Factors { pixels, skipped, sets: (&set, &[]) };
                let mut found = Vec::new();
                for (image, range) in factors.parts(len) {
                    assert_eq!(range.start, found.len());
                    found.extend(range.map(|_| factors.at(image)));
                }
                let expected: Vec<_> = (0..len).map(|pixel| set[(pixel + skipped) / pixels]).collect();
                assert_eq!(found, expected, "{pixels} {skipped} {len}");
            }
        }
        assert_eq!(Factors::<f32>::ONE.parts(9).collect::<Vec<_>>(), [(0, 0..9)]);
    }
}
