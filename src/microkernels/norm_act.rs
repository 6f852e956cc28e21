//! What batch norms and activations do to rows of pixels, forward and backward.
//!
//! Rows of values and of their gathered gradients are as they are stored, all others as they are
//! computed with.

use super::activations::{Activation, Function, with_function};
pub use super::factors::Factors;
use super::rows::{BLOCK, Body, Lanes, load, load_wide, prefetch, run, run_range, store, store_wide, total};
use crate::simd::element::Element;
use crate::simd::{Isa, Kernel, RawKernel, run_by_raw_kernel};

/// `activation(scale * x + shift) * factor` of a row, written or (with `add`) added to `y`.
pub struct Activate<'a, T: Element> {
    /// The function.
    pub activation: Activation,
    /// The row.
    pub x: &'a [T],
    /// Scale and shift before the function.
    pub affine: (T::Wide, T::Wide),
    /// Factors after it.
    pub factors: Factors<'a, T>,
    /// Whether to add to what is there.
    pub add: bool,
    /// The result.
    pub y: &'a mut [T::Wide],
    /// Where to put the function's derivatives, if they are wanted.
    pub slopes: Option<&'a mut [T::Wide]>,
}

impl<'a, T: Element> Activate<'a, T> {
    #[inline(always)]
    fn raw(self) -> RawActivate<'a, T> {
        let Self { activation, x, affine, factors, add, y, slopes } = self;
        assert_eq!(x.len(), y.len());
        let slopes = slopes.map(|slopes| {
            assert_eq!(x.len(), slopes.len());
            slopes.as_mut_ptr()
        });
        let (len, x, y) = (x.len(), Some(x.as_ptr()), y.as_mut_ptr());
        RawActivate { activation, x, y, len, prefetch: len, affine, factors, add, slopes }
    }
}

impl<T: Element> Kernel for Activate<'_, T> {
    type Output = ();

    run_by_raw_kernel!(Self::raw);
}

/// `activation(scale * x + shift)` of a row, in place: as exact as `T` is.
pub struct ActivateInPlace<'a, T: Element> {
    /// The function.
    pub activation: Activation,
    /// The row.
    pub row: &'a mut [T::Wide],
    /// Scale and shift before the function.
    pub affine: (T::Wide, T::Wide),
}

impl<T: Element> Kernel for ActivateInPlace<'_, T> {
    type Output = ();

    run_by_raw_kernel!(|Self { activation, row, affine }| {
        let (y, len, factors) = (row.as_mut_ptr(), row.len(), Factors::ONE);
        RawActivate::<T> { activation, x: None, y, len, prefetch: 0, affine, factors, add: false, slopes: None }
    });
}

/// Both of these, compiled once.
///
/// # Safety
/// `len` values must be readable at `x` (or `y`), and writable at `y` and at `slopes`.
struct RawActivate<'a, T: Element> {
    activation: Activation,
    /// The row that is read; that at `y` if there is none.
    x: Option<*const T>,
    y: *mut T::Wide,
    len: usize,
    prefetch: usize,
    affine: (T::Wide, T::Wide),
    factors: Factors<'a, T>,
    add: bool,
    slopes: Option<*mut T::Wide>,
}

impl<T: Element> RawKernel for RawActivate<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<I: Isa>(self, isa: I) {
        let Self { activation, x, y, len, prefetch, affine: (scale, shift), factors, add, slopes } = self;
        let constants = [scale, shift, T::Wide::ONE].map(|value| T::splat_wide(isa, value));
        with_function!(activation, function => {
            let mut body = Forward { x, y, len: prefetch, slopes, constants, add, function };
            for (image, pixels) in factors.parts(len) {
                body.constants[2] = T::splat_wide(isa, factors.at(image));
                // SAFETY: the rows have these pixels; each block is read before it is written.
                unsafe { run_range(isa, pixels, &mut body) }
            }
        });
    }
}

struct Forward<T: Element, V, F> {
    x: Option<*const T>,
    y: *mut T::Wide,
    len: usize,
    slopes: Option<*mut T::Wide>,
    /// Scale, shift and factor.
    constants: [V; 3],
    add: bool,
    function: F,
}

