//! Checked arguments: texts, arrays, structs that begin with their size, and places for outputs. All reading and
//! writing through the caller's pointers is here; the caller guarantees that the memory is valid.

use std::ffi::{CStr, c_char};
use std::mem::{align_of, size_of};
use std::ptr;
use std::slice;

use crate::error::t5g_error;

/// The size of a zero-terminated text.
pub const ZERO_TERMINATED: usize = usize::MAX;
/// An unset integer.
pub const UNSET: i64 = i64::MIN;
/// `NAN` in C.
const UNSET_NUMBER: u64 = 0x7ff8_0000_0000_0000;

/// A text.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Text(*const c_char);

impl Text {
    pub const NULL: Text = Text(ptr::null());

    #[cfg(test)]
    pub fn of(text: &'static CStr) -> Text {
        Text(text.as_ptr())
    }

    /// The zero-terminated text, if there is one.
    pub fn optional(&self, name: &str) -> Result<Option<&str>, t5g_error> {
        if self.0.is_null() { Ok(None) } else { self.get(ZERO_TERMINATED, name).map(Some) }
    }

    /// The zero-terminated text, which is required.
    pub fn required(&self, name: &str) -> Result<&str, t5g_error> {
        self.get(ZERO_TERMINATED, name)
    }

    /// The text of `size` bytes.
    pub fn get(&self, size: usize, name: &str) -> Result<&str, t5g_error> {
        if self.0.is_null() && size == 0 {
            return Ok("");
        }
        if self.0.is_null() {
            return Err(t5g_error::argument(name, "text", "NULL"));
        }
        let bytes = match size {
            // SAFETY: the caller promises a zero-terminated text.
            ZERO_TERMINATED => unsafe { CStr::from_ptr(self.0) }.to_bytes(),
            _ => check_bytes(size, name)
                // SAFETY: the caller promises `size` bytes there.
                .map(|size| unsafe { slice::from_raw_parts(self.0.cast::<u8>(), size) })?,
        };
        str::from_utf8(bytes).map_err(|error| t5g_error::argument(name, "UTF-8", error.to_string()))
    }
}

/// A pointer to numbers or pointers.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Array<T>(*const T);

impl<T: Copy> Array<T> {
    pub const NULL: Array<T> = Array(ptr::null());

    #[cfg(test)]
    pub fn of(values: &[T]) -> Array<T> {
        Array(values.as_ptr())
    }

    pub fn is_null(&self) -> bool {
        self.0.is_null()
    }

    /// The `count` elements; `None` for NULL.
    pub fn optional(&self, count: usize, name: &str) -> Result<Option<&[T]>, t5g_error> {
        if self.0.is_null() { Ok(None) } else { self.get(count, name).map(Some) }
    }

    /// The `count` elements.
    pub fn get(&self, count: usize, name: &str) -> Result<&[T], t5g_error> {
        if count == 0 {
            return Ok(&[]);
        }
        check_pointer(self.0, name)?;
        let bytes = count.checked_mul(size_of::<T>());
        let bytes = bytes
            .ok_or_else(|| t5g_error::argument(name, "a size that fits into memory", format!("{count} elements")))?;
        check_bytes(bytes, name)?;
        // SAFETY: not null, aligned, not larger than a slice may be, and the caller promises `count` elements there.
        Ok(unsafe { slice::from_raw_parts(self.0, count) })
    }
}

/// A struct of the header: fields of 8 bytes, the first of which is the size of the struct.
///
/// # Safety
/// The type is `repr(C)`, every field is 8 bytes wide, and any bytes are a valid value of every field.
pub unsafe trait Fields: Copy {
    /// The size of the struct's first version.
    const OLDEST: usize;

    /// The struct with all fields unset.
    fn unset() -> Self;
}

/// A pointer to a struct of the caller's, to read or to fill in.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Record<T>(*mut T);

impl<T: Fields> Record<T> {
    #[cfg(test)]
    pub fn to(record: &mut T) -> Record<T> {
        Record(record)
    }

    /// The struct; fields that the caller's header lacks are unset. `None` for NULL.
    pub fn optional(&self, name: &str) -> Result<Option<T>, t5g_error> {
        if self.0.is_null() { Ok(None) } else { self.get(name).map(Some) }
    }

