//! The ports of graphs that take LoRA adapters, behind those that the same graphs have without.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{
    ADAPTER_MASK, BATCH, BEAMS, DECODER_LORA, DECODER_WITH_PAST_LORA, DType, Dim, ENCODER_ADAPTER_MASK, ENCODER_LORA,
    GraphSpec, LORA_RANK, Port, port,
};
use crate::onnx::{Definition, ValueInfo};

/// A linear layer that takes a LoRA adapter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraModule {
    /// Its name in the checkpoint, such as `model.encoder.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Columns of its weight.
    pub input: usize,
    /// Rows of its weight.
    pub output: usize,
}

impl LoraModule {
    /// The ports with its adapter: `A`, `[input, rank]`, and `B`, `[rank, output]`. The layer returns
    /// `x·Wᵀ + (x·A)·B`, so `B` has the adapter's scale in it.
    pub fn ports(&self, dtype: DType) -> [Port; 2] {
        let (input, rank, output) = (Dim::fixed(self.input), Dim::symbol(LORA_RANK), Dim::fixed(self.output));
        let name = &self.name;
        [
            port(&format!("{name}{LORA_A}"), dtype, &[&input, &rank]),
            port(&format!("{name}{LORA_B}"), dtype, &[&rank, &output]),
        ]
    }

    /// Whether a port is one of a module's.
    pub fn has_port(port: &Port) -> bool {
        port.name.ends_with(LORA_A) || port.name.ends_with(LORA_B)
    }

    /// The modules of a graph, in the order of its inputs.
    pub fn of_graph(definition: &Definition) -> Vec<LoraModule> {
        let inputs = definition.inputs.iter().map(|&input| definition.value(input));
        let inputs: Vec<_> = inputs.skip_while(|input| !input.name.ends_with(LORA_A)).collect();
        let size = |dim: &Dim| dim.as_fixed().expect("sizes come from the configuration");
        let module = |pair: &[&ValueInfo]| {
            let name = pair[0].name.strip_suffix(LORA_A).expect("A comes before B").to_string();
            LoraModule { name, input: size(&pair[0].shape[0]), output: size(&pair[1].shape[1]) }
        };
        inputs.chunks_exact(2).map(module).collect()
    }
}

/// The name and the file of the graph that is `graph` with adapters among its inputs; none for one that takes none.
pub fn lora_graph(graph: &str) -> Option<(&'static str, &'static str)> {
    match graph {
        "encoder" => Some(("encoder_lora", ENCODER_LORA)),
        "decoder" => Some(("decoder_lora", DECODER_LORA)),
        "decoder_with_past" => Some(("decoder_with_past_lora", DECODER_WITH_PAST_LORA)),
        _ => None,
    }
}

const LORA_A: &str = ".lora_A";
const LORA_B: &str = ".lora_B";

/// The names of the graphs that take LoRA adapters, and the modules of each.
pub type LoraModules = BTreeMap<String, Vec<LoraModule>>;

/// The graph with the ports of `graph` and an adapter behind its other inputs: a pair of ports for each of its modules
/// ([`LoraModule::ports`]). All sources of a run of the encoder have the same adapter. The rows of the decoder may have
/// different ones, which lie side by side along the rank: [`ADAPTER_MASK`] (`[batch_size * num_beams, lora_rank]`) is 1 in
/// the columns of a row's own adapter and 0 elsewhere, or all 0 for a row without one; [`ENCODER_ADAPTER_MASK`]
/// (`[batch_size, lora_rank]`) is the same for sources. The vision tower takes none.
pub fn lora(graph: &GraphSpec, dtype: DType, modules: &LoraModules) -> Option<GraphSpec> {
    let (name, file) = lora_graph(graph.name)?;
    let mut ports = graph.ports.clone();
    match file {
        ENCODER_LORA => {}
        DECODER_LORA => ports.inputs.extend([adapter_mask(dtype), encoder_adapter_mask(dtype)]),
        _ => ports.inputs.push(adapter_mask(dtype)),
    }
    let modules = modules.get(name).map_or(&[][..], Vec::as_slice);
    ports.inputs.extend(modules.iter().flat_map(|module| module.ports(dtype)));
    Some(GraphSpec { name, file, ports })
}

/// The port [`ADAPTER_MASK`].
pub(crate) fn adapter_mask(dtype: DType) -> Port {
    port(ADAPTER_MASK, dtype, &[&Dim::symbol(BATCH).times(&Dim::symbol(BEAMS)), &Dim::symbol(LORA_RANK)])
}

/// The port [`ENCODER_ADAPTER_MASK`].
pub(crate) fn encoder_adapter_mask(dtype: DType) -> Port {
    port(ENCODER_ADAPTER_MASK, dtype, &[&Dim::symbol(BATCH), &Dim::symbol(LORA_RANK)])
}