impl<T: Element, I: Isa, F: Function<T>> Body<T, I> for Forward<T, T::Vector<I>, F> {
    #[inline(always)]
    unsafe fn block<const N: usize>(&mut self, isa: I, at: usize, lanes: Lanes<T::Mask<I>>) {
        let [scale, shift, factor] = self.constants;
        let mut z = match self.x {
            // SAFETY: the caller's promise.
            None => unsafe { load_wide::<T, I, N>(isa, self.y.add(at), lanes) },
            Some(x) => {
                prefetch::<T, I, N>(isa, x.wrapping_add(at), self.len);
                // SAFETY: as above.
                unsafe { load::<T, I, N>(isa, x.add(at), lanes) }
            }
        };
        for z in &mut z {
            *z = T::mul_add(isa, *z, scale, shift);
        }
        let [mut values, slopes] = self.function.both(isa, z);
        if let Some(to) = self.slopes {
            // SAFETY: as above.
            unsafe { store_wide::<T, I, N>(isa, to.add(at), lanes, slopes) };
        }
        if self.add {
            // SAFETY: as above.
            let y = unsafe { load_wide::<T, I, N>(isa, self.y.add(at), lanes) };
            for (value, y) in values.iter_mut().zip(y) {
                *value = T::mul_add(isa, *value, factor, y);
            }
        } else {
            for value in &mut values {
                *value = T::mul_vectors(isa, *value, factor);
            }
        }
        // SAFETY: as above.
        unsafe { store_wide::<T, I, N>(isa, self.y.add(at), lanes, values) };
    }
}

/// The gradient of [`Activate`] of a row, with respect to `x`.
pub struct ActivateGrad<'a, T: Element> {
    /// The function.
    pub activation: Activation,
    /// The row.
    pub x: &'a [T],
    /// Scale and shift before the function.
    pub affine: (T::Wide, T::Wide),
    /// Factors after it.
    pub factors: Factors<'a, T>,
    /// The gradient by the result.
    pub grad: &'a [T::Wide],
    /// What [`Activate`] made of the same values, if it is still there.
    pub kept: Option<Kept<'a, T::Wide>>,
    /// Mean and inverse standard deviation that normalise `x` for [`RowSums::normalised`].
    pub moments: (T::Wide, T::Wide),
    /// Whether to add to what is there.
    pub add: bool,
    /// The gradient by `x`, taking the batch's statistics as constants.
    pub grad_x: &'a mut [T],
    /// The gradients by the first of [`Factors::sets`], to be added to, if they are wanted.
    pub grad_factors: Option<&'a mut [T]>,
}

/// What [`Activate`] made of a row: so the function need not be computed again.
#[derive(Clone, Copy)]
pub struct Kept<'a, T> {
    /// The function's derivatives.
    pub slopes: &'a [T],
    /// The results, if gradients by the factors are wanted.
    pub values: Option<&'a [T]>,
}

/// Sums over a row that [`ActivateGrad`] computes too.
#[derive(Clone, Copy, Default)]
pub struct RowSums {
    /// Of the gradient by the function's argument.
    pub grad: f64,
    /// Of that gradient times the normalised `x`.
    pub normalised: f64,
}

impl<T: Element> Kernel for ActivateGrad<'_, T> {
    type Output = RowSums;

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) -> RowSums {
        let len = self.x.len();
        assert_eq!([len; 2], [self.grad.len(), self.grad_x.len()]);
        assert!(
            self.kept.is_none_or(|kept| kept.slopes.len() == len && kept.values.is_none_or(|row| row.len() == len))
        );
        let images = len.div_ceil(self.factors.pixels);
        // What was multiplied by 0 tells nothing of the function.
        let told = |kept: &Kept<'_, T::Wide>| {
            self.grad_factors.is_none()
                || kept.values.is_some() && (0..=images).all(|image| self.factors.at(image) != T::Wide::default())
        };
        if let Some(Kept { slopes, values }) = self.kept.filter(told) {
            let function = Loaded { slopes: slopes.as_ptr(), values: values.map(<[T::Wide]>::as_ptr) };
            // SAFETY: what was kept has this length.
            return unsafe { self.through(isa, function, true) };
        }
        let affine = [self.affine.0, self.affine.1].map(|value| T::splat_wide(isa, value));
        with_function!(self.activation, function => {
            // SAFETY: the function itself reads no memory.
            unsafe { self.through(isa, Computed { affine, function }, false) }
        })
    }
}

