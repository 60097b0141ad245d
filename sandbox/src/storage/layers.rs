//! Several read-only images as one disk.

use super::*;

/// Opens EROFS images, topmost first, as one disk with one part each.
///
/// EROFS images are whole blocks long; a file of another length would shift those behind it, because
/// the disk takes whole sectors of each, so it is refused.
pub(super) fn open(images: &[PathBuf]) -> Result<PreparedDisk, StorageError> {
    let mut files = Vec::new();
    let mut sizes = Vec::new();
    for path in images {
        let mut file = File::open(path).map_err(|error| StorageError::Disk(path.clone(), error))?;
        let size = size_of_file(&mut file, path)?;
        if size == 0 || size % SECTOR != 0 {
            return Err(StorageError::Root(format!(
                "layer {} is {size} bytes long, not whole sectors",
                path.display()
            )));
        }
        sizes.push(size);
        files.push(file.into());
    }
    Ok(PreparedDisk {
        files,
        read_only: true,
        parts: parts(&sizes),
    })
}

/// Where each image begins and how long it is.
pub(super) fn parts(sizes: &[u64]) -> Vec<Part> {
    let mut offset = 0;
    sizes
        .iter()
        .map(|size| {
            let part = Part {
                offset,
                length: *size,
                kind: "erofs".into(),
                options: vec!["ro".into()],
            };
            offset += size;
            part
        })
        .collect()
}
