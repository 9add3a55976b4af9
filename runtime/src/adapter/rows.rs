//! The inputs of graphs that take adapters: [`SideBySide`] for a set of adapters, [`RowAdapters`] for the rows that use
//! them.

use std::collections::HashMap;
use std::sync::Arc;

use half::{bf16, f16};
use ort::value::{DynValue, PrimitiveTensorElementType, Tensor};
use t5gemma_graphs::interface::{DType, LoraModule, LoraModules};

use super::{Adapter, Pair};
use crate::tensors::float_tensor;

/// Tensors of zeros by their shapes.
type Zeros = HashMap<[usize; 2], Arc<DynValue>>;

/// Several adapters side by side along the rank.
pub(super) struct SideBySide {
    members: Vec<Adapter>,
    /// The sum of their ranks.
    rank: usize,
    dtype: DType,
    /// `A` and `B` of each module that a graph takes.
    by_graph: HashMap<String, Vec<Pair>>,
}

impl SideBySide {
    /// The inputs of `members`, in the process's memory: those of a GPU are copied there when they are bound.
    pub fn new(members: Vec<Adapter>, modules: &LoraModules, dtype: DType) -> ort::Result<SideBySide> {
        let rank = members.iter().map(Adapter::rank).sum();
        let mut all = SideBySide { members, rank, dtype, by_graph: HashMap::new() };
        // Modules of several graphs are made once, and so are the zeros of modules that no member changes.
        let (mut made, mut zeros) = (HashMap::<&str, Pair>::new(), Zeros::new());
        for (graph, modules) in modules {
            let mut pairs = Vec::with_capacity(modules.len());
            for module in modules {
                let pair = match made.get(module.name.as_str()) {
                    Some(pair) => pair.clone(),
                    None => all.pair(module, &mut zeros)?,
                };
                made.insert(&module.name, pair.clone());
                pairs.push(pair);
            }
            all.by_graph.insert(graph.clone(), pairs);
        }
        Ok(all)
    }

    pub fn members(&self) -> &[Adapter] {
        &self.members
    }

    /// `A` and `B` of each module of a graph, in the order of its inputs.
    pub fn of_graph(&self, graph: &str) -> impl Iterator<Item = &Arc<DynValue>> {
        self.by_graph.get(graph).into_iter().flatten().flatten()
    }

    fn pair(&self, module: &LoraModule, zeros: &mut Zeros) -> ort::Result<Pair> {
        let name = &module.name;
        let (of_a, of_b) = ([module.input, self.rank], [self.rank, module.output]);
        let found: Vec<Option<&Pair>> = self.members.iter().map(|member| member.0.modules.get(name)).collect();
        if found.iter().all(Option::is_none) {
            let mut zeros = |shape: [usize; 2]| -> ort::Result<Arc<DynValue>> {
                if let Some(zeros) = zeros.get(&shape) {
                    return Ok(zeros.clone());
                }
                let made = Arc::new(float_tensor(self.dtype, shape, vec![0.0; shape[0] * shape[1]])?);
                zeros.insert(shape, made.clone());
                Ok(made)
            };
            return Ok([zeros(of_a)?, zeros(of_b)?]);
        }
        if let [Some(pair)] = found[..]
            && pair[0].shape()[1] as usize == self.rank
        {
            return Ok(pair.clone());
        }
        let ranks: Vec<usize> = self.members.iter().map(Adapter::rank).collect();
        match self.dtype {
            DType::Float16 => joined::<f16>(&found, &ranks, of_a, of_b),
            DType::BFloat16 => joined::<bf16>(&found, &ranks, of_a, of_b),
            _ => joined::<f32>(&found, &ranks, of_a, of_b),
        }
    }

    /// The columns of a member.
    fn columns(&self, member: usize) -> std::ops::Range<usize> {
        let first = self.members[..member].iter().map(Adapter::rank).sum();
        first..first + self.members[member].rank()
    }
}

/// `A` and `B` of all members side by side, with zeros where a member's rank for this module is less than its greatest.
fn joined<T>(members: &[Option<&Pair>], ranks: &[usize], of_a: [usize; 2], of_b: [usize; 2]) -> ort::Result<Pair>
where
    T: PrimitiveTensorElementType + std::fmt::Debug + Clone + Copy + Default + 'static,
{
    let ([input, rank], [_, output]) = (of_a, of_b);
    let (mut a, mut b) = (vec![T::default(); input * rank], vec![T::default(); rank * output]);
    let mut first = 0;
    for (member, width) in members.iter().zip(ranks) {
        if let Some([of_a, of_b]) = member {
            let (shape, numbers) = of_a.try_extract_tensor::<T>()?;
            let own = shape[1] as usize;
            for (to, from) in a.chunks_exact_mut(rank).zip(numbers.chunks_exact(own)) {
                to[first..first + own].copy_from_slice(from);
            }
            b[first * output..(first + own) * output].copy_from_slice(of_b.try_extract_tensor::<T>()?.1);
        }
        first += width;
    }
    Ok([Arc::new(Tensor::from_array((of_a, a))?.into_dyn()), Arc::new(Tensor::from_array((of_b, b))?.into_dyn())])
}

/// The adapters of the rows of a run, as inputs of the decoder graphs.
pub(crate) struct RowAdapters {
    all: Arc<SideBySide>,
    /// The member that each row uses.
    rows: Vec<Option<usize>>,
    /// `[rows, rank]`.
    mask: DynValue,
}

impl RowAdapters {
    pub(super) fn new(all: Arc<SideBySide>, rows: &[Option<Adapter>]) -> ort::Result<RowAdapters> {
        let member = |adapter: &Adapter| all.members.iter().position(|member| member == adapter);
        let rows: Vec<Option<usize>> = rows.iter().map(|row| row.as_ref().and_then(member)).collect();
        let mask = mask(&all, &rows)?;
        Ok(RowAdapters { all, rows, mask })
    }

    /// Makes each row `r` the continuation of row `parents[r]`.
    pub fn select(&mut self, parents: &[usize]) -> ort::Result<()> {
        let rows: Vec<Option<usize>> = parents.iter().map(|&parent| self.rows[parent]).collect();
        if rows != self.rows {
            self.mask = mask(&self.all, &rows)?;
            self.rows = rows;
        }
        Ok(())
    }

    /// The inputs of the first decoder step behind its others, which has one target row for each source row.
    pub fn of_first_step(&self) -> impl Iterator<Item = &DynValue> {
        [&self.mask, &self.mask].into_iter().chain(self.all.of_graph("decoder_lora").map(|value| &**value))
    }

    /// The inputs of a cached step behind its others.
    pub fn of_step(&self) -> impl Iterator<Item = &DynValue> {
        [&self.mask].into_iter().chain(self.all.of_graph("decoder_with_past_lora").map(|value| &**value))
    }
}

/// 1 in the columns that a row uses.
fn mask(all: &SideBySide, rows: &[Option<usize>]) -> ort::Result<DynValue> {
    let mut numbers = vec![0.0; rows.len() * all.rank];
    for (row, member) in numbers.chunks_exact_mut(all.rank).zip(rows) {
        if let Some(member) = member {
            row[all.columns(*member)].fill(1.0);
        }
    }
    float_tensor(all.dtype, [rows.len(), all.rank], numbers)
}
