//! Checkpoints and adapters that the command line names by their repository on the Hugging Face hub.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use t5gemma_exporter::Repository;
use t5gemma_exporter::hub::{HubSettings, Wanted, download};

use crate::flags::Usage;
use crate::progress::Bar;
use crate::stderr::note;

/// The folder of a checkpoint or adapter: the path itself, or where the files of the repository are that it names.
pub fn folder(path: &Path, wanted: Wanted<'_>, bar: &Bar) -> Result<PathBuf> {
    // The names of repositories are ASCII.
    let Some(name) = path.to_str() else { return Ok(path.to_path_buf()) };
    let repository = match Repository::unless_local(name) {
        Ok(Some(repository)) => repository,
        Ok(None) => {
            if matches!(Repository::parse(name), Ok(Some(_))) {
                bar.note(&format!("{name} is taken for a local folder; hf://{name} is the repository on the hub"));
            }
            return Ok(path.to_path_buf());
        }
        Err(error) => bail!(Usage(error.to_string())),
    };
    let settings = HubSettings::from_env()?;
    let downloaded = download(&repository, wanted, &settings, bar);
    bar.finish();
    let downloaded = downloaded?;
    if let Some(warning) = &downloaded.warning {
        note!("t5gemma-export: warning: {warning}");
    }
    let (commit, folder) = (&downloaded.commit, downloaded.folder.display());
    bar.note(&match downloaded.files {
        0 => format!("{name}: commit {commit}, in the cache: {folder}"),
        count => format!("{name}: commit {commit}, {count} files of {} bytes downloaded to {folder}", downloaded.bytes),
    });
    Ok(downloaded.folder)
}
