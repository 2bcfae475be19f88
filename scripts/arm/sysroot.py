"""An aarch64 root folder for qemu: glibc, libstdc++ and Python 3.11 from Debian's arm64 packages, TVM's runtime and numpy from aarch64 wheels.

    python scripts/arm/sysroot.py            # prepares it once (some 10 s, 130 MB) and prints where it is; then prints that only

Packages are unpacked, not installed: apt runs with lists, cache and status of its own, so that the host's stay as they are, and nothing needs root.
The folder is $SPARSIFY_ARM_ROOT, or one in the user's cache. It is made beside its place and renamed: a killed run leaves nothing half done.
Needs apt-get, dpkg and pip; what runs in it needs qemu-aarch64 (Debian: qemu-user).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

PYTHON = "3.11"
PACKAGES = ["libc6", "libgcc-s1", "libstdc++6", "libgomp1", "zlib1g", "libffi8", "libssl3", "libexpat1", "libbz2-1.0", "liblzma5", "libcrypt1",
            "libuuid1", "libsqlite3-0", f"libpython{PYTHON}-minimal", f"libpython{PYTHON}-stdlib", f"python{PYTHON}-minimal"]
WHEELS = ["apache-tvm==0.27.0.post1", "apache-tvm-ffi==0.1.15.post2", "numpy==2.4.6", "ml-dtypes==0.5.4", "typing-extensions==4.15.0"]
GLIBC = ["2_17", "2_24", "2_26", "2_27", "2_28", "2_34"]
# What runs kernels and graphs needs no compiler.
LEFT_OUT = ("tvm/lib/libtvm_compiler.so", "tvm/lib/libtvm_runtime_cuda.so", "tvm/lib64/", "tvm/3rdparty/", "tvm/src/", "tvm/include/", "tvm/web/",
            "tvm/cmake/", "tvm/licenses/", "tvm/topi/", "tvm/testing/", "tvm_ffi/3rdparty/", "tvm_ffi/src/", "numpy/tests/")
COMMAND = "python scripts/arm/sysroot.py"


def root() -> Path:
    """Where the root folder is, or will be."""
    return Path(os.environ.get("SPARSIFY_ARM_ROOT") or user_cache_path("sparsify_compiler") / "aarch64")


def ready() -> bool:
    """Is it there, as this very file makes it?"""
    stamp = root() / ".ready"
    return stamp.exists() and stamp.read_text() == _recipe()


def prepare() -> Path:
    """Make it where it is not there yet; its path."""
    place = root()
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if not ready():
            with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}-") as folder:
                made, work = Path(folder) / "root", Path(folder) / "work"
                made.mkdir()
                _unpack_debian(made, work)
                _unpack_wheels(made / "site", work)
                (made / ".ready").write_text(_recipe())
                if place.exists():
                    place.rename(Path(folder) / "old")
                made.rename(place)
    return place


def _recipe() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _unpack_debian(made: Path, work: Path) -> None:
    for part in ("lists/partial", "cache/archives/partial", "deb", "whl"):
        (work / part).mkdir(parents=True)
    (work / "status").touch()
    options = [f"-o{name}={value}" for name, value in {
        "APT::Architecture": "arm64", "APT::Architectures": "arm64", "APT::Sandbox::User": "root", "Dir::State": work,
        "Dir::State::lists": work / "lists", "Dir::State::status": work / "status", "Dir::Cache": work / "cache",
        "Acquire::Languages": "none", "Acquire::Retries": 3}.items()]
    sources = Path("/etc/apt/sources.list.d/debian.sources")
    if sources.exists():
        options += [f"-oDir::Etc::sourcelist={sources}", "-oDir::Etc::sourceparts=-"]
    for command, folder in ((["update"], work), (["download", *PACKAGES], work / "deb")):
        subprocess.run(["apt-get", "-qq", *options, *command], check=True, cwd=folder, stdout=sys.stderr)
    for package in sorted((work / "deb").glob("*.deb")):
        subprocess.run(["dpkg", "-x", package, made], check=True)
    for path in made.rglob("*"):  # an absolute link would point at the host's file
        if path.is_symlink() and os.readlink(path).startswith("/"):
            target = made / os.readlink(path).lstrip("/")
            path.unlink()
            path.symlink_to(os.path.relpath(target, path.parent))


def _unpack_wheels(site: Path, work: Path) -> None:
    platforms = [f"--platform=manylinux_{version}_aarch64" for version in GLIBC] + ["--platform=manylinux2014_aarch64"]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:",
                    "--implementation=cp", f"--python-version={PYTHON}", *platforms, "-d", work / "whl", *WHEELS], check=True, stdout=sys.stderr)
    for wheel in sorted((work / "whl").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site, [name for name in archive.namelist() if not name.startswith(LEFT_OUT) and "/tests/" not in name])


if __name__ == "__main__":
    if shutil.which("qemu-aarch64") is None:
        print("qemu-aarch64 is missing: apt-get install qemu-user", file=sys.stderr)
    print(prepare())
