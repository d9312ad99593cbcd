"""Where the embedded server's files come from: the package archive, the cache, directories of killed processes."""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from platformdirs import user_cache_path

from pgbg_debian_extension import debian, elf
from pgbg_debian_extension.debian import Package, PackageUnavailableError
from pgbg_orchestration.embedded.binaries import NoPostgresError, find_binaries
from pgbg_orchestration.embedded.cache import cache_directory
from pgbg_orchestration.embedded.directories import own_directory
from pgbg_orchestration.embedded.extension import RealExtensionUnavailableError, real_extension, verified

MIRROR = "http://mirror.invalid/debian"
NAME = "postgresql-18-pg-background"


def deb(files: dict[str, bytes], compression: str = "xz") -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=f"w:{compression}") as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{compression}": data.getvalue()}
    result = b"!<arch>\n"
    for name, content in members.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        result += header + content + b"\n" * (len(content) % 2)
    return result


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Archive:
    """A mirror in memory, in place of the network."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.release = ""
        monkeypatch.setenv(debian.MIRROR_VARIABLE, f"{MIRROR}/")
        monkeypatch.setattr(debian, "_download", self._download)
        monkeypatch.setattr(debian, "_signed_release", lambda _: self.release)

    def publish(self, package: bytes, version: str, **fields: str) -> None:
        """Put a package into the pool and the index, as Debian would."""
        described = {
            "Package": NAME,
            "Version": version,
            "Filename": f"pool/{version}.deb",
            "SHA256": sha256(package),
            **fields,
        }
        paragraph = "\n".join(f"{key}: {value}" for key, value in described.items())
        index = f"Package: {NAME}-dbgsym\nVersion: 0\n\n{paragraph}\nDescription: x\n more\n\nPackage: z\n".encode()
        compressed = lzma.compress(index)
        self.files[f"pool/{version}.deb"] = package
        self.files["dists/forky/main/binary-amd64/Packages.xz"] = compressed
        self.release = f"SHA256:\n {'0' * 64} 1 other\n {sha256(compressed)} 9 main/binary-amd64/Packages.xz\n"
        self.release = f"Origin: Debian\n{self.release}"

    def _download(self, url: str) -> bytes:
        path = url.removeprefix(f"{MIRROR}/")
        self.asked.append(path)
        if path not in self.files:
            raise debian._NotOnMirror(f"{url} is not there")
        return self.files[path]


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> Archive:
    return Archive(monkeypatch)


@pytest.mark.parametrize("compression", ["xz", "gz", "bz2"])
def test_members_of_a_package(compression: str) -> None:
    files = {"usr/lib/a.so": b"\x7fELF", "usr/share/empty": b"", "usr/share/odd": b"123"}
    assert dict(debian.members(deb(files, compression))) == files


def test_what_is_no_package_is_refused() -> None:
    with pytest.raises(PackageUnavailableError, match="not a Debian package"):
        list(debian.members(b"<html>captive portal</html>"))


def test_known_package_needs_no_index(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    content = deb({"f": b"x"})
    known = Package(NAME, "2.0.3-1", "pool/known.deb", sha256(content))
    monkeypatch.setattr(debian, "KNOWN_PACKAGES", {"amd64": known})
    archive.files["pool/known.deb"] = content
    assert debian.fetch(NAME, "amd64") == (known, content)
    assert archive.asked == ["pool/known.deb"]


def test_a_changed_file_is_never_used(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    known = Package(NAME, "2.0.3-1", "pool/known.deb", sha256(b"what Debian built"))
    monkeypatch.setattr(debian, "KNOWN_PACKAGES", {"amd64": known})
    archive.files["pool/known.deb"] = b"something else"
    with pytest.raises(PackageUnavailableError, match="SHA-256"):
        debian.fetch(NAME, "amd64")


def test_a_newer_package_is_found_in_the_signed_index(archive: Archive) -> None:
    content = deb({"f": b"newer"})
    archive.publish(content, "1:2.0.4-1")
    package, found = debian.fetch(NAME, "amd64")
    assert (package.version, package.upstream_version, found) == ("1:2.0.4-1", "2.0.4", content)


def test_an_index_that_the_release_does_not_vouch_for_is_refused(archive: Archive) -> None:
    archive.publish(deb({"f": b"newer"}), "2.0.4-1")
    archive.files["dists/forky/main/binary-amd64/Packages.xz"] = lzma.compress(b"Package: evil\n")
    with pytest.raises(PackageUnavailableError, match="SHA-256"):
        debian.fetch(NAME, "amd64")


def test_a_package_that_the_index_does_not_vouch_for_is_refused(archive: Archive) -> None:
    archive.publish(deb({"f": b"newer"}), "2.0.4-1", SHA256="0" * 64)
    with pytest.raises(PackageUnavailableError, match="SHA-256"):
        debian.fetch(NAME, "amd64")


def test_a_package_that_is_not_in_the_suite(archive: Archive) -> None:
    archive.publish(deb({"f": b"x"}), "2.0.4-1", Package="another")
    with pytest.raises(PackageUnavailableError, match=f"no package {NAME}"):
        debian.fetch(NAME, "amd64")


@pytest.mark.skipif(not debian.ARCHIVE_KEYRING.exists(), reason="needs Debian's key ring")
def test_a_release_without_debians_signature_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "_download", lambda _: b"Origin: Debian\nSHA256:\n")
    with pytest.raises(PackageUnavailableError, match="signature"):
        debian._signed_release(MIRROR)


def apt(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put an apt-get of our own in front of the machine's."""
    program = directory / "apt-get"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.delenv(debian.MIRROR_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (
            "Packages|Debian|http://a.invalid/debian-security/\nPackages|Debian|http://b.invalid/debian/",
            "http://b.invalid/debian",
        ),
        ("Sources|Debian|http://a.invalid/debian/\nPackages|Debian|https://b.invalid/x/", "https://b.invalid/x"),
        ("Packages||http://never-updated.invalid/debian/", "http://never-updated.invalid/debian"),
    ],
)
def test_mirror_from_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str, expected: str) -> None:
    apt(tmp_path, monkeypatch, f"echo '{listed}'")
    assert debian.mirror() == expected


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'Packages|Ubuntu|http://a.invalid/ubuntu/'", "no Debian archive"),
        ("echo 'lists are broken' >&2; exit 100", "lists are broken"),
    ],
)
def test_no_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str) -> None:
    apt(tmp_path, monkeypatch, script)
    with pytest.raises(PackageUnavailableError, match=message):
        debian.mirror()


