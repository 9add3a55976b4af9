//! What registers the processor has. `T5GEMMA_MAX_CPU_ISA=avx2` or `=generic` has newer ones left alone, to compare them or to get
//! the same numbers on several machines.

use std::sync::OnceLock;

/// What kernels are compiled for; each has all that those before it have.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum Level {
    /// Any processor.
    #[default]
    Generic,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 (F, BW, DQ, VL) with VNNI.
    Vnni,
}

/// The variable that names the newest level to use.
const LIMIT: &str = "T5GEMMA_MAX_CPU_ISA";

/// The level to use here.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| match std::env::var(LIMIT).as_deref() {
        Ok("generic") => Level::Generic,
        Ok("avx2") => found().min(Level::Avx2),
        _ => found(),
    })
}

/// All that this processor can do.
#[cfg(target_arch = "x86_64")]
pub fn found() -> Level {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni");
    match (avx2, avx512) {
        (true, true) => Level::Vnni,
        (true, false) => Level::Avx2,
        (false, _) => Level::Generic,
    }
}

/// All that this processor can do.
#[cfg(not(target_arch = "x86_64"))]
pub fn found() -> Level {
    Level::Generic
}
