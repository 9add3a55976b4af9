//! Compiles the Rust of the pages for people, as tests of rustdoc's. The other tests are in `main.rs` and beside it.

/// Holds the page.
#[cfg(doctest)]
#[doc = include_str!("../docs/src/rust.md")]
pub struct RustPage;

/// Holds the page.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;

/// Holds the page.
#[cfg(doctest)]
#[doc = include_str!("../docs/src/images.md")]
pub struct ImagesPage;
