"""Fetch one Debian package, verified, without installing it.

Debian testing is where the real pg_background can be had as a binary. Its files are
loaded into a server as native code, so nothing is unpacked unless its SHA-256 is known from a trusted place:
either a checksum that stands in this file, or a package index whose release file carries Debian's signature.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SUITE = "forky"
MIRROR_VARIABLE = "PGBG_DEBIAN_MIRROR"
ARCHIVE_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
DOWNLOAD_TIMEOUT = 20.0
"""Seconds without a byte after which a download is given up."""


class PackageUnavailableError(Exception):
    """The package cannot be had on this machine; the message says why, in words for the person who asked."""


@dataclass(frozen=True)
class Package:
    """A binary package in Debian's pool, with the checksum that its file must have.

    Parameters
    ----------
    name:
        the binary package's name.
    version:
        the Debian version, as in the package index.
    filename:
        path below the mirror's root.
    sha256:
        hexadecimal digest of the .deb file.
    """

    name: str
    version: str
    filename: str
    sha256: str

    @property
    def upstream_version(self) -> str:
        """The version without epoch and Debian revision: ``2.0.3`` of ``2.0.3-1``."""
        return self.version.split(":", 1)[-1].rsplit("-", 1)[0]


def _pool(version: str, architecture: str, sha256: str) -> Package:
    name = "postgresql-18-pg-background"
    return Package(name, version, f"pool/main/p/pg-background/{name}_{version}_{architecture}.deb", sha256)


# Read from the signed index of forky. With these a first start costs 0.1 MB instead of a 10 MB index, and needs no
# key ring; once Debian has moved on to another version, the signed index is asked.
KNOWN_PACKAGES = {
    "amd64": _pool("2.0.3-1", "amd64", "38d34bbaecbb820b1b7e7a3008416eec92a01da7a297e781b36321f62315da0e"),
    "arm64": _pool("2.0.3-1", "arm64", "5f21421e18d997bdb0368df42dbe0dace85c5bd70c9257ec9a77ccad8cd785e1"),
}


def mirror() -> str:
    """Find the Debian mirror to use; returned without a trailing slash.

    Taken from the environment variable ``PGBG_DEBIAN_MIRROR``, else from the machine's own apt configuration
    (``apt-get indextargets``, see apt-get(8)): the first repository that calls itself Debian and is not the
    security archive, which carries no testing suite.

    Raises
    ------
    PackageUnavailableError
        there is no apt here, or apt knows no Debian archive.
    """
    if chosen := os.environ.get(MIRROR_VARIABLE):
        return chosen.rstrip("/")
    apt_get = shutil.which("apt-get")
    if apt_get is None:
        raise PackageUnavailableError(f"no apt-get here and {MIRROR_VARIABLE} is not set, so no Debian mirror is known")
    listing = subprocess.run(
        [apt_get, "indextargets", "--format", "$(CREATED_BY)|$(ORIGIN)|$(REPO_URI)"],
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode != 0:
        raise PackageUnavailableError(f"apt does not tell its Debian mirror: {listing.stderr.strip()}")
    for line in listing.stdout.splitlines():
        created_by, origin, uri = line.split("|", 2)
        uri = uri.rstrip("/")
        # The origin comes from the downloaded release file and is empty before the first `apt-get update`.
        is_debian = origin == "Debian" or (not origin and uri.endswith("/debian"))
        if created_by == "Packages" and is_debian and not uri.endswith("-security"):
            return uri
    raise PackageUnavailableError(f"apt here knows no Debian archive; set {MIRROR_VARIABLE} to a Debian mirror")


def fetch(name: str, architecture: str) -> tuple[Package, bytes]:
    """Download a package of Debian's testing suite and verify it.

    Parameters
    ----------
    name:
        the binary package's name.
    architecture:
        Debian's name of the architecture (``amd64``, ``arm64``).

    Returns
    -------
    The package's description and the bytes of its .deb file.

    Raises
    ------
    PackageUnavailableError
        no mirror, no network, no such package, or nothing trusted vouches for the file.
    """
    base = mirror()
    known = KNOWN_PACKAGES.get(architecture)
    if known is not None and known.name == name:
        try:
            content = _download(f"{base}/{known.filename}")
        except _NotOnMirror:
            pass  # superseded there: the index knows the newer one
        else:
            _verify(content, known.sha256, known.filename)
            return known, content
    package = _look_up(base, name, architecture)
    content = _download(f"{base}/{package.filename}")
    _verify(content, package.sha256, package.filename)
    return package, content


def members(deb: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the regular files of a .deb as (path without the leading ``./``, content). See deb(5) and ar(5).

    Raises
    ------
    PackageUnavailableError
        the file is not a Debian package, or uses a compression this Python cannot read.
    """
    magic, offset = b"!<arch>\n", 8
    if deb[:offset] != magic:
        raise PackageUnavailableError("the downloaded file is not a Debian package")
    while offset + 60 <= len(deb):
        header = deb[offset : offset + 60]
        member = header[:16].decode("ascii").strip().rstrip("/")
        size = int(header[48:58])
        if member.startswith("data.tar"):
            data = deb[offset + 60 : offset + 60 + size]
            try:
                with tarfile.open(fileobj=io.BytesIO(data), mode="r:*") as archive:
                    for entry in archive:
                        stream = archive.extractfile(entry) if entry.isfile() else None
                        if stream is not None:
                            yield entry.name.removeprefix("./"), stream.read()
            except tarfile.TarError as error:
                raise PackageUnavailableError(f"cannot unpack {member} of the Debian package: {error}") from error
            return
        offset += 60 + size + size % 2
    raise PackageUnavailableError("the downloaded Debian package has no data member")