    /// [`Record::optional`] for a required struct.
    pub fn get(&self, name: &str) -> Result<T, t5g_error> {
        let size = self.size(name)?;
        let own = size_of::<T>();
        // SAFETY: `size` is the size that the caller promises, a multiple of 8.
        let words = unsafe { slice::from_raw_parts(self.0.cast::<u64>(), size / 8) };
        if words.len() > own / 8 && words[own / 8..].iter().any(|word| ![0, UNSET as u64, UNSET_NUMBER].contains(word))
        {
            let found = format!("{size} bytes with later fields set (link a newer libt5gemma)");
            return Err(t5g_error::argument(
                &format!("{name}.size"),
                format!("at most the {own} bytes that this library knows"),
                found,
            ));
        }
        let mut record = T::unset();
        // SAFETY: both consist of 8-byte words of which any are valid (see `Fields`), and both have this many.
        unsafe {
            ptr::copy_nonoverlapping(
                words.as_ptr(),
                ptr::from_mut(&mut record).cast::<u64>(),
                words.len().min(own / 8),
            );
        }
        Ok(record)
    }

    /// Fills in the caller's struct as far as it goes.
    pub fn put(&self, value: T, name: &str) -> Result<(), t5g_error> {
        let size = self.size(name)?.min(size_of::<T>());
        // SAFETY: the caller promises `size` bytes there; the first word, the size, is not written.
        unsafe {
            let words = ptr::from_ref(&value).cast::<u64>();
            ptr::copy_nonoverlapping(words.add(1), self.0.cast::<u64>().add(1), size / 8 - 1);
        }
        Ok(())
    }

    /// The size field, checked.
    pub fn size(&self, name: &str) -> Result<usize, t5g_error> {
        check_pointer(self.0.cast::<u64>(), name)?;
        // SAFETY: not null and aligned, and a struct begins with its size.
        let size = unsafe { self.0.cast::<usize>().read() };
        if !(T::OLDEST..=4096).contains(&size) || size % 8 != 0 {
            let (field, own) = (format!("{name}.size"), size_of::<T>());
            return Err(t5g_error::argument(&field, format!("the size of the struct ({own} here)"), size.to_string()));
        }
        Ok(size)
    }
}

/// A place for an output.
#[repr(transparent)]
pub struct Out<T>(*mut T);

impl<T> Out<T> {
    /// The place of a required output, checked before the output is computed.
    pub fn check(&self, name: &str) -> Result<Place<T>, t5g_error> {
        check_pointer(self.0, name)?;
        Ok(Place(self.0))
    }

    /// The place of an optional output.
    pub fn optional(&self, name: &str) -> Result<Option<Place<T>>, t5g_error> {
        if self.0.is_null() { Ok(None) } else { self.check(name).map(Some) }
    }
}

/// A checked [`Out`].
pub struct Place<T>(*mut T);

impl<T> Place<T> {
    pub fn put(self, value: T) {
        // SAFETY: not null and aligned, and the caller promises room for one value.
        unsafe { self.0.write(value) }
    }
}

impl<T: Copy> Place<T> {
    /// Writes several values, for which the caller has given a sufficient capacity.
    pub fn put_all(self, values: impl ExactSizeIterator<Item = T>) {
        for (at, value) in values.enumerate() {
            // SAFETY: as above, for as many values as the caller's capacity, which was compared with the length.
            unsafe { self.0.add(at).write(value) }
        }
    }
}

/// A field of a struct that points to an output.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Buffer<T>(pub *mut T);

impl<T> Buffer<T> {
    pub fn is_null(&self) -> bool {
        self.0.is_null()
    }

    /// The place, if the capacity suffices.
    pub fn room(&self, capacity: usize, needed: usize, name: &str) -> Result<Place<T>, t5g_error> {
        check_pointer(self.0, name)?;
        if capacity < needed {
            let (expected, found) = (format!("room for {needed} numbers"), format!("a capacity of {capacity}"));
            return Err(t5g_error::expected(crate::error::t5g_code::Buffer, name, expected, found));
        }
        Ok(Place(self.0))
    }
}

fn check_pointer<T>(pointer: *const T, name: &str) -> Result<(), t5g_error> {
    if pointer.is_null() {
        return Err(t5g_error::argument(name, "a pointer", "NULL"));
    }
    if !pointer.is_aligned() {
        return Err(t5g_error::argument(
            name,
            format!("a pointer aligned to {} bytes", align_of::<T>()),
            "a misaligned one",
        ));
    }
    Ok(())
}

