//! `ai.t5gemma.MergedAttention`: T5Gemma 2's attention to the target so far and to the source. Graphs have it as a function
//! of standard operators, which ONNX Runtime computes where this kernel is not registered.

use ort::operator::{ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput};
use ort::value::TensorElementType;

use super::{missing, parallel_for, required_usize_attribute};
use crate::attention::cached::Past;
use crate::attention::merged::{self, MergedInputs, MergedOutputs};

/// The operator.
pub struct MergedAttention;

/// Its name.
pub const MERGED: &str = "MergedAttention";

impl Operator for MergedAttention {
    type Kernel<'attr> = MergedAttentionKernel;

    fn name(&self) -> &str {
        MERGED
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        let float = || OperatorInput::required(TensorElementType::Float32);
        let optional = || OperatorInput::optional(TensorElementType::Float32);
        [
            float(),
            float(),
            float(),
            float(),
            float(),
            float(),
            OperatorInput::required(TensorElementType::Int64),
            float(),
            float(),
            OperatorInput::required(TensorElementType::Bool),
            optional(),
            optional(),
        ]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [(); 4].map(|()| OperatorOutput::required(TensorElementType::Float32))
    }

    fn create_kernel<'attr>(&self, node: &KernelContext<'attr>) -> ort::Result<MergedAttentionKernel> {
        let number = |name| required_usize_attribute(node, MERGED, name);
        let float = |name: &str| node.get::<f32>(name).ok_or_else(|| missing(MERGED, &format!("attribute {name}")));
        let (heads, kv_heads) = (number("num_heads")?, number("kv_num_heads")?);
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            let message = format!("{MERGED}: num_heads must be a multiple of kv_num_heads (got {heads}, {kv_heads})");
            return Err(ort::Error::new(message));
        }
        let window = number("local_window_size")?;
        let attention = merged::MergedAttention::new(heads, kv_heads, float("scale")?, float("epsilon")?, window);
        Ok(MergedAttentionKernel { attention })
    }
}

/// The kernel of a node.
pub struct MergedAttentionKernel {
    attention: merged::MergedAttention,
}

impl Kernel for MergedAttentionKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let wrong = |what: &str| ort::Error::new(format!("{MERGED}: {what}"));
        let input = |at: usize| context.input(at)?.ok_or_else(|| wrong(&format!("input {at} is missing")));
        let [query, key_value, query_norm, key_norm, cos, sin, positions, source_key, source_value, mask] = [
            input(0)?,
            input(1)?,
            input(2)?,
            input(3)?,
            input(4)?,
            input(5)?,
            input(6)?,
            input(7)?,
            input(8)?,
            input(9)?,
        ];
        let past = match context.num_inputs()? {
            12 => [context.input(10)?, context.input(11)?],
            _ => [None, None],
        };
        let (query_shape, queries) = query.try_extract_tensor::<f32>()?;
        let (_, keys_values) = key_value.try_extract_tensor::<f32>()?;
        let ((_, query_norm), (_, key_norm)) =
            (query_norm.try_extract_tensor::<f32>()?, key_norm.try_extract_tensor::<f32>()?);
        let ((_, cos), (_, sin)) = (cos.try_extract_tensor::<f32>()?, sin.try_extract_tensor::<f32>()?);
        let (_, positions) = positions.try_extract_tensor::<i64>()?;
        let (source_shape, source_keys) = source_key.try_extract_tensor::<f32>()?;
        let (_, source_values) = source_value.try_extract_tensor::<f32>()?;
        let (_, source_mask) = mask.try_extract_tensor::<bool>()?;
        let past = match &past {
            [Some(key), Some(value)] => Some([key.try_extract_tensor::<f32>()?, value.try_extract_tensor::<f32>()?]),
            _ => None,
        };
        let &merged::MergedAttention { heads, kv_heads, .. } = &self.attention;
        let sizes = |shape: &[i64]| shape.iter().map(|&size| size as usize).collect::<Vec<_>>();
        let (&[rows, new, width], &[batch, source_heads, source, dim]) =
            (&sizes(query_shape)[..], &sizes(source_shape)[..])
        else {
            return Err(wrong(&format!("queries {query_shape} and a source {source_shape}")));
        };
        let past_shape = past.as_ref().map(|[(shape, _), _]| sizes(shape));
        let past_capacity = match &past_shape {
            None => 0,
            Some(shape) => match shape[..] {
                [of_rows, of_heads, capacity, of_dim] if [of_rows, of_heads, of_dim] == [rows, kv_heads, dim] => {
                    capacity
                }
                _ => return Err(wrong(&format!("queries {query_shape} over a past of {shape:?}"))),
            },
        };
        let last = |row: usize| positions.get((row + 1) * new - 1).copied().unwrap_or(-1);
        let ends: Vec<usize> = (0..rows).map(|row| (last(row).max(-1) + 1) as usize).collect();
        let capacity = past_capacity.max(if past.is_none() { new } else { 0 });
        let fits = new > 0
            && width == heads * dim
            && dim.is_multiple_of(2)
            && source_heads == kv_heads
            && batch > 0
            && rows.is_multiple_of(batch)
            && keys_values.len() == rows * new * 2 * kv_heads * dim
            && [query_norm.len(), key_norm.len()] == [dim; 2]
            && [cos.len(), sin.len()] == [rows * new * dim / 2; 2]
            && positions.len() == rows * new
            && [source_keys.len(), source_values.len()] == [batch * kv_heads * source * dim; 2]
            && source_mask.len() == batch * source
            && past.as_ref().is_none_or(|[(_, keys), (_, values)]| keys.len() == values.len())
            && ends.iter().all(|&end| end >= new && end <= capacity && end - new <= past_capacity);
        if !fits {
            return Err(wrong(&format!(
                "queries {query_shape} up to {ends:?} of {capacity} positions, over a source {source_shape}"
            )));
        }
        let output = |at: usize, shape| context.output(at, shape)?.ok_or_else(|| missing(MERGED, "an output"));
        let cache_shape = vec![rows as i64, kv_heads as i64, capacity as i64, dim as i64];
        let mut attended = output(0, query_shape.to_vec())?;
        let mut log_sums = output(3, vec![rows as i64, new as i64, heads as i64])?;
        let (mut key, mut value) = (output(1, cache_shape.clone())?, output(2, cache_shape)?);
        let inputs = MergedInputs {
            queries,
            keys_values,
            query_norm,
            key_norm,
            cos,
            sin,
            new,
            dim,
            ends: &ends,
            source_keys,
            source_values,
            source_mask,
            batch,
            // Addresses alone: it may be the memory of the outputs.
            past: past.map(|[(_, keys), (_, values)]| Past {
                keys: keys.as_ptr(),
                values: values.as_ptr(),
                capacity: past_capacity,
            }),
        };
        let outputs = MergedOutputs {
            attended: attended.try_extract_tensor_mut::<f32>()?.1,
            log_sums: log_sums.try_extract_tensor_mut::<f32>()?.1,
            keys: key.try_extract_tensor_mut::<f32>()?.1,
            values: value.try_extract_tensor_mut::<f32>()?.1,
            capacity,
        };
        // SAFETY: the past is an input of this run with the shape that was checked; if it is the memory of the outputs,
        // nobody else has it.
        unsafe { self.attention.run(inputs, outputs, &|count, task| parallel_for(context, count, task))? };
        Ok(())
    }
}
