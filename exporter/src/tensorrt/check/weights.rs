//! Checks that external weights are where the graph says, and complete.

use std::collections::HashMap;
use std::fs;
use std::path::{Component, Path};

use super::Checker;
use super::FindingKind::ExternalData as Kind;
use crate::proto::read::ExternalData;
use crate::tensorrt::operators::bits;

impl Checker<'_> {
    pub(super) fn check_external_data(&mut self, folder: &Path) {
        let mut sizes: HashMap<&str, Option<u64>> = HashMap::new();
        for (name, tensor) in &self.model.graph.initializers {
            let Some(ExternalData { file, offset, length }) = &tensor.external else { continue };
            let is_inside = Path::new(file).components().all(|part| matches!(part, Component::Normal(_)));
            if !is_inside || file.is_empty() {
                self.report_tensor(name, Kind, format!("{file:?} is not a path within the model's folder"));
                continue;
            }
            let size = || fs::metadata(folder.join(file)).ok().map(|file| file.len());
            let Some(size) = *sizes.entry(file).or_insert_with(size) else {
                self.report_tensor(name, Kind, format!("{file} is missing"));
                continue;
            };
            let elements = tensor.shape.iter().map(|&size| size.max(0) as u128).product::<u128>();
            let needed = (elements * u128::from(bits(tensor.dtype))).div_ceil(8);
            if let Some(length) = length.filter(|&length| u128::from(length) != needed) {
                self.report_tensor(name, Kind, format!("expected {needed} bytes, found {length}"));
            }
            let (start, end) = (*offset, u128::from(*offset) + needed);
            if end > u128::from(size) {
                let reason = format!("bytes {start} to {end} are beyond the end of {file}, which has {size}");
                self.report_tensor(name, Kind, reason);
            }
        }
    }
}
