//! The tokenizer of the new checkpoint: that of either source, byte for byte.

use std::io::Read;
use std::path::Path;

use super::Side;
use crate::checkpoint::{COMPANIONS, GENERATION_CONFIG, SENTENCEPIECE_FILE};
use crate::error::{Error, Result};
use crate::files;

/// The files that decide what the ids of tokens mean, in which both sources must agree.
const VOCABULARIES: [&str; 2] = ["tokenizer.json", SENTENCEPIECE_FILE];

/// The files of the tokenizer and chat template in the folder of the encoder or of the decoder, and their content.
///
/// # Errors
/// Different tokenizers without a choice between them, or a file that cannot be read.
pub fn files(folders: [&Path; 2], from: Option<Side>) -> Result<Vec<(&'static str, Vec<u8>)>> {
    if from.is_none() && folders[0] != folders[1] {
        for name in VOCABULARIES {
            let [of_encoder, of_decoder] = folders.map(|folder| read(folder, name));
            let (of_encoder, of_decoder) = (of_encoder?, of_decoder?);
            if of_encoder != of_decoder {
                let size = |bytes: Option<Vec<u8>>| bytes.map(|bytes| bytes.len() as u64);
                return Err(Error::TokenizersDiffer {
                    file: name.to_string(),
                    encoder: size(of_encoder),
                    decoder: size(of_decoder),
                });
            }
        }
    }
    let folder = if from == Some(Side::Encoder) { folders[0] } else { folders[1] };
    let names = COMPANIONS.iter().filter(|name| **name != GENERATION_CONFIG);
    names.filter_map(|name| Some(read(folder, name).transpose()?.map(|bytes| (*name, bytes)))).collect()
}

/// The content of a file, if there is one.
pub fn read(folder: &Path, name: &str) -> Result<Option<Vec<u8>>> {
    let path = folder.join(name);
    if !files::entry_exists(&path) {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    files::open(&path)?.read_to_end(&mut bytes).map_err(Error::io(&path, "cannot be read"))?;
    // A pointer to a file or an error page instead of it; an empty template is one.
    match files::identify(&bytes).filter(|_| !bytes.is_empty()) {
        Some(found) => Err(Error::invalid(path.display(), "a file of the tokenizer", found)),
        None => Ok(Some(bytes)),
    }
}
