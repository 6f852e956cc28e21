//! Libraries that the process has loaded: frameworks', whose functions are looked up at run time.

use std::ffi::{CStr, CString, c_void};
use std::path::Path;
use std::ptr::NonNull;

/// A library that the process has loaded and never unloads.
pub struct Library(NonNull<c_void>);

impl Library {
    /// The library at a path, if it is there already; on Unix alone.
    #[must_use]
    pub fn loaded(path: &Path) -> Option<Self> {
        let path = CString::new(path.as_os_str().as_encoded_bytes()).ok()?;
        NonNull::new(open(&path)).map(Self)
    }

    /// The address of a function of the library, or of one that it depends on.
    #[must_use]
    pub fn symbol(&self, name: &CStr) -> Option<NonNull<c_void>> {
        NonNull::new(find(self.0.as_ptr(), name))
    }
}

#[cfg(unix)]
fn open(path: &CStr) -> *mut c_void {
    // SAFETY: with NOLOAD this only finds a library that is there, whose initialisation is done.
    unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD) }
}

#[cfg(unix)]
fn find(handle: *mut c_void, name: &CStr) -> *mut c_void {
    // SAFETY: a handle of `open`, which is never closed.
    unsafe { libc::dlsym(handle, name.as_ptr()) }
}

#[cfg(not(unix))]
fn open(_: &CStr) -> *mut c_void {
    std::ptr::null_mut()
}

#[cfg(not(unix))]
fn find(_: *mut c_void, _: &CStr) -> *mut c_void {
    std::ptr::null_mut()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri loads no libraries")]
    fn only_what_is_loaded_is_found() {
        assert!(Library::loaded(Path::new("/nowhere/libtorch_cpu.so")).is_none());
        assert!(Library::loaded(Path::new("lib\0c")).is_none());
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        {
            let library = Library::loaded(Path::new("libc.so.6")).unwrap();
            assert!(library.symbol(c"malloc").is_some() && library.symbol(c"no function").is_none());
        }
    }
}