impl<T: Element> ActivateGrad<'_, T> {
    /// All images, with the function's values (`multiplied` by the factors or not) and derivatives
    /// from `function`.
    ///
    /// # Safety
    /// The rows of `function` must be as long as the others.
    #[inline(always)]
    unsafe fn through<I: Isa>(&mut self, isa: I, function: impl Slopes<T, I>, multiplied: bool) -> RowSums {
        let zero = T::splat(isa, T::default());
        let mut body = Backward {
            x: self.x.as_ptr(),
            grad: self.grad.as_ptr(),
            grad_x: self.grad_x.as_mut_ptr(),
            len: self.x.len(),
            constants: [self.affine.0, T::Wide::ONE, self.moments.0].map(|value| T::splat_wide(isa, value)),
            add: self.add,
            sums: [[zero; BLOCK]; 2],
            values: [zero; BLOCK],
            function,
        };
        for (image, pixels) in self.factors.parts(self.x.len()) {
            let factor = self.factors.at(image);
            body.constants[1] = T::splat_wide(isa, factor);
            // SAFETY: all rows have these pixels.
            unsafe { run_range(isa, pixels, &mut body) };
            if let Some(grad_factors) = &mut self.grad_factors {
                let own = self.factors.sets.0.get(image).copied().unwrap_or(T::ONE).to_f64();
                let others = self.factors.sets.1.get(image).copied().unwrap_or(T::Wide::ONE).to_f64();
                let value = total::<T, I>(isa, std::mem::replace(&mut body.values, [zero; BLOCK]));
                let grad = if multiplied { value / own } else { value * others };
                grad_factors[image] = T::from_f64(grad_factors[image].to_f64() + grad);
            }
        }
        let [grad, normalised] = body.sums;
        RowSums { grad: total::<T, I>(isa, grad), normalised: total::<T, I>(isa, normalised) * self.moments.1.to_f64() }
    }
}

/// Where the gradient takes a function's values and derivatives from.
trait Slopes<T: Element, I: Isa> {
    /// Both for `N` vectors from pixel `at`, whose arguments' `x` are given.
    ///
    /// # Safety
    /// As for [`Body::block`].
    unsafe fn both<const N: usize>(
        &self,
        isa: I,
        at: usize,
        lanes: Lanes<T::Mask<I>>,
        x: [T::Vector<I>; N],
    ) -> [[T::Vector<I>; N]; 2];
}

/// The function itself.
struct Computed<V, F> {
    /// Scale and shift before the function.
    affine: [V; 2],
    function: F,
}

impl<T: Element, I: Isa, F: Function<T>> Slopes<T, I> for Computed<T::Vector<I>, F> {
    #[inline(always)]
    unsafe fn both<const N: usize>(
        &self,
        isa: I,
        _at: usize,
        _lanes: Lanes<T::Mask<I>>,
        mut x: [T::Vector<I>; N],
    ) -> [[T::Vector<I>; N]; 2] {
        for x in &mut x {
            *x = T::mul_add(isa, *x, self.affine[0], self.affine[1]);
        }
        self.function.both(isa, x)
    }
}

/// What was kept, the values times a factor.
struct Loaded<T> {
    slopes: *const T,
    values: Option<*const T>,
}

impl<T: Element, I: Isa> Slopes<T, I> for Loaded<T::Wide> {
    #[inline(always)]
    unsafe fn both<const N: usize>(
        &self,
        isa: I,
        at: usize,
        lanes: Lanes<T::Mask<I>>,
        _x: [T::Vector<I>; N],
    ) -> [[T::Vector<I>; N]; 2] {
        // SAFETY: the caller's promise.
        unsafe {
            let slopes = load_wide::<T, I, N>(isa, self.slopes.add(at), lanes);
            let zero = [T::splat(isa, T::default()); N];
            [self.values.map_or(zero, |values| load_wide::<T, I, N>(isa, values.add(at), lanes)), slopes]
        }
    }
}

struct Backward<T: Element, V, S> {
    x: *const T,
    grad: *const T::Wide,
    grad_x: *mut T,
    len: usize,
    /// Scale, factor and mean.
    constants: [V; 3],
    add: bool,
    /// Partial sums for those of [`RowSums`], the normalised ones yet without the deviation.
    sums: [[V; BLOCK]; 2],
    /// Partial sums of the gradient by the result times the function's value.
    values: [V; BLOCK],
    function: S,
}

