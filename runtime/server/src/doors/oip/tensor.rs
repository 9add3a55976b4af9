//! `Tensor`: the tensors of the protocol that models here take and give, and their bytes: little-endian numbers, and
//! texts each after its length in four bytes.

use crate::failure::Failure;

/// A named tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i64>,
    /// Its elements, in order.
    pub data: Data,
}

/// The elements of a tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    /// `BYTES`.
    Bytes(Vec<Vec<u8>>),
    /// `INT64`, or another type of integers.
    Integers(Vec<i64>),
    /// `FP32`.
    Floats(Vec<f32>),
}

impl Data {
    /// The number of elements.
    pub fn len(&self) -> usize {
        match self {
            Data::Bytes(elements) => elements.len(),
            Data::Integers(elements) => elements.len(),
            Data::Floats(elements) => elements.len(),
        }
    }

    /// The name of the type of an output.
    pub fn datatype(&self) -> &'static str {
        match self {
            Data::Bytes(_) => "BYTES",
            Data::Integers(_) => "INT64",
            Data::Floats(_) => "FP32",
        }
    }

    /// The elements as bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Data::Bytes(elements) => {
                let one = |element: &Vec<u8>| [&(element.len() as u32).to_le_bytes()[..], element].concat();
                elements.iter().flat_map(one).collect()
            }
            Data::Integers(elements) => elements.iter().flat_map(|number| number.to_le_bytes()).collect(),
            Data::Floats(elements) => elements.iter().flat_map(|number| number.to_le_bytes()).collect(),
        }
    }

    /// Reads the elements of an input.
    ///
    /// # Errors
    /// Bytes of another length, or a type that no input has.
    pub fn from_bytes(name: &str, datatype: &str, mut bytes: &[u8]) -> Result<Data, Failure> {
        let whole = |size: usize| match bytes.len().is_multiple_of(size) {
            true => Ok(()),
            false => Err(Failure::field(name, format_args!("bytes by {size}"), format_args!("{} bytes", bytes.len()))),
        };
        match datatype {
            "BYTES" => {
                let mut elements = Vec::new();
                while !bytes.is_empty() {
                    let element = bytes.split_first_chunk::<4>().and_then(|(length, rest)| {
                        rest.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)
                    });
                    let Some((element, rest)) = element else {
                        return Err(Failure::field(name, "texts after their lengths", "bytes that end in one"));
                    };
                    elements.push(element.to_vec());
                    bytes = rest;
                }
                Ok(Data::Bytes(elements))
            }
            "INT64" => {
                whole(8)?;
                Ok(Data::Integers(bytes.as_chunks().0.iter().map(|chunk| i64::from_le_bytes(*chunk)).collect()))
            }
            "INT32" => {
                whole(4)?;
                let numbers = bytes.as_chunks().0.iter().map(|chunk| i64::from(i32::from_le_bytes(*chunk)));
                Ok(Data::Integers(numbers.collect()))
            }
            "FP32" => {
                whole(4)?;
                Ok(Data::Floats(bytes.as_chunks().0.iter().map(|chunk| f32::from_le_bytes(*chunk)).collect()))
            }
            other => Err(other_type(name, other)),
        }
    }
}

/// The error for a type that no input has.
pub fn other_type(name: &str, datatype: &str) -> Failure {
    Failure::field(&format!("inputs.{name}.datatype"), "BYTES, INT64, INT32 or FP32", format_args!("{datatype:?}"))
}

impl Tensor {
    /// Checks that there are as many elements as the shape says.
    ///
    /// # Errors
    /// A shape of another number, or with a negative one.
    pub fn checked(self) -> Result<Tensor, Failure> {
        let count = self.shape.iter().try_fold(1usize, |count, &size| count.checked_mul(usize::try_from(size).ok()?));
        let found = self.data.len();
        if count == Some(found) {
            return Ok(self);
        }
        let expected = format!("as many elements as the shape {:?} has", self.shape);
        Err(Failure::field(&format!("inputs.{}", self.name), expected, found))
    }

    /// The elements of each row: along the first dimension.
    pub fn row_length(&self) -> usize {
        self.shape.get(1..).unwrap_or_default().iter().map(|&size| size as usize).product()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bytes_that_are_no_tensor_are_refused() {
        let cases: [(&str, &[u8]); 7] = [
            ("BYTES", &[1, 0, 0]),
            ("BYTES", &[2, 0, 0, 0, 65]),
            ("BYTES", &[255, 255, 255, 255, 65]),
            ("INT64", &[1, 0, 0, 0]),
            ("INT32", &[1, 0, 0]),
            ("FP32", &[1, 0, 0]),
            ("FP16", &[1, 0]),
        ];
        for (datatype, bytes) in cases {
            assert!(Data::from_bytes("x", datatype, bytes).is_err(), "{datatype} {bytes:?}");
        }
        let tensor =
            |shape: &[i64]| Tensor { name: "x".into(), shape: shape.to_vec(), data: Data::Integers(vec![1, 2]) };
        for shape in [&[3][..], &[-1], &[i64::MAX, i64::MAX], &[]] {
            assert!(tensor(shape).checked().is_err(), "{shape:?}");
        }
        for shape in [&[2][..], &[1, 2], &[2, 1]] {
            assert!(tensor(shape).checked().is_ok(), "{shape:?}");
        }
    }

    proptest! {
        #[test]
        fn tensors_survive_their_bytes(texts: Vec<Vec<u8>>, numbers: Vec<i64>) {
            for data in [Data::Bytes(texts), Data::Integers(numbers)] {
                prop_assert_eq!(Data::from_bytes("x", data.datatype(), &data.to_bytes()).expect("its own bytes"), data);
            }
        }

        #[test]
        fn no_bytes_panic(bytes: Vec<u8>, datatype in prop::sample::select(vec!["BYTES", "INT64", "INT32", "FP32", "BOOL"])) {
            let _ = Data::from_bytes("x", datatype, &bytes);
        }
    }
}
