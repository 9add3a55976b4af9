//! The instruction level of the kernels. `T5GEMMA_MAX_CPU_ISA=avx512_vnni`, `=avx2` or `=generic` keeps them from using
//! newer instructions, to compare levels or to get the same numbers on several machines. At `generic`, ONNX Runtime
//! runs every operator that it has vector kernels for.

use std::sync::OnceLock;

use crate::error::Error;

/// Instruction sets that kernels are compiled for; each includes those before it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum Level {
    /// Any processor.
    #[default]
    Generic,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 (F, BW, DQ, VL) with VNNI.
    Vnni,
    /// AVX-512 with VNNI, and AMX for int8 and bfloat16.
    Amx,
}

/// The levels by their names in the environment variable.
const LEVELS: [(&str, Level); 4] =
    [("generic", Level::Generic), ("avx2", Level::Avx2), ("avx512_vnni", Level::Vnni), ("avx512_amx", Level::Amx)];

/// The variable that names the highest level to use.
const VARIABLE: &str = "T5GEMMA_MAX_CPU_ISA";

/// The level in use: the processor's, unless the environment variable limits it.
pub fn level() -> Level {
    #[cfg(test)]
    if let Some(level) = testing::level() {
        return level;
    }
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| limited_by_environment().unwrap_or(supported()))
}

/// The name of the level in use: `avx512_amx`, `avx512_vnni`, `avx2` or `generic`. Fails if the environment variable
/// `T5GEMMA_MAX_CPU_ISA` is set to anything else.
pub fn instructions() -> Result<&'static str, Error> {
    Ok(name(limited_by_environment()?))
}

fn name(level: Level) -> &'static str {
    LEVELS.iter().find(|(_, named)| *named == level).map_or("generic", |(name, _)| name)
}

fn limited_by_environment() -> Result<Level, Error> {
    limited(std::env::var(VARIABLE).ok().as_deref())
}

/// The processor's level, at most that of this name.
fn limited(limit: Option<&str>) -> Result<Level, Error> {
    let Some(limit) = limit else { return Ok(supported()) };
    match LEVELS.iter().find(|(name, _)| *name == limit) {
        Some(&(_, level)) => Ok(level.min(supported())),
        None => Err(Error::InstructionSet { variable: VARIABLE, found: limit.to_string() }),
    }
}

/// Proof that the processor has AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Avx2Token(());

#[cfg(target_arch = "x86_64")]
impl Avx2Token {
    /// The proof, if the level in use includes AVX2.
    pub fn new() -> Option<Avx2Token> {
        (level() >= Level::Avx2).then_some(Avx2Token(()))
    }
}

/// Proof that the processor has AMX and that this process may use it.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AmxToken(());

#[cfg(target_arch = "x86_64")]
impl AmxToken {
    /// The proof, if the level in use includes AMX.
    pub fn new() -> Option<AmxToken> {
        (level() >= Level::Amx).then_some(AmxToken(()))
    }
}

/// Defines a function over slices which calls `$generic::<S>`, written for any [`F32x16`](crate::simd::F32x16),
/// compiled for the level in use.
///
/// # Safety
/// `$generic` must be safe to call on every processor that has the instructions of `S`.
macro_rules! dispatch {
    ($visible:vis fn $name:ident($($x:ident: $of:ty),*) $(-> $result:ty)? = $generic:ident) => {
        $visible fn $name($($x: $of),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            {
                use crate::{isa::{Level, level}, simd::{Avx2, Avx512}};
                #[target_feature(enable = "avx2,fma")]
                fn with_avx2($($x: $of),*) $(-> $result)? {
                    // SAFETY: this function is compiled for AVX2 and FMA.
                    unsafe { $generic::<Avx2>($($x),*) }
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn with_avx512($($x: $of),*) $(-> $result)? {
                    // SAFETY: this function is compiled for AVX-512.
                    unsafe { $generic::<Avx512>($($x),*) }
                }
                match level() {
                    // SAFETY: the processor supports the level in use.
                    Level::Amx | Level::Vnni => return unsafe { with_avx512($($x),*) },
                    // SAFETY: the processor supports the level in use.
                    Level::Avx2 => return unsafe { with_avx2($($x),*) },
                    Level::Generic => {}
                }
            }
            // SAFETY: `Portable` runs on any processor.
            unsafe { $generic::<crate::simd::Portable>($($x),*) }
        }
    };
}
pub(crate) use dispatch;

/// The processor's level.
#[cfg(target_arch = "x86_64")]
pub fn supported() -> Level {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni");
    match (avx2, avx512) {
        (true, true) if has_amx() => Level::Amx,
        (true, true) => Level::Vnni,
        (true, false) => Level::Avx2,
        (false, _) => Level::Generic,
    }
}

/// Whether the processor has AMX for int8 and bfloat16 (leaf 7 of `cpuid`: bits 22, 24 and 25 of `edx`) and the system
/// lets this process use it: Linux saves tiles only for processes that asked for them.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn has_amx() -> bool {
    static ALLOWED: OnceLock<bool> = OnceLock::new();
    *ALLOWED.get_or_init(|| {
        // From asm/prctl.h; the number of the state component, XTILEDATA, is the processor's.
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XTILEDATA: libc::c_long = 18;
        const AMX_BITS: u32 = 0b1101 << 22;
        let has_leaf = std::arch::x86_64::__get_cpuid_max(0).0 >= 7;
        has_leaf
            && std::arch::x86_64::__cpuid_count(7, 0).edx & AMX_BITS == AMX_BITS
            // SAFETY: the call only changes what this process may use.
            && unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) } == 0
    })
}

