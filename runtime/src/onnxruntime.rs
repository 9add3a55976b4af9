//! Finding and loading the ONNX Runtime library, once per process. A file of its own because the library is a thing that
//! users install: every way in which it can be absent or wrong ends in an error that says what to do, before any other
//! call into `ort`, which panics when it has to load the library by itself.

use std::env;
use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use ort::environment::{Environment, GlobalThreadPoolOptions};
use ort::ep::ExecutionProvider;

use crate::error::Error;
use crate::log;
use crate::telemetry;

/// The environment variable that names the library.
pub const LIBRARY_VARIABLE: &str = "ORT_DYLIB_PATH";

/// Why a place was looked at that the caller named.
const EXPLICIT: &str = "the library option";

/// What a library must be.
const NEEDED: &str = "ONNX Runtime 1.31 or newer";

/// The version to install: the newest with both a CPU and a GPU package.
const PINNED: &str = "1.31.1";

/// Where the source tree's `make onnxruntime` puts the library.
const FETCHED: &str = ".cache/onnxruntime/lib";

/// The library in use by this process; a failed attempt leaves nothing behind and may be repeated.
static LOADED: Mutex<Option<Loaded>> = Mutex::new(None);

/// A folder that a library over this one lies in.
static BESIDE: OnceLock<PathBuf> = OnceLock::new();

/// Has the library looked for in `folder` too, before the folder of the program: for shared libraries over this one. Only
/// the first call counts.
pub fn also_search(folder: PathBuf) {
    let _ = BESIDE.set(folder);
}

/// The library in use, with what all models of the process share.
#[derive(Clone)]
pub(crate) struct Loaded {
    pub environment: Environment,
    path: PathBuf,
    /// How many threads the environment's pool was made of; as many as the machine has cores where it was not said.
    pub threads: Option<usize>,
}

/// One place where the library was looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Why there: `ORT_DYLIB_PATH`, `beside the executable`, ….
    pub why: &'static str,
    /// The file, or the folder where no such file is.
    pub path: PathBuf,
    /// What is there.
    pub found: Found,
}

/// What is at a [`Place`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// No library.
    Nothing,
    /// A file that does not load as ONNX Runtime 1.x.
    Unusable,
    /// ONNX Runtime 1.`minor`, older than this program can use.
    TooOld {
        /// The second number of its version.
        minor: u32,
    },
    /// ONNX Runtime 1.`minor`, which this program can use.
    Usable {
        /// The second number of its version.
        minor: u32,
    },
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Found::Nothing => f.write_str("nothing"),
            Found::Unusable => f.write_str("a file that does not load as ONNX Runtime 1.x"),
            Found::TooOld { minor } => write!(f, "version 1.{minor}, which is too old"),
            Found::Usable { minor } => write!(f, "version 1.{minor}"),
        }
    }
}

/// What a `doctor` command shows of the library.
#[derive(Debug)]
pub struct Report {
    /// Every place that was looked at, in order of precedence.
    pub places: Vec<Place>,
    /// The library in use.
    pub library: Result<LibraryInfo, Error>,
}

/// The library in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LibraryInfo {
    /// The file.
    pub path: PathBuf,
    /// The library's description of its own build.
    pub build: String,
    /// The execution providers compiled in, whether or not their hardware is present.
    pub providers: Vec<&'static str>,
}

/// Looks everywhere, loads what [`open`](crate::Model::open) would load, and tells.
pub fn report(library: Option<&Path>) -> Report {
    let places = places(library).map(|look| look()).collect();
    let library = initialise(library, None).map(|Loaded { path, .. }| {
        let build = ort::info().to_string();
        LibraryInfo { path, build, providers: providers() }
    });
    Report { places, library }
}

