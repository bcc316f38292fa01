"""How anything of a run gets onto the disk: whole or not at all, and checked when it is read again.

Lives here: atomic writes (beside, fsync, rename), checksums, the lock of a run folder. Knows no run and no model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pause_lightning.errors import RunStopped, UserError

CHECKSUMS = "SHA256SUMS"


@contextmanager
def atomic(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file that appears at ``path`` when the block ends without an error: written beside, fsync, rename.

    Raises:
        RunStopped: it cannot be written (disk full, no permission); what was at ``path`` is still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunStopped(
            f"cannot write {path}: {error.strerror}; what is finished is kept: make room, then run the same command again",
            here_only=True,
        ) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any, one_per_line: bool = False) -> None:
    """Atomic. ``one_per_line``: a list of records, each on a line of its own. Raises: RunStopped as ``atomic``."""
    with atomic(path) as file:
        if one_per_line:
            file.write("[\n" + ",\n".join(json.dumps(v, ensure_ascii=False) for v in value) + "\n]\n")
        else:
            file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def checked_line(record: dict[str, Any]) -> str:
    """``record`` as one JSON line that ends with the checksum of the rest of it."""
    text = json.dumps(record, ensure_ascii=False)
    return f'{text[:-1]}, "crc": {zlib.crc32(text.encode())}}}\n'


def read_checked_line(line: bytes) -> dict[str, Any]:
    """The record of a line of ``checked_line``. Raises: ValueError if the line is torn, changed or something else."""
    text, separator, crc = line.rpartition(b', "crc": ')
    if not separator or crc != b"%d}\n" % zlib.crc32(text + b"}"):
        raise ValueError("torn or changed line")
    return json.loads(text + b"}")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder that takes the place of ``folder`` when the block ends; its files are on the disk, with SHA256SUMS.

    Raises:
        RunStopped: it cannot be written; what was at ``folder`` is still there.
    """
    temporary, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("new", "old"))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        sums = {path.name: sha256(path) for path in sorted(temporary.iterdir()) if path.is_file()}
        (temporary / CHECKSUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunStopped(
            f"cannot write {folder}: {error.strerror}; make room, then run the same command again", here_only=True
        ) from None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: IO[bytes]) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def check_sums(folder: Path, key: str) -> None:
    """Compare a folder with its SHA256SUMS (``sha256sum -c``), where it has one.

    Raises:
        UserError: a file is missing or is not the one that was exported (``key`` names the setting).
    """
    sums = folder / CHECKSUMS
    if not sums.is_file():
        return
    for line in sums.read_text(errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        path = folder / name
        if not name or not path.is_file() or sha256(path) != digest:
            raise UserError(
                f"{key}: {path} is damaged or was changed after its export ({CHECKSUMS}); restore it, or delete "
                f"{sums} if the change is meant"
            )


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a run folder while the block runs; yields whether it could be had. Gone with the process.

    Raises:
        UserError: the folder cannot be made or written.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise UserError(f"cannot write the run folder {folder}: {error.strerror}; choose another --runs_dir") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