class _NotOnMirror(PackageUnavailableError):
    """The mirror answered that it has no such file."""


def _download(url: str) -> bytes:
    if not url.startswith(("http://", "https://")):
        raise PackageUnavailableError(f"cannot download {url}: only http and https mirrors are supported")
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response:  # noqa: S310 (just checked)
            content: bytes = response.read()
            return content
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise _NotOnMirror(f"{url} is not there (HTTP {error.code})") from error
        raise PackageUnavailableError(f"cannot download {url}: HTTP {error.code}") from error
    except OSError as error:
        raise PackageUnavailableError(f"cannot download {url}: {error}") from error


def _verify(content: bytes, sha256: str, what: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise PackageUnavailableError(f"{what} has the SHA-256 {found}, expected {sha256}: not used")


def _look_up(base: str, name: str, architecture: str) -> Package:
    """Find a package in the signed index. The chain: Debian's signature, the release file, the index, the package."""
    release = _signed_release(base)
    index_path = f"main/binary-{architecture}/Packages.xz"
    index_sha256 = _release_checksum(release, index_path)
    compressed = _download(f"{base}/dists/{SUITE}/{index_path}")
    _verify(compressed, index_sha256, index_path)
    marker = f"Package: {name}\n".encode()
    with lzma.open(io.BytesIO(compressed)) as stream:
        index: bytes = stream.read()
    start = index.find(marker) if index.startswith(marker) else index.find(b"\n" + marker) + 1
    if start == 0 and not index.startswith(marker):
        raise PackageUnavailableError(f"{SUITE} of {base} has no package {name} for {architecture}")
    fields = dict(
        line.split(": ", 1)
        for line in index[start : index.find(b"\n\n", start)].decode().splitlines()
        if ": " in line and not line.startswith(" ")
    )
    return Package(name, fields["Version"], fields["Filename"], fields["SHA256"])


def _signed_release(base: str) -> str:
    gpgv = shutil.which("gpgv")
    if gpgv is None or not ARCHIVE_KEYRING.exists():
        raise PackageUnavailableError(
            f"cannot check Debian's signature (needs gpgv and {ARCHIVE_KEYRING}), "
            "and the mirror no longer carries a version whose checksum is known here"
        )
    signed = _download(f"{base}/dists/{SUITE}/InRelease")
    with tempfile.TemporaryDirectory(prefix="pgbg-") as scratch:
        path, verified = Path(scratch, "InRelease"), Path(scratch, "Release")
        path.write_bytes(signed)
        check = subprocess.run(
            [gpgv, "--keyring", str(ARCHIVE_KEYRING), "--output", str(verified), str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        # gpgv ends with 2 when any one of several signatures has an unknown key; one good one from the archive's
        # own key ring is enough, as it is for apt.
        if "gpgv: Good signature" not in check.stderr or "BAD signature" in check.stderr or not verified.exists():
            raise PackageUnavailableError(
                f"Debian's signature on {SUITE} could not be verified:\n{check.stderr.strip()}"
            )
        return verified.read_text()


def _release_checksum(release: str, path: str) -> str:
    _, _, section = release.partition("\nSHA256:\n")
    for line in section.splitlines():
        if not line.startswith(" "):
            break
        digest, _, name = line.split()
        if name == path:
            return digest
    raise PackageUnavailableError(f"the release file of {SUITE} does not list {path}")
