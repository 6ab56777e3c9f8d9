//! Checking every byte of a checkpoint.

use crate::checksum::{self, Checksum};
use crate::error::{FormatError, Result};
use crate::manifest::FileEntry;
use crate::parallel;
use crate::read::Checkpoint;
use crate::save::entry_name;
use crate::{Dtype, names};
use safetensors::SafeTensors;

/// What was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Files.
    pub files: usize,
    /// Tensors.
    pub tensors: u64,
    /// Bytes of all files.
    pub bytes: u64,
}

impl Checkpoint {
    /// Reads all files: each byte against the checksum of its file and of its box, each header
    /// against the index. (Coverage, names and sizes were checked on opening.)
    ///
    /// # Errors
    /// [`FormatError::Damaged`] or [`FormatError::Refused`], naming the first file that is wrong.
    pub fn verify(&self) -> Result<Verified> {
        let files: Vec<_> = self.manifest().files.iter().collect();
        parallel::for_each(&files, |(name, entry)| self.verify_file(name, entry))?;
        Ok(Verified {
            files: files.len(),
            tensors: self.manifest().coverage.tensors,
            bytes: files.iter().map(|(_, entry)| entry.size).sum(),
        })
    }

    /// One pass over a file: the checksums of the boxes and of what lies between them combine to
    /// the file's.
    fn verify_file(&self, name: &str, entry: &FileEntry) -> Result<()> {
        let path = self.path().join(name);
        let bytes = self.map(name)?.bytes();
        let boxes = self.index().boxes_of(name);
        let mut whole = Checksum::default();
        let mut at = 0;
        for (tensor, _, stored) in &boxes {
            let [start, end] = stored.range.map(|byte| byte as usize);
            let (Some(gap), Some(content)) = (bytes.get(at..start), bytes.get(start..end)) else {
                return Err(FormatError::damaged(&path, "it is shorter than recorded"));
            };
            let found = Checksum::of(content);
            let what = format!("bytes {start}..{end}, of {tensor},");
            checksum::expect(&path, &what, found, stored.checksum)?;
            whole = whole.append(gap).then(found, content.len() as u64);
            at = end;
        }
        let whole = whole.append(bytes.get(at..).unwrap_or_default());
        checksum::expect(&path, "it", whole, entry.checksum)?;
        if name == names::INDEX || name == names::STATE {
            return Ok(());
        }
        self.verify_header(name, bytes)
    }

    /// The header of a tensor file says of each box what the index says.
    fn verify_header(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path().join(name);
        let (header_size, header) = SafeTensors::read_metadata(bytes).map_err(|error| {
            FormatError::refused(&path, format!("its header is wrong: {error}"))
        })?;
        for (tensor, entry, stored) in self.index().boxes_of(name) {
            let in_file = entry_name(tensor, &entry.shape, &stored.region);
            let start = 8 + header_size as u64;
            let agrees = header.info(&in_file).is_some_and(|info| {
                let shape = info.shape.iter().map(|size| *size as u64);
                Dtype::from_safetensors(info.dtype) == Some(entry.dtype)
                    && shape.eq(stored.region.lengths.iter().copied())
                    && start + info.data_offsets.0 as u64 == stored.range[0]
                    && start + info.data_offsets.1 as u64 == stored.range[1]
            });
            if !agrees {
                return Err(FormatError::refused(
                    &path,
                    format!("its header does not say of {in_file} what the index says"),
                ));
            }
        }
        Ok(())
    }
}