/// AMX is used on Linux alone.
#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn has_amx() -> bool {
    false
}

/// The processor's level.
#[cfg(not(target_arch = "x86_64"))]
pub fn supported() -> Level {
    Level::Generic
}

/// Whether ONNX Runtime has vector kernels for this processor in its quantized matrix multiplication: AVX2 and later,
/// or NEON.
pub fn onnxruntime_has_vector_kernels() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx2")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        cfg!(target_arch = "aarch64")
    }
}

/// Runs a test at every instruction level of this processor.
#[cfg(test)]
pub mod testing {
    use std::cell::Cell;
    use std::io::Write;

    use super::{LEVELS, Level, VARIABLE, limited_by_environment, supported};

    thread_local! {
        static LEVEL: Cell<Option<Level>> = const { Cell::new(None) };
    }

    /// The level that a test runs at on this thread.
    pub fn level() -> Option<Level> {
        LEVEL.get()
    }

    /// Calls `test` once for each level of the processor from `lowest` on, with [`level`](super::level) set to it on
    /// this thread; with `T5GEMMA_MAX_CPU_ISA` set, at the level of that name alone.
    ///
    /// Writes to stderr which levels ran and which the processor lacks, past the capture of passing tests: a test that
    /// had nothing to run must not look like one that passed.
    pub fn at_each_level(lowest: Level, test: impl Fn(Level)) {
        let only = std::env::var(VARIABLE).is_ok().then(|| limited_by_environment().expect("the name of a level"));
        let mut outcomes = Vec::new();
        for (name, level) in LEVELS.into_iter().filter(|(_, level)| *level >= lowest) {
            let outcome = if level > supported() {
                "not on this processor"
            } else if only.is_some_and(|only| only != level) {
                "left out"
            } else {
                LEVEL.set(Some(level));
                test(level);
                LEVEL.set(None);
                "run"
            };
            outcomes.push(format!("level {name}: {outcome}"));
        }
        let thread = std::thread::current();
        let report = format!("{}: {}\n", thread.name().unwrap_or("a test"), outcomes.join(", "));
        std::io::stderr().write_all(report.as_bytes()).expect("stderr can be written");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_known_names() {
        assert_eq!(limited(None).ok(), Some(supported()));
        assert_eq!(limited(Some("generic")).ok(), Some(Level::Generic));
        assert_eq!(limited(Some("avx2")).ok(), Some(supported().min(Level::Avx2)));
        let error = limited(Some("avx3")).err().map(|error| error.to_string()).unwrap_or_default();
        let expected = "T5GEMMA_MAX_CPU_ISA: expected generic, avx2, avx512_vnni or avx512_amx, found \"avx3\"; ";
        assert!(error.starts_with(expected), "{error}");
    }

    #[test]
    fn a_test_at_each_level_sees_that_level() {
        testing::at_each_level(Level::Generic, |expected| {
            assert_eq!(level(), expected);
        });
        assert_eq!(testing::level(), None);
    }
}
