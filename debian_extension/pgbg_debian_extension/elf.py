"""Let a shared library load where the C library is a little older than the one it was built against.

Debian testing builds pg_background against glibc 2.38 and uses one function from it, ``strlcpy``. PostgreSQL brings
its own ``strlcpy`` along wherever the C library has none, so the symbol is there at run time, and only its version is
not. This module marks the version as wished for instead of required (the weak flag of a version need) and
unbinds the symbol from it: two edits in place, of bytes that the format reserves for this (ELF specification, GNU
symbol versioning; LSB Core, section "Symbol Versioning").
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

PROVIDED_BY_POSTGRES = frozenset({"strlcpy", "strlcat"})
"""Functions that PostgreSQL's own port library exports where the C library lacks them (src/port)."""

_SHT_DYNSYM = 11
_SHT_GNU_VERNEED = 0x6FFFFFFE
_SHT_GNU_VERSYM = 0x6FFFFFFF
_VER_FLG_WEAK = 0x2
_VER_NDX_GLOBAL = 1


class CannotRelaxError(Exception):
    """The library needs more of a newer C library than can be done without."""


class _Section(NamedTuple):
    offset: int
    size: int
    link: int


def host_glibc() -> tuple[int, ...] | None:
    """Return this machine's glibc version, such as (2, 36), or None where the C library is another one."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (ValueError, AttributeError):
        return None  # macOS, musl
    return _numbers(version) if name == "glibc" else None


def relax_glibc(library: bytes, glibc: tuple[int, ...]) -> bytes:
    """Return the library so that it loads under an older glibc; unchanged when it does already.

    Parameters
    ----------
    library:
        a 64-bit little-endian ELF shared object.
    glibc:
        the version to load under, such as (2, 36).

    Raises
    ------
    CannotRelaxError
        another kind of file, or it uses a newer function that PostgreSQL does not provide.
    """
    if library[:6] != b"\x7fELF\x02\x01":
        raise CannotRelaxError("not a 64-bit little-endian ELF file")
    sections = _sections(library)
    if not {_SHT_DYNSYM, _SHT_GNU_VERNEED, _SHT_GNU_VERSYM} <= sections.keys():
        return library  # needs no versions at all
    result = bytearray(library)
    too_new: set[int] = set()
    for offset, name, index in _version_needs(library, sections):
        if name.startswith("GLIBC_") and _numbers(name.removeprefix("GLIBC_")) > glibc:
            too_new.add(index)
            (flags,) = struct.unpack_from("<H", library, offset + 4)
            struct.pack_into("<H", result, offset + 4, flags | _VER_FLG_WEAK)
    symbols, versions = sections[_SHT_DYNSYM], sections[_SHT_GNU_VERSYM]
    for number in range(symbols.size // 24):
        position = versions.offset + 2 * number
        (version,) = struct.unpack_from("<H", library, position)
        if version & 0x7FFF in too_new:
            (name_offset,) = struct.unpack_from("<I", library, symbols.offset + 24 * number)
            symbol = _string(library, _string_table(library, symbols), name_offset)
            if symbol not in PROVIDED_BY_POSTGRES:
                raise CannotRelaxError(f"needs {symbol} of a newer C library than {'.'.join(map(str, glibc))}")
            struct.pack_into("<H", result, position, _VER_NDX_GLOBAL)
    return bytes(result)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _section_header(library: bytes, number: int) -> tuple[int, _Section]:
    (table,) = struct.unpack_from("<Q", library, 0x28)
    (entry_size,) = struct.unpack_from("<H", library, 0x3A)
    _, kind, _, _, offset, size, link = struct.unpack_from("<IIQQQQI", library, table + number * entry_size)
    return kind, _Section(offset, size, link)


def _sections(library: bytes) -> dict[int, _Section]:
    (count,) = struct.unpack_from("<H", library, 0x3C)
    return dict(_section_header(library, number) for number in range(count))


def _string_table(library: bytes, section: _Section) -> int:
    return _section_header(library, section.link)[1].offset


def _string(library: bytes, table: int, offset: int) -> str:
    return library[table + offset : library.index(b"\0", table + offset)].decode()


def _version_needs(library: bytes, sections: dict[int, _Section]) -> Iterator[tuple[int, str, int]]:
    """Yield (offset of the Vernaux entry, version name, version index) of every version that is needed."""
    section = sections[_SHT_GNU_VERNEED]
    strings = _string_table(library, section)
    need = section.offset
    while True:
        _, count, _, first, to_next = struct.unpack_from("<HHIII", library, need)
        entry = need + first
        for _ in range(count):
            _, _, index, name, to_next_entry = struct.unpack_from("<IHHII", library, entry)
            yield entry, _string(library, strings, name), index
            entry += to_next_entry
        if not to_next:
            return
        need += to_next