impl<T: Element, I: Isa, S: Slopes<T, I>> Body<T, I> for Backward<T, T::Vector<I>, S> {
    #[inline(always)]
    unsafe fn block<const N: usize>(&mut self, isa: I, at: usize, lanes: Lanes<T::Mask<I>>) {
        let [scale, factor, mean] = self.constants;
        prefetch::<T, I, N>(isa, self.grad_x.wrapping_add(at), self.len);
        // SAFETY: the caller's promise.
        let x = unsafe { load::<T, I, N>(isa, self.x.add(at), lanes) };
        // SAFETY: as above.
        let [values, mut slopes] = unsafe { self.function.both(isa, at, lanes, x) };
        // SAFETY: as above. Beyond the row, gradients are zero and so is all that is added to the
        // sums.
        let grad = unsafe { load_wide::<T, I, N>(isa, self.grad.add(at), lanes) };
        let [sum, normalised] = &mut self.sums;
        for i in 0..N {
            let g = T::mul_vectors(isa, T::mul_vectors(isa, grad[i], factor), slopes[i]);
            sum[i] = T::add_vectors(isa, sum[i], g);
            normalised[i] = T::mul_add(isa, g, T::sub_vectors(isa, x[i], mean), normalised[i]);
            self.values[i] = T::mul_add(isa, grad[i], values[i], self.values[i]);
            slopes[i] = g;
        }
        // SAFETY: as above.
        unsafe {
            if self.add {
                let before = load::<T, I, N>(isa, self.grad_x.add(at), lanes);
                for (g, before) in slopes.iter_mut().zip(before) {
                    *g = T::mul_add(isa, *g, scale, before);
                }
            } else {
                for g in &mut slopes {
                    *g = T::mul_vectors(isa, *g, scale);
                }
            }
            store(isa, self.grad_x.add(at), lanes, slopes);
        }
    }
}

/// The mean of `activation(scale * x + shift)` over each image of a row, and what its gradient will
/// need.
pub struct ActivateMeans<'a, T: Element> {
    /// The function.
    pub activation: Activation,
    /// The row, of whole images.
    pub x: &'a [T],
    /// Scale and shift before the function.
    pub affine: (T::Wide, T::Wide),
    /// Mean and inverse standard deviation that normalise `x`.
    pub moments: (T::Wide, T::Wide),
    /// The means of the images.
    pub means: &'a mut [T::Wide],
    /// The means of the function's derivative, and of that times the normalised `x`.
    pub slopes: [&'a mut [T::Wide]; 2],
}

impl<T: Element> Kernel for ActivateMeans<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { activation, x, affine: (scale, shift), moments, means, slopes: [slopes, normalised] } = self;
        let (pixels, zero) = (x.len() / means.len().max(1), T::splat(isa, T::default()));
        assert_eq!([x.len(), means.len(), means.len()], [means.len() * pixels, slopes.len(), normalised.len()]);
        let constants = [scale, shift, moments.0].map(|value| T::splat_wide(isa, value));
        with_function!(activation, function => {
            for image in 0..means.len() {
                let sums = [[zero; BLOCK]; 3];
                let mut body = Means { x: x.as_ptr(), constants, sums, function };
                // SAFETY: the row has these pixels.
                unsafe { run_range(isa, image * pixels..(image + 1) * pixels, &mut body) };
                let [value, slope, product] = body.sums;
                means[image] = T::Wide::from_f64(total::<T, I>(isa, value) / pixels as f64);
                slopes[image] = T::Wide::from_f64(total::<T, I>(isa, slope) / pixels as f64);
                normalised[image] = T::Wide::from_f64(total::<T, I>(isa, product) * moments.1.to_f64() / pixels as f64);
            }
        });
    }
}

struct Means<T, V, F> {
    x: *const T,
    /// Scale, shift and mean.
    constants: [V; 3],
    /// Partial sums of values, derivatives, and these times the distances from the mean.
    sums: [[V; BLOCK]; 3],
    function: F,
}

