//! The layout of a checkpoint's weights files as `save_pretrained` writes them: which tensor is in which file, the header of each file,
//! and the index. Who writes streams the tensors behind the headers.

use std::collections::BTreeMap;
use std::ops::Range;

use serde_json::{Value, json};
use t5gemma_graphs::onnx::DType;

use super::{INDEX, SINGLE};

/// A layout of tensors that are all of one type.
pub struct Layout {
    pub files: Vec<WeightsFile>,
    /// Bytes of all tensors.
    pub total: u64,
}

/// A weights file.
pub struct WeightsFile {
    pub name: String,
    /// Its tensors, in their order.
    pub tensors: Range<usize>,
    /// The bytes before the first tensor.
    pub header: Vec<u8>,
}

impl Layout {
    /// The layout of tensors of these names and shapes, in their order: each file takes tensors until the next would make them more than
    /// `max_shard_size` bytes. A larger tensor is alone in a file.
    pub fn new(tensors: &[(&str, &[usize])], dtype: DType, max_shard_size: u64) -> Layout {
        let bytes = |shape: &[usize]| shape.iter().map(|&size| size as u64).product::<u64>() * dtype.size() as u64;
        let (mut ranges, mut size) = (Vec::<Range<usize>>::new(), 0);
        for (at, (_, shape)) in tensors.iter().enumerate() {
            match ranges.last_mut() {
                Some(last) if size + bytes(shape) <= max_shard_size => last.end = at + 1,
                _ => {
                    ranges.push(at..at + 1);
                    size = 0;
                }
            }
            size += bytes(shape);
        }
        let count = ranges.len();
        let file = |(at, range): (usize, Range<usize>)| {
            let name =
                if count == 1 { SINGLE.into() } else { format!("model-{:05}-of-{count:05}.safetensors", at + 1) };
            WeightsFile { name, header: header(&tensors[range.clone()], dtype, bytes), tensors: range }
        };
        let files = ranges.into_iter().enumerate().map(file).collect();
        Layout { files, total: tensors.iter().map(|(_, shape)| bytes(shape)).sum() }
    }

    /// The name and content of the index, if there are several files.
    pub fn index(&self, tensors: &[(&str, &[usize])]) -> Option<(&'static str, Value)> {
        if self.files.len() == 1 {
            return None;
        }
        let files = self
            .files
            .iter()
            .flat_map(|shard| tensors[shard.tensors.clone()].iter().map(|(tensor, _)| (*tensor, shard.name.as_str())));
        let map: BTreeMap<&str, &str> = files.collect();
        Some((INDEX, json!({"metadata": {"total_size": self.total}, "weight_map": map})))
    }
}

/// The length of the JSON text, and the text, filled up to a multiple of eight bytes so that the tensors are aligned.
fn header(tensors: &[(&str, &[usize])], dtype: DType, bytes: impl Fn(&[usize]) -> u64) -> Vec<u8> {
    let name = match dtype {
        DType::BFloat16 => "BF16",
        DType::Float16 => "F16",
        _ => "F32",
    };
    // transformers refuses files without the format.
    let mut fields = json!({"__metadata__": {"format": "pt"}});
    let mut end = 0;
    for (tensor, shape) in tensors {
        let start = end;
        end += bytes(shape);
        fields[*tensor] = json!({"dtype": name, "shape": shape, "data_offsets": [start, end]});
    }
    let mut text = fields.to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    [&(text.len() as u64).to_le_bytes()[..], &text].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    const TENSORS: [(&str, &[usize]); 4] = [("a", &[2, 3]), ("b", &[4]), ("c", &[100]), ("d", &[1])];

    #[test]
    fn files_are_filled_in_order_up_to_the_limit() {
        for (limit, ends) in
            [(10_000, vec![4]), (222, vec![4]), (220, vec![3, 4]), (20, vec![2, 3, 4]), (0, vec![1, 2, 3, 4])]
        {
            let layout = Layout::new(&TENSORS, DType::BFloat16, limit);
            let found: Vec<usize> = layout.files.iter().map(|file| file.tensors.end).collect();
            assert_eq!((found, layout.total), (ends, 222), "{limit}");
            assert_eq!(layout.index(&TENSORS).is_none(), layout.files.len() == 1, "{limit}");
        }
    }

    #[test]
    fn headers_are_those_of_safetensors() {
        for shard in Layout::new(&TENSORS, DType::Float32, 50).files {
            let tensors = &TENSORS[shard.tensors];
            let size: usize = tensors.iter().map(|(_, shape)| 4 * shape.iter().product::<usize>()).sum();
            let file = [shard.header, vec![0; size]].concat();
            let read = SafeTensors::deserialize(&file).expect("a safetensors file");
            for (name, shape) in tensors {
                assert_eq!(read.tensor(name).expect("it is there").shape(), *shape, "{name}");
            }
            assert_eq!(read.len(), tensors.len());
        }
    }
}
