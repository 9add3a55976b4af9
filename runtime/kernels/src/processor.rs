//! The vector instructions of the processor. `T5GEMMA_MAX_CPU_ISA=avx512_vnni`, `=avx2` or `=generic` keeps the kernels here from using newer
//! ones, to compare levels or to get the same numbers on several machines. At `generic` ONNX Runtime computes all that it has vector kernels
//! for.

use std::sync::OnceLock;

use crate::error::Error;

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
    /// The same with AMX for bytes and bfloat16.
    Amx,
}

/// By the names that the variable has for them.
const LEVELS: [(&str, Level); 4] =
    [("generic", Level::Generic), ("avx2", Level::Avx2), ("avx512_vnni", Level::Vnni), ("avx512_amx", Level::Amx)];

/// The variable that names the newest level to use.
const LIMIT: &str = "T5GEMMA_MAX_CPU_ISA";

/// The level to use here.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| chosen().unwrap_or(found()))
}

/// The newest instructions that the kernels for a CPU use here: `avx512_amx`, `avx512_vnni`, `avx2` or `generic`. The environment variable
/// `T5GEMMA_MAX_CPU_ISA` names one of these to leave newer ones alone; anything else is an error.
pub fn instructions() -> Result<&'static str, Error> {
    let chosen = chosen()?;
    Ok(LEVELS.iter().find(|(_, level)| *level == chosen).map_or("generic", |(name, _)| name))
}

/// What the variable has chosen.
fn chosen() -> Result<Level, Error> {
    limited(std::env::var(LIMIT).ok().as_deref())
}

/// All that this processor can do, but for what is above a level of this name.
fn limited(limit: Option<&str>) -> Result<Level, Error> {
    let Some(limit) = limit else { return Ok(found()) };
    match LEVELS.iter().find(|(name, _)| *name == limit) {
        Some(&(_, level)) => Ok(level.min(found())),
        None => Err(Error::InstructionSet { variable: LIMIT, found: limit.to_string() }),
    }
}

/// Defines a function of slices that another one, written for any [`Sixteen`](super::sixteen::Sixteen), is compiled to for
/// each level.
///
/// # Safety
/// What is compiled asks nothing of its callers but that the processor is of the level.
macro_rules! at_level {
    (fn $name:ident($($x:ident: $of:ty),*) $(-> $result:ty)? = $written:ident) => {
        fn $name($($x: $of),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            {
                use crate::{processor::{Level, level}, sixteen::{Avx2, Avx512}};
                #[target_feature(enable = "avx2,fma")]
                fn with_avx2($($x: $of),*) $(-> $result)? {
                    // SAFETY: the features are there.
                    unsafe { $written::<Avx2>($($x),*) }
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn with_avx512($($x: $of),*) $(-> $result)? {
                    // SAFETY: the features are there.
                    unsafe { $written::<Avx512>($($x),*) }
                }
                match level() {
                    // SAFETY: the level is no higher than the processor's.
                    Level::Amx | Level::Vnni => return unsafe { with_avx512($($x),*) },
                    // SAFETY: as above.
                    Level::Avx2 => return unsafe { with_avx2($($x),*) },
                    Level::Generic => {}
                }
            }
            // SAFETY: for any processor.
            unsafe { $written::<crate::sixteen::Plain>($($x),*) }
        }
    };
}
pub(super) use at_level;

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
        (true, true) if amx() => Level::Amx,
        (true, true) => Level::Vnni,
        (true, false) => Level::Avx2,
        (false, _) => Level::Generic,
    }
}

/// Whether the processor has AMX for bytes and bfloat16 (leaf 7 of `cpuid`: bits 22, 24 and 25 of `edx`), and the system lets this process use it: Linux
/// keeps room for the tiles of those alone who ask.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn amx() -> bool {
    static ALLOWED: OnceLock<bool> = OnceLock::new();
    *ALLOWED.get_or_init(|| {
        // From asm/prctl.h and, for the state that is asked for, the processor's own number of it.
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const TILES: libc::c_long = 18;
        const ALL: u32 = 0b1101 << 22;
        let has_leaf = std::arch::x86_64::__get_cpuid_max(0).0 >= 7;
        has_leaf
            && std::arch::x86_64::__cpuid_count(7, 0).edx & ALL == ALL
            // SAFETY: it changes nothing but what the process may use.
            && unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILES) } == 0
    })
}

/// Whether AMX may be used: of other systems it is not known.
#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn amx() -> bool {
    false
}

/// All that this processor can do.
#[cfg(not(target_arch = "x86_64"))]
pub fn found() -> Level {
    Level::Generic
}

/// Whether ONNX Runtime's products of few bits have kernels for the vector instructions of this processor: AVX2 and later, or NEON.
pub fn has_vector_kernels() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx2")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        cfg!(target_arch = "aarch64")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_known_names() {
        assert_eq!(limited(None).ok(), Some(found()));
        assert_eq!(limited(Some("generic")).ok(), Some(Level::Generic));
        assert_eq!(limited(Some("avx2")).ok(), Some(found().min(Level::Avx2)));
        let error = limited(Some("avx3")).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(
            error.starts_with(
                "T5GEMMA_MAX_CPU_ISA: expected generic, avx2, avx512_vnni or avx512_amx, found \"avx3\"; "
            ),
            "{error}"
        );
    }
}
