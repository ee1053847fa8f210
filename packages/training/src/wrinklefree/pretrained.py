"""Open a pretrained decoder wherever it lies: a directory, a `.gguf` file, the hub or its cache, or built in.

Everything a person can get wrong about it ends in a `UserError`. Pickled weights are refused before anything
is opened; code from a checkpoint is never run. A checkpoint with missing tensors is refused, where
transformers would fill them with random numbers.
"""

import contextlib
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bitnet_arch import testing
from durable import ExitCode, UserError, error_line

Result = TypeVar("Result")

TINY_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    build.__name__: build for build in testing.TINY_MODELS.values()
}
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A decoder as it was saved, with its tokenizer where it has one."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    source: str


def load_pretrained(name: str) -> Pretrained:
    """The decoder that `name` stands for, in the dtype it was saved in."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = Path(name).expanduser()
    if name in TINY_MODELS:
        return Pretrained(TINY_MODELS[name](), tokenizer=None, source=f"{name} (built in, random)")
    if path.is_dir():
        return load_directory(path)
    if path.is_file():
        return load_file(path)
    if _is_meant_as_path(name):
        raise UserError("no such file or directory", found=name, choices=_neighbours(path))
    return load_directory(hub_directory(name), source=name)


def described_by(name: str) -> PretrainedConfig:
    """The configuration of that decoder, without its weights."""
    path = Path(name).expanduser()
    if name in TINY_MODELS:
        return TINY_MODELS[name]().config
    if path.is_file():
        return load_file(path).model.config
    if not path.is_dir():
        if _is_meant_as_path(name):
            raise UserError("no such file or directory", found=name, choices=_neighbours(path))
        path = _hub_config(name).parent
    _check_config(path, name)
    config: PretrainedConfig = _open(
        name, lambda: AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    )
    return config


def are_weights_here(name: str) -> bool:
    """Whether opening that decoder would fetch nothing."""
    return name in TINY_MODELS or bool(weight_files(name))


def weight_files(name: str) -> list[Path]:
    """The files with its weights on this disk; none where they would have to be fetched, or are built in."""
    path = Path(name).expanduser()
    if name in TINY_MODELS:
        return []
    if path.is_file():
        return [path]
    if not path.is_dir():
        try:
            path = Path(snapshot_download(name, local_files_only=True))
        except Exception:  # the hub's client has many ways to say that it is not there
            return []
    return sorted(path.glob("*.safetensors"))


def _hub_config(name: str) -> Path:
    try:
        return Path(hf_hub_download(name, "config.json", etag_timeout=HUB_TIMEOUT_SECONDS))
    except GatedRepoError:
        raise _gated(name) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise _unknown(name) from None
    except Exception as error:
        raise _unreachable(name, error) from error


def load_directory(directory: Path, *, source: str | None = None) -> Pretrained:
    """A directory that `save_pretrained` wrote."""
    source = source or str(directory)
    _check_config(directory, source)
    _check_weights(directory, source)
    model = _model(directory, source, dtype="auto")
    return Pretrained(model, tokenizer_beside(directory, source), source)


def tokenizer_beside(directory: Path, source: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was saved with a model; None where there is none."""
    if not any((directory / name).exists() for name in TOKENIZER_FILES):
        return None
    return _open(source, lambda: _tokenizer(directory))