impl<T: Element, I: Isa, F: Function<T>> Body<T, I> for Means<T, T::Vector<I>, F> {
    #[inline(always)]
    unsafe fn block<const N: usize>(&mut self, isa: I, at: usize, lanes: Lanes<T::Mask<I>>) {
        let [scale, shift, mean] = self.constants;
        // SAFETY: the caller's promise.
        let x = unsafe { load::<T, I, N>(isa, self.x.add(at), lanes) };
        let mut z = x;
        for z in &mut z {
            *z = T::mul_add(isa, *z, scale, shift);
        }
        let [mut values, mut slopes] = self.function.both(isa, z);
        let [value, slope, product] = &mut self.sums;
        for i in 0..N {
            if let Lanes::First(mask) = lanes {
                values[i] = T::keep_masked(isa, mask, values[i]);
                slopes[i] = T::keep_masked(isa, mask, slopes[i]);
            }
            value[i] = T::add_vectors(isa, value[i], values[i]);
            slope[i] = T::add_vectors(isa, slope[i], slopes[i]);
            product[i] = T::mul_add(isa, slopes[i], T::sub_vectors(isa, x[i], mean), product[i]);
        }
    }
}

/// `y = w + slope * (x - mean) + shift`: the gradient by the values before a batch norm whose
/// statistics depend on them.
pub struct NormGrad<'a, T: Element> {
    /// The gradient that takes the statistics as constants.
    pub w: &'a [T],
    /// The values before the norm.
    pub x: &'a [T],
    /// Slope, mean and shift.
    pub constants: [T::Wide; 3],
    /// What the means of images add, where there are some: see [`MeanGrad`].
    pub mean: Option<MeanGrad<'a, T>>,
    /// The result.
    pub y: &'a mut [T::Wide],
}

/// The gradient by `x` of the means of `activation(scale * x + shift)` over images:
/// `factor * activation'`.
#[derive(Clone, Copy)]
pub struct MeanGrad<'a, T: Element> {
    /// The function.
    pub activation: Activation,
    /// Scale and shift before the function.
    pub affine: (T::Wide, T::Wide),
    /// The gradients by the arguments of the means' functions, which all pixels of an image have in
    /// common.
    pub factors: Factors<'a, T>,
}

impl<T: Element> Kernel for NormGrad<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { w, x, constants, mean, y } = self;
        assert_eq!([y.len(); 2], [w.len(), x.len()]);
        let constants = constants.map(|value| T::splat_wide(isa, value));
        let mut body = Normal { w: w.as_ptr(), x: x.as_ptr(), y: y.as_mut_ptr(), len: w.len(), constants, mean: () };
        let Some(MeanGrad { activation, affine: (scale, shift), factors }) = mean else {
            // SAFETY: all rows have this length.
            return unsafe { run(isa, x.len(), &mut body) };
        };
        with_function!(activation, function => {
            for (image, pixels) in factors.parts(x.len()) {
                let mean = [scale, shift, factors.at(image)].map(|value| T::splat_wide(isa, value));
                let Normal { w, x, y, len, constants, mean: () } = body;
                let mut body = Normal { w, x, y, len, constants, mean: (mean, function) };
                // SAFETY: all rows have these pixels.
                unsafe { run_range(isa, pixels, &mut body) };
            }
        });
    }
}

struct Normal<T: Element, V, M> {
    w: *const T,
    x: *const T,
    y: *mut T::Wide,
    len: usize,
    constants: [V; 3],
    mean: M,
}

/// What a mean adds to the gradient by `N` vectors.
trait Addition<T: Element, I: Isa> {
    fn add<const N: usize>(&self, isa: I, x: [T::Vector<I>; N], y: [T::Vector<I>; N]) -> [T::Vector<I>; N];
}

impl<T: Element, I: Isa> Addition<T, I> for () {
    #[inline(always)]
    fn add<const N: usize>(&self, _isa: I, _x: [T::Vector<I>; N], y: [T::Vector<I>; N]) -> [T::Vector<I>; N] {
        y
    }
}

/// Scale, shift and factor of a function.
impl<T: Element, I: Isa, F: Function<T>> Addition<T, I> for ([T::Vector<I>; 3], F) {
    #[inline(always)]
    fn add<const N: usize>(&self, isa: I, mut x: [T::Vector<I>; N], mut y: [T::Vector<I>; N]) -> [T::Vector<I>; N] {
        let [scale, shift, factor] = self.0;
        for x in &mut x {
            *x = T::mul_add(isa, *x, scale, shift);
        }
        let [_, slopes] = self.1.both(isa, x);
        for (y, slope) in y.iter_mut().zip(slopes) {
            *y = T::mul_add(isa, slope, factor, *y);
        }
        y
    }
}

