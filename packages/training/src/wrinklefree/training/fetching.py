"""A checkpoint at an address (`gs://…`, `s3://…`, whatever fsspec opens), copied here and verified.

    address ─► its directory, or the newest below it ─► {cache}/checkpoints/{hash of the address}/{name}

The copy must have the sizes and hashes of the manifest that lies at the address. It is kept: the same
checkpoint is not copied twice, and one that changed at its address is copied again.
"""

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from durable import MANIFEST_NAME, ExitCode, Manifest, UserError, publish, read_manifest, verify
from wrinklefree.training.data import user_cache

logger = logging.getLogger(__name__)
PICKLES = (".pt", ".ckpt", ".bin", ".pth")


def fetched(address: str, *, key: str, ignore: Collection[str] = ()) -> Path:
    """The copy of the checkpoint at an address; UserError (exit code 4) when there is none that is whole.

    `key` is what the person wrote the address for. Of several there, those named in `ignore` do not count.
    """
    found = fetched_if_any(address, key=key, ignore=ignore)
    if found is None:
        raise UserError(f"{key}: holds no checkpoint", address, exit_code=ExitCode.BAD_DATA)
    return found


def fetched_if_any(address: str, *, key: str, ignore: Collection[str] = ()) -> Path | None:
    """The same; None where nobody put a checkpoint."""
    with _one_line(key, address):
        filesystem, path = fsspec.core.url_to_fs(address)
        place = PurePosixPath(path)
        if place.suffix in PICKLES:
            if filesystem.isfile(str(place)):
                raise pickle_refused(address)
            place = place.parent
        damage: list[UserError] = []
        for remote, manifest in _candidates(filesystem, place, ignore, damage):
            try:
                return _copied(filesystem, remote, manifest, filesystem.unstrip_protocol(str(remote)))
            except UserError as error:
                if error.exit_code != ExitCode.BAD_DATA:
                    raise
                _skip(error, damage)
        if damage:
            raise damage[0]
        return None


def pickle_refused(path: object) -> UserError:
    """The error for a checkpoint that would have to be unpickled."""
    return UserError(
        f"{path}: a pickle is refused, since opening it runs whatever code is inside",
        fix="name the directory of a checkpoint",
        exit_code=ExitCode.BAD_DATA,
    )


def padded_step(name: str) -> str:
    """`step_5000` means `step_005000`; any other name stays."""
    word, _, number = name.rpartition("_")
    return f"step_{int(number):06d}" if word == "step" and number.isdigit() else name


def _candidates(
    filesystem: Any, place: PurePosixPath, ignore: Collection[str], damage: list[UserError]
) -> list[tuple[PurePosixPath, Manifest]]:
    """The checkpoint at a place, or those below it, the newest first; `damage` gets what is none."""
    for itself in dict.fromkeys([place, place.with_name(padded_step(place.name))] if place.name else [place]):
        if filesystem.isfile(str(itself / MANIFEST_NAME)):
            return [(itself, _manifest(filesystem, itself))]
    folder = place / "checkpoints" if filesystem.isdir(str(place / "checkpoints")) else place
    listed = filesystem.ls(str(folder), detail=False) if filesystem.isdir(str(folder)) else []
    pairs = []
    for remote in map(PurePosixPath, listed):
        if remote.name not in ignore and filesystem.isfile(str(remote / MANIFEST_NAME)):
            try:
                pairs.append((remote, _manifest(filesystem, remote)))
            except UserError as error:
                _skip(error, damage)
    return sorted(pairs, key=lambda pair: int(pair[1].metadata.get("step", -1)), reverse=True)


def _skip(error: UserError, damage: list[UserError]) -> None:
    logger.warning("skipped a damaged checkpoint: %s", error.problem)
    damage.append(error)


def _manifest(filesystem: Any, remote: PurePosixPath) -> Manifest:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / MANIFEST_NAME).write_bytes(filesystem.cat_file(str(remote / MANIFEST_NAME)))
        return read_manifest(directory)


def _copied(filesystem: Any, remote: PurePosixPath, manifest: Manifest, address: str) -> Path:
    folder = user_cache() / "checkpoints" / hashlib.sha256(address.encode()).hexdigest()[:16]
    target = folder / remote.name
    if _has(target, manifest):
        return target
    logger.info("copying %s to %s", address, target)
    if target.exists():
        shutil.rmtree(target)
    with publish(target, metadata=manifest.metadata, bytes_needed=manifest.num_bytes) as directory:
        for name in manifest.files:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            filesystem.get_file(str(remote / name), str(directory / name))
    copied = read_manifest(target).files
    wrong = [name for name, entry in manifest.files.items() if copied.get(name) != entry]
    if wrong:
        shutil.rmtree(target)
        raise UserError(
            f"{address}: {wrong[0]} is not what its manifest says",
            fix="name an earlier checkpoint, or copy it there again",
            exit_code=ExitCode.BAD_DATA,
        )
    return target


def _has(target: Path, manifest: Manifest) -> bool:
    try:
        return target.is_dir() and verify(target).files == manifest.files
    except UserError:
        return False


@contextmanager
def _one_line(key: str, address: str) -> Iterator[None]:
    """Filesystems raise whatever their libraries do; none of it is a fault of ours."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{key}: {address} cannot be read",
            f"{type(error).__name__}: {error}",
            "see that the address is right, its package installed and its credentials set",
            ExitCode.BAD_DATA,
        ) from error