/// Loads the library on first use, with a pool of so many threads for all sessions: threads of their own would wait for work
/// on each other's cores. Later calls return what is loaded.
///
/// # Errors
/// No usable library, or a `library` other than the one this process has loaded already.
pub(crate) fn initialise(library: Option<&Path>, threads: Option<usize>) -> Result<Loaded, Error> {
    let mut slot = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(loaded) = slot.as_ref() {
        return match library.map(absolute) {
            Some(path) if path != loaded.path => Err(Error::Library {
                problem: format!(
                    "{} cannot be loaded: this process already uses {}",
                    path.display(),
                    loaded.path.display()
                ),
                remedy: "name the same library in every call, or none".into(),
            }),
            _ => Ok(loaded.clone()),
        };
    }

    let Place { why, path, .. } = choose(places(library).map(|look| look()))?;
    let unusable = |error: &dyn fmt::Display| Error::Library {
        problem: one_line(&format!("{} ({why}): {error}", path.display())),
        remedy: remedy(),
    };
    let logger = log::logger();
    telemetry::disable();
    let mut builder = ort::init_from(&path)
        .map_err(|error| match &error {
            // The loader's reason, such as a library it needs in turn, is behind the first message.
            ort::LoadDynamicError::Dlopen { error, .. } => match std::error::Error::source(error) {
                Some(reason) => unusable(reason),
                None => unusable(error),
            },
            _ => unusable(&error),
        })?
        .with_name("t5gemma")
        .with_telemetry(false);
    let pool = GlobalThreadPoolOptions::default().with_intra_threads(threads.unwrap_or(0));
    builder = builder.with_global_thread_pool(pool.map_err(|error| unusable(&error))?);
    if let Some((_, logger)) = &logger {
        builder = builder.with_logger(logger.clone());
    }
    let environment = builder.build().map_err(|error| unusable(&error))?;
    if let Some((level, _)) = logger {
        environment.set_log_level(level);
    }
    Ok(slot.insert(Loaded { environment, path, threads }).clone())
}

/// The first usable library. A library that the user named is the one meant: if it is unusable nothing else is taken.
fn choose(places: impl IntoIterator<Item = Place>) -> Result<Place, Error> {
    let mut looked = Vec::new();
    for place in places {
        let named = place.why == EXPLICIT || place.why == LIBRARY_VARIABLE;
        match place.found {
            Found::Usable { .. } => return Ok(place),
            // Loading it will fail with the loader's own words, which are worth more than ours.
            Found::Unusable if named => return Ok(place),
            _ if named => {
                let Place { why, path, found } = &place;
                let problem = format!("{} ({why}): expected {NEEDED}, found {found}", path.display());
                return Err(Error::Library { problem, remedy: remedy() });
            }
            Found::Nothing => looked.push(format!("{} ({})", place.path.display(), place.why)),
            _ => looked.push(format!("{} ({}: {})", place.path.display(), place.why, place.found)),
        }
    }
    Err(Error::Library { problem: format!("expected {NEEDED}, found none at {}", looked.join(", ")), remedy: remedy() })
}

fn remedy() -> String {
    format!("run `make onnxruntime` in the source tree, or {}", remedy_for("onnxruntime"))
}

/// How to get the library of a package.
pub(crate) fn remedy_for(package: &str) -> String {
    format!(
        "`pip download --no-deps --only-binary=:all: {package}=={PINNED}`, \
         unzip it and set {LIBRARY_VARIABLE} to its onnxruntime/capi/{}onnxruntime{}.{PINNED}",
        env::consts::DLL_PREFIX,
        env::consts::DLL_SUFFIX
    )
}

/// The folder of the library in use.
pub(crate) fn folder() -> PathBuf {
    let loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let path = loaded.as_ref().map(|loaded| loaded.path.clone()).unwrap_or_default();
    let path = path.canonicalize().unwrap_or(path);
    path.parent().map(Path::to_path_buf).unwrap_or_default()
}

/// What tells the library in use from others.
pub(crate) fn version() -> String {
    one_line(ort::info())
}

/// The places to look at, in order; each is looked at when called, because looking loads the library for a moment.
fn places(library: Option<&Path>) -> impl Iterator<Item = Box<dyn FnOnce() -> Place>> {
    let named = |why, path: PathBuf| -> Box<dyn FnOnce() -> Place> {
        Box::new(move || {
            let path = absolute(&path);
            let found = if path.exists() { probe(&path) } else { Found::Nothing };
            Place { why, path, found }
        })
    };
    let folder = |why, folder: PathBuf| -> Box<dyn FnOnce() -> Place> {
        Box::new(move || match library_in(&folder) {
            Some(path) => Place { why, found: probe(&path), path },
            None => Place { why, path: folder, found: Found::Nothing },
        })
    };

    let variable = env::var_os(LIBRARY_VARIABLE).filter(|path| !path.is_empty());
    let beside = env::current_exe().ok().and_then(|executable| executable.parent().map(Path::to_path_buf));
    let fetched = env::current_dir().ok().map(|current| {
        let above = current.ancestors().map(|above| above.join(FETCHED)).find(|fetched| fetched.is_dir());
        above.unwrap_or_else(|| current.join(FETCHED))
    });
    let places = [
        library.map(|path| named(EXPLICIT, path.to_path_buf())),
        variable.map(|path| named(LIBRARY_VARIABLE, path.into())),
        BESIDE.get().map(|beside| folder("beside libt5gemma", beside.clone())),
        beside.map(|beside| folder("beside the executable", beside)),
        fetched.map(|fetched| folder("the source tree's copy", fetched)),
        data_folder().map(|data| folder("the user's copy", data.join("t5gemma"))),
    ];
    places.into_iter().flatten()
}