fn check_bytes(bytes: usize, name: &str) -> Result<usize, t5g_error> {
    match isize::try_from(bytes) {
        Ok(_) => Ok(bytes),
        Err(_) => Err(t5g_error::argument(name, "a size that fits into memory", format!("{bytes} bytes"))),
    }
}

/// A flag: 0 or 1.
pub fn flag(value: i64, name: &str) -> Result<bool, t5g_error> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(t5g_error::argument(name, "0 or 1", other.to_string())),
    }
}

/// A size, if it is set.
pub fn integer(value: i64, name: &str) -> Result<Option<usize>, t5g_error> {
    match usize::try_from(value) {
        Ok(value) => Ok(Some(value)),
        Err(_) if value == UNSET => Ok(None),
        Err(_) => Err(t5g_error::argument(name, "an integer of at least 0, or T5G_UNSET", value.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq)]
    #[repr(C)]
    struct Pair {
        size: usize,
        old: i64,
        new: i64,
    }

    // SAFETY: fields of 8 bytes of which any bytes are a valid value.
    unsafe impl Fields for Pair {
        const OLDEST: usize = 16;

        fn unset() -> Pair {
            Pair { size: 0, old: UNSET, new: UNSET }
        }
    }

    #[test]
    fn records_of_other_versions_are_read_as_far_as_both_know_them() {
        /// Name, what the caller hands over, what is read.
        type Case = (&'static str, &'static [u64], Option<(i64, i64)>);
        const UNSET_WORD: u64 = UNSET as u64;
        let cases: [Case; 9] = [
            ("of this version", &[24, 5, 6], Some((5, 6))),
            ("older", &[16, 5], Some((5, UNSET))),
            ("newer, with nothing new set", &[40, 5, 6, 0, UNSET_WORD], Some((5, 6))),
            ("newer, with an unset number", &[32, 5, 6, UNSET_NUMBER], Some((5, 6))),
            ("newer, with something set", &[32, 5, 6, 7], None),
            ("without a size", &[0, 5, 6], None),
            ("too small", &[8, 5, 6], None),
            ("between two fields", &[20, 5, 6], None),
            ("absurd", &[u64::MAX, 5, 6], None),
        ];
        for (name, words, expected) in cases {
            let found = Record(words.as_ptr().cast_mut().cast::<Pair>()).get("pair");
            assert_eq!(found.ok().map(|pair| (pair.old, pair.new)), expected, "{name}");
        }
        assert!(Record(ptr::null_mut::<Pair>()).get("pair").is_err());
        assert!(Record(ptr::without_provenance_mut::<Pair>(12)).get("pair").is_err());
    }

    #[test]
    fn a_record_is_filled_in_no_further_than_it_goes() {
        let mut words = [16u64, 1, 2];
        Record(words.as_mut_ptr().cast::<Pair>()).put(Pair { size: 0, old: 8, new: 9 }, "pair").expect("fits");
        assert_eq!(words, [16, 8, 2]);
    }

    #[test]
    fn texts_are_checked() {
        let text = Text(c"a\xc3\xa9".as_ptr());
        assert_eq!(text.get(ZERO_TERMINATED, "text").ok(), Some("aé"));
        assert_eq!(text.get(1, "text").ok(), Some("a"));
        for (size, expected) in
            [(2, "text: expected UTF-8, found "), (usize::MAX - 1, "text: expected a size that fits")]
        {
            let error = text.get(size, "text").expect_err(expected);
            assert!(error.text().starts_with(expected), "{}", error.text());
        }
        assert_eq!(Text(ptr::null()).get(0, "text").ok(), Some(""));
        assert!(Text(ptr::null()).get(1, "text").is_err() && Text(ptr::null()).get(ZERO_TERMINATED, "text").is_err());
    }

    #[test]
    fn arrays_are_checked() {
        let numbers = [1i64, 2];
        assert_eq!(Array(numbers.as_ptr()).get(2, "ids").ok(), Some([1, 2].as_slice()));
        assert!(Array(ptr::null::<i64>()).get(0, "ids").is_ok_and(<[i64]>::is_empty));
        assert!(Array(ptr::null::<i64>()).get(1, "ids").is_err());
        assert!(Array(ptr::without_provenance::<i64>(12)).get(1, "ids").is_err());
        assert!(Array(numbers.as_ptr()).get(usize::MAX / 4, "ids").is_err());
        assert!(Array(numbers.as_ptr()).get(usize::MAX / 8, "ids").is_err());
    }
}