def test_the_environment_names_the_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(debian.MIRROR_VARIABLE, "http://mine.invalid/debian/")
    assert debian.mirror() == "http://mine.invalid/debian"


def test_a_spoiled_cache_is_not_used(tmp_path: Path) -> None:
    assert verified(tmp_path) is None
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "pg_background.so").write_bytes(b"good")
    manifest = f'{{"version": "2.0.3", "files": {{"lib/pg_background.so": "{sha256(b"good")}"}}}}'
    (tmp_path / "manifest.json").write_text(manifest)
    files = verified(tmp_path)
    assert files is not None
    assert files.version == "2.0.3"
    (tmp_path / "lib" / "pg_background.so").write_bytes(b"bad")
    assert verified(tmp_path) is None


def test_without_what_fetches_the_extension_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pgbg_debian_extension", None)
    with pytest.raises(RealExtensionUnavailableError, match="debian_extension in a clone"):
        real_extension(18)


def test_what_debian_does_not_build_is_refused() -> None:
    with pytest.raises(RealExtensionUnavailableError, match=r"for PostgreSQL 18, this is 17|needs Linux|no build of"):
        real_extension(17)


def test_the_cache_is_where_the_platform_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PGBG_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cache_directory() == user_cache_path("pgbg", appauthor=False)
    assert cache_directory().is_dir()
    monkeypatch.setenv("PGBG_CACHE_DIR", str(tmp_path / "mine"))
    assert cache_directory() == tmp_path / "mine"


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PGBG_CACHE_DIR", raising=False)
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    with pytest.raises(NoPostgresError, match=r"\[embedded\]"):
        cache_directory()


@pytest.mark.skipif(elf.host_glibc() is None, reason="needs glibc")
def test_relaxing_leaves_what_fits_and_refuses_what_cannot() -> None:
    library = next(find_binaries().directory.parent.rglob("dblink.so")).read_bytes()
    glibc = elf.host_glibc()
    assert glibc is not None
    assert elf.relax_glibc(library, glibc) == library
    with pytest.raises(elf.CannotRelaxError, match=r"of a newer C library than 2\.0"):
        elf.relax_glibc(library, (2, 0))
    with pytest.raises(elf.CannotRelaxError, match="ELF"):
        elf.relax_glibc(b"MZ" + library, glibc)


OWNER = """
import sys, time
from pathlib import Path
from pgbg_orchestration.embedded.directories import own_directory
owned = own_directory(Path(sys.argv[1]), lambda path: None)
(owned.path / "data").write_text("kept")
print(owned.path, flush=True)
time.sleep(600)
"""


def test_a_directory_is_found_again_when_its_process_was_killed(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    removed: list[Path] = []
    with other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        mine = own_directory(tmp_path, removed.append)
        assert removed == [], "its owner lives"
        os.kill(other.pid, signal.SIGKILL)
    again = own_directory(tmp_path, removed.append)
    assert removed == [theirs]
    assert len({theirs, mine.path, again.path}) == 3
    for owned in (mine, again):
        owned.path.rmdir()
        owned.release()
    assert list(tmp_path.glob("*.owned")) == []