/// `$XDG_DATA_HOME`, or `~/.local/share`.
fn data_folder() -> Option<PathBuf> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("XDG_DATA_HOME").or_else(|| set("HOME").map(|home| home.join(".local/share")))
}

/// The library's file in a folder: the plain name if it is there, else the greatest with a version in it, because Python
/// packages hold only the latter.
fn library_in(folder: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).ok()?;
    let plain = format!("{}onnxruntime{}", env::consts::DLL_PREFIX, env::consts::DLL_SUFFIX);
    let named = entries.filter_map(|entry| Some(entry.ok()?.file_name())).filter(|name| is_library(name));
    let name = named.max_by_key(|name| (name.to_str() == Some(plain.as_str()), name.clone()))?;
    Some(folder.join(name))
}

/// Whether a file is named like `libonnxruntime.so`, `libonnxruntime.so.1.31.1` or `libonnxruntime.1.31.1.dylib`, and
/// not like the provider libraries that lie beside it.
fn is_library(name: &OsStr) -> bool {
    let stem = format!("{}onnxruntime.", env::consts::DLL_PREFIX);
    name.to_str()
        .and_then(|name| name.strip_prefix(&stem))
        .is_some_and(|rest| rest.split('.').any(|part| part == env::consts::DLL_EXTENSION))
}

fn probe(path: &Path) -> Found {
    match ort::util::probe(path) {
        None => Found::Unusable,
        Some(minor) if minor < ort::MINOR_VERSION => Found::TooOld { minor },
        Some(minor) => Found::Usable { minor },
    }
}

/// The path from the root, because `ort` would look a relative one up beside the executable first.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}

/// Two lines make a library error; a loader's message may hold more.
fn one_line(message: &str) -> String {
    message.lines().collect::<Vec<_>>().join("; ")
}

/// The execution providers that a report mentions, in order of interest.
const PROVIDERS: [&str; 4] =
    ["CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"];

/// A provider by its place in [`PROVIDERS`], to ask for it by name without `ort`'s feature of that provider.
struct Named<const INDEX: usize>;

impl<const INDEX: usize> ExecutionProvider for Named<INDEX> {
    const NAME: &'static str = PROVIDERS[INDEX];

    fn register(&self, _: &mut ort::session::builder::SessionBuilder) -> ort::Result<()> {
        Err(ort::Error::new("a provider that is only asked for"))
    }
}

/// The providers compiled into the loaded library.
fn providers() -> Vec<&'static str> {
    let available = [
        Named::<0>::is_available(),
        Named::<1>::is_available(),
        Named::<2>::is_available(),
        Named::<3>::is_available(),
    ];
    PROVIDERS.into_iter().zip(available).filter(|(_, there)| matches!(there, Ok(true))).map(|(name, _)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(why: &'static str, found: Found) -> Place {
        Place { why, path: PathBuf::from("/there"), found }
    }

    #[test]
    fn a_library_that_was_named_is_not_passed_over() {
        let usable = || place("the user's copy", Found::Usable { minor: ort::MINOR_VERSION });
        for why in [EXPLICIT, LIBRARY_VARIABLE] {
            for found in [Found::Nothing, Found::TooOld { minor: 20 }] {
                let error = choose([place(why, found), usable()]).expect_err("named and unusable");
                assert!(error.to_string().contains(why), "{error}");
            }
            let chosen = choose([place(why, Found::Unusable), usable()]).expect("left to the loader to refuse");
            assert_eq!(chosen.why, why);
        }
        assert!(choose([place("beside the executable", Found::TooOld { minor: 20 }), usable()]).is_ok());
    }

    #[test]
    fn a_missing_library_is_told_in_two_lines() {
        let error = choose([place("beside the executable", Found::TooOld { minor: 20 })]).expect_err("none usable");
        let text = error.to_string();
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(text.contains("1.20") && text.contains("make onnxruntime"), "{text}");
        assert!(NEEDED.contains(&format!("1.{} ", ort::MINOR_VERSION)));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn provider_libraries_are_not_the_library() {
        let names =
            ["libonnxruntime.so", "libonnxruntime.so.1.31.1", "libonnxruntime_providers_shared.so", "onnxruntime.so"];
        assert_eq!(names.map(|name| is_library(OsStr::new(name))), [true, true, false, false]);
    }
}
