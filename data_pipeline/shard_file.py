"""One shard: a plain WebDataset tar with one row per member, and a sidecar that makes rows reachable by number.

The tar is written by webdataset's own TarWriter (USTAR, no compression, fixed time and owner), so its bytes
depend on the rows alone. The sidecar `.idx`, all little-endian:

    header, 64 bytes   magic "DLMROWS1", u32 version, u32 bytes per token, u32 sequence length, u32 zero,
                       u64 rows, u64 bytes of the tar, u32 CRC-32 of the 40 bytes before it, zeros
    u64 [rows]         offset in the tar of the row's tokens (behind the tar and npy headers)
    u32 [rows]         CRC-32 of: the tokens' bytes, u32 text bytes, u64 number of the row in its split
    u32 [rows]         text bytes: UTF-8 bytes of text that the row stands for

Because the CRC also covers the text bytes and the row's number, a read notices a damaged sidecar and shards
that changed places, not only damaged tokens.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import struct
import tarfile
import weakref
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from data_pipeline.errors import CorruptShardError, DataError
from data_pipeline.files import atomic_write

_MAGIC = b"DLMROWS1"
_VERSION = 1
_HEADER = struct.Struct("<8sIIIIQQ")
_HEADER_BYTES = 64
_BYTES_PER_ROW = 16
_TAR_BLOCK = 512
_OWNER = "bigdata"  # What webdataset writes where nothing else is said.
_MODE = 0o444
_ROW_TAIL = struct.Struct("<IQ")


@dataclass(frozen=True)
class ShardRecord:
    """What index.json says about one shard; the digests are sha256 in hexadecimal."""

    tar: str
    idx: str
    rows: int
    tar_bytes: int
    tar_sha256: str
    idx_sha256: str


def member_name(row: int) -> str:
    """The tar member of row number `row` of its split."""
    return f"{row:012d}.npy"


def idx_size(rows: int) -> int:
    """Bytes of the sidecar of a shard with `rows` rows."""
    return _HEADER_BYTES + _BYTES_PER_ROW * rows


def row_crc(tokens: bytes | memoryview, text_bytes: int, row: int) -> int:
    """CRC-32 of a row's little-endian tokens, its text bytes and its number in the split."""
    return zlib.crc32(_ROW_TAIL.pack(text_bytes, row), zlib.crc32(tokens))


def write_shard(
    folder: Path, stem: str, first_row: int, rows: NDArray[np.integer], text_bytes: NDArray[np.int64]
) -> ShardRecord:
    """Write `stem`.tar and `stem`.idx into `folder`, each atomically, and say what was written.

    rows: uint16 or uint32 [n, T]; text_bytes: [n]; first_row: the number of rows[0] in its split.
    """
    import webdataset  # Only writing needs it, and it imports torch: seconds at the start of each worker.

    assert rows.dtype.str in ("<u2", "<u4"), rows.dtype
    assert len(rows) == len(text_bytes)
    offsets = np.empty(len(rows), dtype="<u8")
    crcs = np.empty(len(rows), dtype="<u4")
    with atomic_write(folder / f"{stem}.tar") as file:
        hashed = _HashingFile(file)
        with webdataset.TarWriter(hashed, user=_OWNER, group=_OWNER, mode=_MODE, mtime=0, compress=False) as writer:
            for i, row in enumerate(np.ascontiguousarray(rows)):
                number = first_row + i
                start = writer.tarstream.offset
                size = writer.write({"__key__": f"{number:012d}", "npy": row})
                offsets[i] = start + _TAR_BLOCK + size - row.nbytes
                crcs[i] = row_crc(row.data, int(text_bytes[i]), number)
    header = _pack_header(rows.dtype.itemsize, rows.shape[1], len(rows), hashed.size)
    sidecar = header + offsets.tobytes() + crcs.tobytes() + text_bytes.astype("<u4").tobytes()
    with atomic_write(folder / f"{stem}.idx") as file:
        file.write(sidecar)
    return ShardRecord(
        tar=f"{stem}.tar",
        idx=f"{stem}.idx",
        rows=len(rows),
        tar_bytes=hashed.size,
        tar_sha256=hashed.digest.hexdigest(),
        idx_sha256=hashlib.sha256(sidecar).hexdigest(),
    )


