"""Builds the library by cargo, and puts it beside the package.

In the repository the Rust source is two folders up; a source distribution has
it below, in `rust`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

SONAME = "libtproxy.so.0"
LICENCES = ("LICENSE-MIT", "LICENSE-APACHE")
#: What cargo needs to build the library.
RUST = ("tools/shared.sh", "Cargo.toml", "Cargo.lock", "build.rs", "src", "benches", "include/tproxy.h", *LICENCES)


def rust_source(root: str) -> Path:
    shipped = Path(root, "rust")
    return shipped if shipped.exists() else Path(root).parents[1]


class Version(MetadataHookInterface):
    """The version is the library's."""

    def update(self, metadata: dict[str, Any]) -> None:
        found = re.search(r'^version = "(.+)"', (rust_source(self.root) / "Cargo.toml").read_text(), re.MULTILINE)
        if not found:
            raise RuntimeError("Cargo.toml has no version")
        metadata["version"] = found[1]


class Library(BuildHookInterface[Any]):
    """The library, in a wheel or in an editable install; its source, in a source distribution."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        source = rust_source(self.root)
        if self.target_name == "sdist":
            build_data["force_include"].update({str(source / name): f"rust/{name}" for name in RUST})
            return
        # No compiled extension: any Python 3, but this machine's system and processor.
        platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
        build_data.update(tag=f"py3-none-{platform}", pure_python=False)
        for name in LICENCES:
            build_data["force_include"][str(source / name)] = f"tproxy/{name}"
        library = self.build(source)
        if version == "editable":
            shutil.copy(library, Path(self.root, "tproxy", SONAME))
        else:
            build_data["force_include"][str(library)] = f"tproxy/{SONAME}"

    def build(self, source: Path) -> Path:
        if not shutil.which("cargo"):
            raise RuntimeError("cargo is missing: building libtproxy needs Rust, 1.93 or newer")
        # Where `make` builds it, so that nothing is built twice.
        target = source / "build" / "cargo"
        environment = {**os.environ, "CARGO_TARGET_DIR": str(target)}
        subprocess.run(["sh", "tools/shared.sh", "--locked"], cwd=source, env=environment, check=True)
        return target / "release" / "libtproxy.so"
