//! Control groups of cgroup v2: the number by which the kernel knows one.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::error::{Error, Result};
use crate::name;
use crate::plan::{Cgroup, Owners};

/// Where cgroup v2 is mounted: alone, or beside the controllers of version 1 (systemd's "hybrid" layout).
const ROOTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// Looks up the number of each control group: the inode number of its directory (`cgroup_id`, include/linux/cgroup.h).
pub(crate) fn look_up(owners: &mut Owners) -> Result<()> {
    let mut groups = owners.all_cgroups().peekable();
    if groups.peek().is_none() {
        return Ok(());
    }
    // Only the root of cgroup v2 has this file.
    let root = ROOTS.iter().map(Path::new).find(|root| root.join("cgroup.controllers").exists()).ok_or_else(|| {
        Error::new(
            libc::EOPNOTSUPP,
            "cgroups: cgroup v2 is mounted neither at /sys/fs/cgroup nor at /sys/fs/cgroup/unified: `mount -t cgroup2 none \
             /sys/fs/cgroup/unified`",
        )
    })?;
    groups.try_for_each(|group| look_up_one(root, group))
}

fn look_up_one(root: &Path, group: &mut Cgroup) -> Result<()> {
    let directory = root.join(&group.path);
    let failed = |errno: i32, problem: &str| {
        let directory = directory.to_string_lossy();
        Error::with(errno, format_args!("cgroups: {}: {problem}", name::quoted(&directory)))
    };
    let found = std::fs::metadata(&directory).map_err(|e| match e.kind() {
        ErrorKind::NotFound => failed(libc::ENOENT, "there is no such control group; create it first"),
        _ => failed(e.raw_os_error().unwrap_or(libc::EIO), &e.to_string()),
    })?;
    if !found.is_dir() {
        return Err(failed(libc::ENOTDIR, "not a control group, which is a directory"));
    }
    group.id = found.ino();
    Ok(())
}