class _HashingFile:
    """Passes bytes on to a file, counting and hashing them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self._file.write(data)


def _pack_header(itemsize: int, sequence_length: int, rows: int, tar_bytes: int) -> bytes:
    head = _HEADER.pack(_MAGIC, _VERSION, itemsize, sequence_length, 0, rows, tar_bytes)
    return (head + struct.pack("<I", zlib.crc32(head))).ljust(_HEADER_BYTES, b"\0")


class ShardFile:
    """An open shard: positional reads only, so threads share it freely. Closes itself with its last user."""

    def __init__(
        self, folder: Path, record: ShardRecord, first_row: int, dtype: np.dtype, sequence_length: int
    ) -> None:
        self.tar_path = folder / record.tar
        self.idx_path = folder / record.idx
        self._first_row = first_row
        self._dtype = dtype
        self._row_bytes = dtype.itemsize * sequence_length
        with _open_for_reading(self.idx_path) as file:
            if os.fstat(file.fileno()).st_size != idx_size(record.rows):
                raise CorruptShardError(f"{self.idx_path} has not the size that index.json gives; restore it")
            # Mapped, not read: a shard may hold millions of rows, and a step touches a few of them.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        expected = _pack_header(dtype.itemsize, sequence_length, record.rows, record.tar_bytes)
        if self._map[:_HEADER_BYTES] != expected:
            raise CorruptShardError(
                f"{self.idx_path} is damaged or belongs to another shard: its header does not agree with "
                "index.json; restore it or build the data set again"
            )
        n = record.rows
        self.offsets = np.frombuffer(self._map, dtype="<u8", count=n, offset=_HEADER_BYTES)
        self.crcs = np.frombuffer(self._map, dtype="<u4", count=n, offset=_HEADER_BYTES + 8 * n)
        self.text_bytes = np.frombuffer(self._map, dtype="<u4", count=n, offset=_HEADER_BYTES + 12 * n)
        with _open_for_reading(self.tar_path) as file:
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)

    def read_into(self, out: NDArray[np.unsignedinteger], local_row: int) -> int:
        """Read row `local_row` of this shard into `out` [T], check it, and return its text bytes.

        Raises CorruptShardError naming the shard, the row and the offset.
        """
        offset, text_bytes = int(self.offsets[local_row]), int(self.text_bytes[local_row])
        view = out.data.cast("B")
        try:
            read = os.preadv(self._descriptor, [view], offset)
        except (OSError, OverflowError) as error:
            raise self._corrupt(local_row, offset, f"reading failed ({error})") from error
        if read != self._row_bytes:
            raise self._corrupt(local_row, offset, f"only {read} of {self._row_bytes} bytes are there")
        if row_crc(view, text_bytes, self._first_row + local_row) != self.crcs[local_row]:
            raise self._corrupt(local_row, offset, "the checksum does not match")
        return text_bytes

    def last_token(self, local_row: int) -> int:
        """The last token of row `local_row`, without its checksum, which would take the whole row."""
        size = self._dtype.itemsize
        offset = int(self.offsets[local_row]) + self._row_bytes - size
        try:
            stored = os.pread(self._descriptor, size, offset)
        except (OSError, OverflowError) as error:
            raise self._corrupt(local_row, offset, f"reading failed ({error})") from error
        if len(stored) != size:
            raise self._corrupt(local_row, offset, "its last token is not there")
        return int.from_bytes(stored, "little")

    def _corrupt(self, local_row: int, offset: int, what: str) -> CorruptShardError:
        row = self._first_row + local_row
        return CorruptShardError(
            f"{self.tar_path}: row {row} (row {local_row} of the shard, at byte {offset}) is corrupt: {what}; "
            f"restore {self.tar_path.name} and {self.idx_path.name} from a copy or build the data set again"
        )


def _open_for_reading(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        raise DataError(f"the shard file {path} is missing; restore it or build the data set again") from error
    except OSError as error:
        raise DataError(f"the shard file {path} cannot be opened: {error.strerror}") from error


def verify_shard(folder: Path, record: ShardRecord, first_row: int, dtype: np.dtype, sequence_length: int) -> list[str]:
    """All that is wrong with a shard, one sentence each: sizes, digests, tar and npy headers, every row."""
    problems = [
        f"{path} is not the file that was written: its sha256 differs from index.json"
        for path, digest in ((folder / record.tar, record.tar_sha256), (folder / record.idx, record.idx_sha256))
        if not path.is_file() or _sha256(path) != digest
    ]
    try:
        shard = ShardFile(folder, record, first_row, dtype, sequence_length)
    except DataError as error:
        return [*problems, str(error)]
    expected_header = _npy_header(dtype, sequence_length)
    row = np.empty(sequence_length, dtype=dtype)
    with open(shard.tar_path, "rb") as file:
        for i in range(record.rows):
            try:
                shard.read_into(row, i)
            except CorruptShardError as error:
                problems.append(str(error))
                continue
            headers_at = int(shard.offsets[i]) - len(expected_header) - _TAR_BLOCK
            file.seek(max(0, headers_at))
            wrong = _wrong_headers(file, member_name(first_row + i), expected_header, row.nbytes)
            if wrong:
                problems.append(f"{shard.tar_path}: row {first_row + i} at byte {headers_at}: {wrong}")
    return problems


def _wrong_headers(file: BinaryIO, name: str, npy_header: bytes, row_bytes: int) -> str | None:
    if file.read(_TAR_BLOCK) != _tar_header(name, len(npy_header) + row_bytes):
        return f"the tar header is damaged, it should name {name}"
    return None if file.read(len(npy_header)) == npy_header else "the npy header is damaged"


def _tar_header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, _MODE
    member.uname = member.gname = _OWNER
    return member.tobuf(tarfile.USTAR_FORMAT)


def _npy_header(dtype: np.dtype, sequence_length: int) -> bytes:
    stream = io.BytesIO()
    npy_format.write_array(stream, np.zeros(sequence_length, dtype=dtype))
    return stream.getvalue()[: -dtype.itemsize * sequence_length]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
