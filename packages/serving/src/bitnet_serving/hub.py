"""Publish a checkpoint on a hub of models: the stock layout, written to a temporary directory and uploaded.

    print(export_hub("outputs/run", "me/my-model", dry_run=True))   # the files, and nothing is sent

The token is the one that `huggingface_hub` finds (HF_TOKEN, or a login), and the address is HF_ENDPOINT's.
"""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from bitnet_arch.checkpoint import ORIGINALS_NAME
from bitnet_serving.stock_export import StockReport, export_hf, list_files
from durable import ExitCode, UserError, error_line


@dataclass(frozen=True, slots=True, kw_only=True)
class HubReport:
    """What went, or would go, where."""

    address: str
    is_sent: bool
    stock: StockReport

    def __str__(self) -> str:
        size = sum(self.stock.files.values())
        what = f"{len(self.stock.files)} files, {size:,} bytes"
        told = f"{what} are at" if self.is_sent else f"dry run, nothing was sent; {what} would go to"
        return f"{told} {self.address}\n{list_files(self.stock.files)}"


def export_hub(
    checkpoint: str | PathLike[str],
    repository: str,
    *,
    dry_run: bool = False,
    private: bool = False,
    packed: bool = False,
    at_full_quantisation: bool = False,
) -> HubReport:
    """Upload a checkpoint (or the newest one of a run) to ORG/NAME, which is made if it is not there."""
    _check_name(repository)
    api = HfApi()
    if not dry_run and get_token() is None:
        raise _not_sent(
            repository, "no token", "set HF_TOKEN, or log in with `hf auth login`; --dry-run needs none"
        )
    with TemporaryDirectory() as name:
        stock = export_hf(
            checkpoint, Path(name) / "model", packed=packed, at_full_quantisation=at_full_quantisation
        )
        if not dry_run:
            _upload(api, repository, stock.path, private=private)
    return HubReport(address=f"{api.endpoint}/{repository}", is_sent=not dry_run, stock=stock)


def _upload(api: HfApi, repository: str, directory: Path, *, private: bool) -> None:
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        # One that is not among the files now is of another model.
        api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            commit_message="Upload a ternary model",
            delete_patterns=[ORIGINALS_NAME],
        )
    except Exception as error:  # the hub's client has many ways to say that it did not work
        raise _not_sent(
            repository,
            error_line(error).removeprefix("error: "),
            "check the network, the token's right to write, and that the name is yours",
        ) from None


def _check_name(repository: str) -> None:
    try:
        validate_repo_id(repository)
        is_named = repository.count("/") == 1
    except HFValidationError:
        is_named = False
    if not is_named:
        raise UserError("no name of a repository on the hub", repository, "give ORG/NAME")


def _not_sent(repository: str, found: str, fix: str) -> UserError:
    return UserError(f"{repository}: cannot be uploaded", found, fix, ExitCode.CANNOT_WRITE)
