"""Compressed files as streams of bytes that are whole or an error: cut files and foreign bytes never read as an end."""

import io
from collections.abc import Callable
from typing import BinaryIO

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
BLOCK = 1 << 14  # bytes read at once: what a decompressor without a limit makes of them stays in memory


def ending_of(name: str) -> str:
    """The compression's suffix of a file name, "" if it has none."""
    return next((ending for ending in COMPRESSIONS if name.lower().endswith(ending)), "")


def decompressed(raw: BinaryIO, name: str) -> BinaryIO:
    """The content of a file, decompressed as its name says. Reading raises OSError or EOFError for what is damaged or cut."""
    ending = ending_of(name)
    return io.BufferedReader(_Members(raw, *_decompressor(ending)), 1 << 20) if ending else raw


def _decompressor(ending: str) -> tuple[Callable, type[Exception]]:
    """What makes an object that reads one member (decompress(), eof, unused_data), and the error that it raises."""
    if ending == ".gz":
        import zlib

        return lambda: zlib.decompressobj(16 + zlib.MAX_WBITS), zlib.error
    if ending == ".zst":
        import zstandard

        return lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError
    if ending == ".bz2":
        import bz2

        return bz2.BZ2Decompressor, OSError
    import lzma

    return lzma.LZMADecompressor, lzma.LZMAError


class _Members(io.RawIOBase):
    """One or several members (frames, streams) after each other, as `cat a.gz b.gz`, pzstd and pbzip2 make them.

    Unlike the libraries' own files, which take a cut .zst for whole and pass over a .bz2's or .xz's damaged second member.
    """

    def __init__(self, raw: BinaryIO, make: Callable, error: type[Exception]):
        self._raw, self._make, self._error = raw, make, error
        self._member = make()  # a file without any is cut
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        if not self._output:
            self._output = memoryview(self._next())
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _next(self) -> bytes:
        """The next bytes of content; none at the file's end."""
        output = b""
        while not output:
            # bz2 and xz may blow a block up without bound: they say when they have more to give
            limited = hasattr(self._member, "needs_input")
            block = b""
            if self._member.eof:
                if not (block := self._after_member()):
                    break
                self._member = self._make()
            elif (not limited or self._member.needs_input) and not (block := self._raw.read(BLOCK)):
                raise EOFError("the compressed file is cut short")
            try:
                output = self._member.decompress(block, 1 << 20) if limited else self._member.decompress(block)
            except self._error as error:
                raise OSError(f"damaged, or other bytes follow the compressed ones ({error})") from error
        return output

    def _after_member(self) -> bytes:
        """What follows a member, without the zeros that may pad it."""
        block = self._member.unused_data.lstrip(b"\0")
        while not block and (more := self._raw.read(BLOCK)):
            block = more.lstrip(b"\0")
        return block
