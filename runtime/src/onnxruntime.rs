//! Finds and loads the ONNX Runtime library, once per process. Users install the library, so every way in which it can
//! be missing or wrong gives an error that says what to do, before any other call into `ort`, which panics if it has to
//! load the library itself.

use std::env;
use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use ort::environment::{Environment, GlobalThreadPoolOptions};
use ort::ep::ExecutionProvider;

use crate::error::Error;
use crate::fork::Origin;
use crate::log;
use crate::telemetry;

/// The environment variable that names the library.
pub const LIBRARY_VARIABLE: &str = "ORT_DYLIB_PATH";

/// The reason for searching at the caller's path.
const EXPLICIT: &str = "the library option";

/// The required version.
const NEEDED: &str = "ONNX Runtime 1.31 or newer";

/// The version to install: the newest with both a CPU and a GPU package.
const PINNED: &str = "1.31.1";

/// Where `make onnxruntime` of the source tree puts the library.
const FETCHED: &str = ".cache/onnxruntime/lib";

/// The library that this process uses; a failed attempt leaves nothing behind and can be retried.
static LOADED: Mutex<Option<Loaded>> = Mutex::new(None);

/// See [`also_search`].
static BESIDE: OnceLock<PathBuf> = OnceLock::new();

/// Adds `folder` to the search path, before the folder of the program: for shared libraries built on this crate. Only
/// the first call counts.
pub fn also_search(folder: PathBuf) {
    let _ = BESIDE.set(folder);
}

/// The library in use, with the state that all models of the process share.
#[derive(Clone)]
pub(crate) struct Loaded {
    pub environment: Environment,
    path: PathBuf,
    /// The number of threads of the environment's pool; `None` for one for each core.
    pub threads: Option<usize>,
    /// When the threads were started.
    pub origin: Origin,
}

/// A place where the library was searched for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SearchedPath {
    /// Why it was searched: `ORT_DYLIB_PATH`, `beside the executable`, ….
    pub why: &'static str,
    /// The file, or the folder if there is no such file in it.
    pub path: PathBuf,
    /// What was found there.
    pub found: Found,
}

/// What was found at a [`SearchedPath`].
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

/// A report on the library, as `t5gemma doctor` shows it.
#[derive(Debug)]
pub struct Report {
    /// Every place that was searched, in order of precedence.
    pub searched: Vec<SearchedPath>,
    /// The library in use.
    pub library: Result<LibraryInfo, Error>,
}

/// The library in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LibraryInfo {
    /// The file.
    pub path: PathBuf,
    /// The library's build information.
    pub build: String,
    /// The execution providers that are compiled in, whether or not their hardware is present.
    pub providers: Vec<&'static str>,
}

/// Searches everywhere, and loads the library that [`Model::open`](crate::Model::open) would load.
pub fn report(library: Option<&Path>) -> Report {
    let searched = places(library).map(|look| look()).collect();
    let library = initialise(library, None).map(|Loaded { path, .. }| {
        let build = ort::info().to_string();
        LibraryInfo { path, build, providers: providers() }
    });
    Report { searched, library }
}

/// Loads the library on first use, with one thread pool for all sessions: separate pools would spin on each other's
/// cores. Later calls return the loaded library.
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

    let SearchedPath { why, path, .. } = choose(places(library).map(|look| look()))?;
    let unusable = |error: &dyn fmt::Display| Error::Library {
        problem: one_line(&format!("{} ({why}): {error}", path.display())),
        remedy: remedy(),
    };
    let logger = log::logger();
    telemetry::disable();
    let mut builder = ort::init_from(&path)
        .map_err(|error| match &error {
            // The loader's reason, such as a library that it needs in turn, is the source of the error.
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
    Ok(slot.insert(Loaded { environment, path, threads, origin: Origin::now() }).clone())
}

/// The first usable library. If the user named a library, no other is used in its place.
fn choose(places: impl IntoIterator<Item = SearchedPath>) -> Result<SearchedPath, Error> {
    let mut looked = Vec::new();
    for place in places {
        let named = place.why == EXPLICIT || place.why == LIBRARY_VARIABLE;
        match place.found {
            Found::Usable { .. } => return Ok(place),
            // Loading it will fail with the loader's message, which says more than ours.
            Found::Unusable if named => return Ok(place),
            _ if named => {
                let SearchedPath { why, path, found } = &place;
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

/// How to install the library of a package.
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

/// Identifies the library in use.
pub(crate) fn version() -> String {
    one_line(ort::info())
}

/// The places to search, in order. Each is searched when called, because that loads the library for a moment.
fn places(library: Option<&Path>) -> impl Iterator<Item = Box<dyn FnOnce() -> SearchedPath>> {
    let named = |why, path: PathBuf| -> Box<dyn FnOnce() -> SearchedPath> {
        Box::new(move || {
            let path = absolute(&path);
            let found = if path.exists() { probe(&path) } else { Found::Nothing };
            SearchedPath { why, path, found }
        })
    };
    let folder = |why, folder: PathBuf| -> Box<dyn FnOnce() -> SearchedPath> {
        Box::new(move || match library_in(&folder) {
            Some(path) => SearchedPath { why, found: probe(&path), path },
            None => SearchedPath { why, path: folder, found: Found::Nothing },
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

/// The library's file in a folder: the one without a version in its name, or the greatest version, because Python
/// packages contain only the latter.
fn library_in(folder: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).ok()?;
    let plain = format!("{}onnxruntime{}", env::consts::DLL_PREFIX, env::consts::DLL_SUFFIX);
    let named = entries.filter_map(|entry| Some(entry.ok()?.file_name())).filter(|name| is_library(name));
    let name = named.max_by_key(|name| (name.to_str() == Some(plain.as_str()), name.clone()))?;
    Some(folder.join(name))
}

/// Whether a file is named like `libonnxruntime.so`, `libonnxruntime.so.1.31.1` or `libonnxruntime.1.31.1.dylib`, and
/// not like the provider libraries beside it.
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

/// The absolute path, because `ort` would search for a relative one beside the executable first.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}

/// An error is one line; a loader's message may have more.
fn one_line(message: &str) -> String {
    message.lines().collect::<Vec<_>>().join("; ")
}

/// The execution providers of a report, in order of interest.
const PROVIDERS: [&str; 4] =
    ["CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"];

/// A provider by its index in [`PROVIDERS`], to query it by name without `ort`'s feature for that provider.
struct Named<const INDEX: usize>;

impl<const INDEX: usize> ExecutionProvider for Named<INDEX> {
    const NAME: &'static str = PROVIDERS[INDEX];

    fn register(&self, _: &mut ort::session::builder::SessionBuilder) -> ort::Result<()> {
        Err(ort::Error::new("a provider that is only queried"))
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

    fn place(why: &'static str, found: Found) -> SearchedPath {
        SearchedPath { why, path: PathBuf::from("/there"), found }
    }

    #[test]
    fn a_library_that_was_named_is_not_replaced_by_another() {
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
    fn a_missing_library_is_one_line_with_the_remedy() {
        let error = choose([place("beside the executable", Found::TooOld { minor: 20 })]).expect_err("none usable");
        let text = error.to_string();
        assert_eq!(text.lines().count(), 1, "{text}");
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