impl<T: Element, I: Isa, M: Addition<T, I>> Body<T, I> for Normal<T, T::Vector<I>, M> {
    #[inline(always)]
    unsafe fn block<const N: usize>(&mut self, isa: I, at: usize, lanes: Lanes<T::Mask<I>>) {
        let [slope, mean, shift] = self.constants;
        prefetch::<T, I, N>(isa, self.w.wrapping_add(at), self.len);
        prefetch::<T, I, N>(isa, self.x.wrapping_add(at), self.len);
        // SAFETY: the caller's promise.
        unsafe {
            let mut y = load::<T, I, N>(isa, self.w.add(at), lanes);
            let x = load::<T, I, N>(isa, self.x.add(at), lanes);
            for (y, &x) in y.iter_mut().zip(&x) {
                *y = T::mul_add(isa, slope, T::sub_vectors(isa, x, mean), T::add_vectors(isa, *y, shift));
            }
            store_wide::<T, I, N>(isa, self.y.add(at), lanes, self.mean.add(isa, x, y));
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::simd::IsaKind;

    /// Images of a row through a function with factors, forward and back, beside the same with the
    /// means' gradient.
    #[test]
    fn factors_and_means() {
        let f = |x: f64| x / (1.0 + (-x).exp());
        let slope = |x: f64| (f(x + 1e-6) - f(x - 1e-6)) / 2e-6;
        let (activation, affine, moments) = (Activation::Swish, (1.5, -0.25), (0.3, 2.0));
        let z = |x: f64| 1.5 * x - 0.25;
        for isa in IsaKind::available() {
            for pixels in [1usize, 5, 16, 37] {
                let x: Vec<f64> = (0..3 * pixels).map(|i| (i as f64 * 0.7).sin()).collect();
                let grad: Vec<f64> = (0..3 * pixels).map(|i| (i as f64 * 0.3).cos()).collect();
                // The second factor is 0: the function has to be computed again for the gradient by
                // it.
                let gates = [[0.5, 0.0, 2.0], [0.5, 1.5, 2.0]];
                for (gate, mask) in gates.iter().map(|gate| (gate, [1.0, 2.0, 3.0])) {
                    let factors = Factors { pixels, skipped: 0, sets: (gate, &mask) };
                    let (mut y, mut slopes) = (vec![0.0; x.len()], vec![0.0; x.len()]);
                    let (to, kept) = (&mut y[..], Some(&mut slopes[..]));
                    isa.run(Activate { activation, x: &x, affine, factors, add: false, y: to, slopes: kept });
                    let (mut grad_x, mut grad_gate) = (vec![0.0; x.len()], vec![1.0; 3]);
                    let sums = isa.run(ActivateGrad {
                        activation,
                        x: &x,
                        affine,
                        factors,
                        grad: &grad,
                        kept: Some(Kept { slopes: &slopes, values: Some(&y) }),
                        moments,
                        add: false,
                        grad_x: &mut grad_x,
                        grad_factors: Some(&mut grad_gate),
                    });
                    let mut expected = [0.0; 2];
                    for n in 0..3 {
                        let image = n * pixels..(n + 1) * pixels;
                        let by_gate: f64 = image.clone().map(|i| grad[i] * f(z(x[i])) * mask[n]).sum();
                        assert!((grad_gate[n] - 1.0 - by_gate).abs() < 1e-9, "{} {pixels}", isa.name());
                        for i in image {
                            assert!((y[i] - f(z(x[i])) * gate[n] * mask[n]).abs() < 1e-12);
                            let g = grad[i] * gate[n] * mask[n] * slope(z(x[i]));
                            assert!((grad_x[i] - 1.5 * g).abs() < 1e-8);
                            expected[0] += g;
                            expected[1] += g * (x[i] - 0.3) * 2.0;
                        }
                    }
                    assert!((sums.grad - expected[0]).abs() < 1e-7 && (sums.normalised - expected[1]).abs() < 1e-7);
                }
                let (mut means, mut slopes, mut normalised) = ([0.0; 3], [0.0; 3], [0.0; 3]);
                let results = (&mut means[..], [&mut slopes[..], &mut normalised[..]]);
                isa.run(ActivateMeans { activation, x: &x, affine, moments, means: results.0, slopes: results.1 });
                let factors = [0.5, -1.0, 2.0];
                let sets = Factors { pixels, skipped: 0, sets: (&factors, &[]) };
                let (mean, mut y) = (MeanGrad { activation, affine, factors: sets }, vec![0.0; x.len()]);
                isa.run(NormGrad { w: &grad, x: &x, constants: [0.0; 3], mean: Some(mean), y: &mut y });
                for n in 0..3 {
                    let image = || n * pixels..(n + 1) * pixels;
                    let mean = |of: &dyn Fn(f64) -> f64| image().map(|i| of(x[i])).sum::<f64>() / pixels as f64;
                    assert!((means[n] - mean(&|x| f(z(x)))).abs() < 1e-12, "{} {pixels}", isa.name());
                    assert!((slopes[n] - mean(&|x| slope(z(x)))).abs() < 1e-8);
                    assert!((normalised[n] - mean(&|x| slope(z(x)) * (x - 0.3) * 2.0)).abs() < 1e-8);
                    assert!(image().all(|i| (y[i] - grad[i] - factors[n] * slope(z(x[i]))).abs() < 1e-8));
                }
            }
        }
    }

    #[test]
    fn norm_gradients_of_all_lengths() {
        for isa in IsaKind::available() {
            for len in (0..150).step_by(if cfg!(miri) { 37 } else { 1 }) {
                let x: Vec<f64> = (0..len).map(|i| (i as f64 * 0.7).sin() + 1e3).collect();
                let mut y = vec![3.0; len + 1];
                let (constants, w) = ([2.0, 999.0, 0.5], &x);
                isa.run(NormGrad { w, x: &x, constants, mean: None, y: &mut y[..len] });
                assert!(y.iter().zip(&x).all(|(y, x)| (y - (x + 2.0 * (x - 999.0) + 0.5)).abs() < 1e-9));
                assert_eq!(y[len], 3.0);
            }
        }
    }

    /// Every function of rows of float32, added to what is there, on each instruction set.
    #[test]
    fn every_function_of_rows_of_all_lengths() {
        let relu6 = |x: f64| x.clamp(0.0, 6.0);
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        type Case<'a> = (Activation, &'a dyn Fn(f64) -> f64);
        let functions: [Case; 7] = [
            (Activation::Identity, &|x| x),
            (Activation::RELU, &|x| x.max(0.0)),
            (Activation::RELU6, &relu6),
            (Activation::Swish, &|x| x * sigmoid(x)),
            (Activation::Sigmoid, &sigmoid),
            (Activation::HardSigmoid, &|x| relu6(x + 3.0) / 6.0),
            (Activation::HardSwish, &|x| x * relu6(x + 3.0) / 6.0),
        ];
        for isa in IsaKind::available() {
            for len in (0..100).step_by(if cfg!(miri) { 33 } else { 1 }) {
                let x: Vec<f32> = (0..len).map(|i| (i as f32 * 0.37).sin() * 5.0).collect();
                for (activation, function) in functions {
                    let (affine, mut y) = ((1.5, 0.25), vec![1.0; len + 1]);
                    let to = &mut y[..len];
                    let factors = Factors::ONE;
                    isa.run(Activate { activation, x: &x, affine, factors, add: true, y: to, slopes: None });
                    let mut row = x.clone();
                    isa.run(ActivateInPlace::<f32> { activation, row: &mut row, affine });
                    let mut rounded = x.clone();
                    isa.run(ActivateInPlace::<bf16> { activation, row: &mut rounded, affine });
                    for (((y, row), rounded), x) in y.iter().zip(row).zip(rounded).zip(&x) {
                        let expected = function(1.5 * f64::from(*x) + 0.25);
                        assert!((f64::from(*y) - 1.0 - expected).abs() < 1e-5, "{} {activation:?}", isa.name());
                        assert!((f64::from(row) - expected).abs() < 1e-5, "{} {activation:?}", isa.name());
                        let near = (f64::from(rounded) - expected).abs() <= 2f64.powi(-11) * expected.abs().max(1e-3);
                        assert!(near, "{} {activation:?}", isa.name());
                    }
                    assert_eq!(y[len], 1.0);
                }
            }
        }
    }
}