def load_file(path: Path) -> Pretrained:
    """A single file: a GGUF, or something that is refused with a reason."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise _pickle_refused(path)
    if path.suffix.lower() != ".gguf":
        raise UserError(
            f"{path}: not a model", found=path.suffix or "a file", fix="name its directory, or a .gguf file"
        )
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path}: not a GGUF file, or a damaged one", exit_code=ExitCode.BAD_DATA)
    place, name = path.parent, path.name
    # fp32, because the stored values are de-quantised blocks: no narrower dtype holds them all.
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
        model = _model(place, str(path), dtype=torch.float32, gguf_file=name)
    return Pretrained(model, _open(str(path), lambda: _tokenizer(place, gguf_file=name)), str(path))


def hub_directory(name: str) -> Path:
    """The files of a hub model, on this disk: the hub is asked once; when it is silent, the cache serves."""
    try:
        files = [
            file.rfilename for file in HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS).siblings or ()
        ]
    except GatedRepoError:
        raise _gated(name) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise _unknown(name) from None
    except Exception as error:
        return _cached_directory(name, error)
    if not any(file.endswith(".safetensors") for file in files):
        raise _pickle_refused(Path(name))
    wanted = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    return Path(_open(name, lambda: snapshot_download(name, allow_patterns=wanted)))


def _cached_directory(name: str, hub_error: Exception) -> Path:
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception:
        raise _unreachable(name, hub_error) from hub_error


def _gated(name: str) -> UserError:
    return UserError(
        f"{name}: the hub asks for an accepted licence", fix="accept it there, then set HF_TOKEN"
    )


def _unreachable(name: str, hub_error: Exception) -> UserError:
    problem = error_line(hub_error).removeprefix("error: ")
    return UserError(
        f"unknown model: no directory here, not in the cache, and the hub cannot be reached ({problem})",
        found=name,
        fix="name a local directory, a .gguf file or a built-in model, or check the network",
        exit_code=ExitCode.BAD_DATA,
        choices=[*TINY_MODELS, *_neighbours(Path(name))],
    )


def _check_config(directory: Path, source: str) -> None:
    config_path = directory / "config.json"
    if (directory / "bitnet.json").exists():
        raise UserError(f"{source}: already converted", fix="open it with bitnet_arch.load_bitnet")
    if not config_path.exists():
        names = [path.name for path in sorted(directory.iterdir())]
        _refuse_pickles(directory)
        raise UserError(
            f"{source}: not a model directory, it has no config.json",
            found=", ".join(names[:5]) or "an empty directory",
            fix="name the directory that save_pretrained wrote, or a .gguf file",
        )
    try:
        config = json.loads(config_path.read_text())
    except ValueError as error:
        raise UserError(f"{config_path}: not JSON", found=str(error), exit_code=ExitCode.BAD_DATA) from None
    if not isinstance(config, dict):
        raise UserError(f"{config_path}: no object", found=type(config).__name__, exit_code=ExitCode.BAD_DATA)
    model_type = config.get("model_type")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"{config_path}: model_type is no decoder that transformers {transformers.__version__} knows",
            found=model_type,
            choices=("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "bitnet"),
        )
    quantization = config.get("quantization_config")
    if quantization:
        raise UserError(
            f"{source}: already quantised",
            found=quantization.get("quant_method", "quantization_config"),
            fix="convert the full-precision model it was made from",
        )


def _check_weights(directory: Path, source: str) -> None:
    if any(directory.glob("*.safetensors")):
        return
    _refuse_pickles(directory)
    raise UserError(f"{source}: no weights", found="no .safetensors file", exit_code=ExitCode.BAD_DATA)


def _refuse_pickles(directory: Path) -> None:
    pickles = sorted(path for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise _pickle_refused(pickles[0])


def _pickle_refused(path: Path) -> UserError:
    return UserError(
        f"{path}: pickled weights are refused, since opening them runs whatever code is inside",
        fix="save the model as safetensors where you trust it: model.save_pretrained(DIR)",
        exit_code=ExitCode.BAD_DATA,
    )


def _open(source: str, load: Callable[[], Result]) -> Result:
    """Whatever a library says about unreadable files, as one line about the source."""
    try:
        return load()
    except (KeyboardInterrupt, MemoryError, UserError):
        raise
    except Exception as error:
        raise UserError(
            f"{source}: cannot be read",
            found=error_line(error).removeprefix("error: "),
            fix="download or save it again",
            exit_code=ExitCode.BAD_DATA,
        ) from error


def _model(directory: Path, source: str, **options: Any) -> PreTrainedModel:
    """Load, and refuse what transformers would fill with random numbers."""
    loaded: Any = _open(
        source,
        lambda: AutoModelForCausalLM.from_pretrained(
            directory,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        ),
    )
    model: PreTrainedModel = loaded[0]
    problems = [f"no {name}" for name in sorted(loaded[1]["missing_keys"])]
    problems += [
        f"{name} as {list(stored)} for {list(wanted)}"
        for name, stored, wanted in loaded[1]["mismatched_keys"]
    ]
    if problems:
        raise UserError(
            f"{source}: {len(problems)} tensors of the model are not in the checkpoint",
            found=", ".join(problems[:3]),
            fix="download or save it again",
            exit_code=ExitCode.BAD_DATA,
        )
    return model


def _tokenizer(directory: Path, **options: str) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        directory, local_files_only=True, trust_remote_code=False, **options
    )
    return tokenizer


def _unknown(name: str) -> UserError:
    choices = [*TINY_MODELS, *_neighbours(Path(name))]
    return UserError(
        "unknown model", found=name, fix="name a directory, a .gguf file or a hub model", choices=choices
    )


def _is_meant_as_path(name: str) -> bool:
    return (
        name.startswith((".", "/", "~"))
        or Path(name).suffix in (".gguf", *PICKLE_SUFFIXES)
        or not HUB_NAME.fullmatch(name)
    )


def _neighbours(path: Path) -> list[str]:
    """Directories beside the one that was named, with a name like it."""
    parent = path.parent
    names = [child.name for child in parent.iterdir() if child.is_dir()] if parent.is_dir() else []
    return [str(parent / name) for name in get_close_matches(path.name, sorted(names))]
