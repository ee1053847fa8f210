"""Save and load ternary models: directories that are whole or not there, safetensors and json only.

    model.safetensors  config.json  generation_config.json  bitnet.json  README.md  [tokenizer files]
    manifest.json  [originals.safetensors: what the stock layout cannot hold to the bit]

`training` is the layout of every run: plain tensors under their own names. `stock` is what plain
transformers loads, see `stock`.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bitnet_arch.diffusion import set_block_diffusion
from bitnet_arch.finite import refuse_unusable_tensors
from bitnet_arch.model_card import model_card
from bitnet_arch.packed import PackedBitLinear
from bitnet_arch.quant import TernaryWeight
from bitnet_arch.rebuild import empty_model, finish, hand_over, make_ternary
from bitnet_arch.record import RECORD_NAME, BitnetRecord, Layout, describe, read_record
from bitnet_arch.stock import from_stock, ternary_weights, to_stock
from bitnet_arch.stock_host import SHARED_FIELDS
from bitnet_arch.walk import ModelWalk, config_of, walk
from durable import ExitCode, UserError, publish, verify

TENSORS_NAME = "model.safetensors"
ORIGINALS_NAME = "originals.safetensors"
LAYOUTS = ("training", "stock")
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


class Tokenizer(Protocol):
    """What saving needs of a tokenizer; transformers' have it."""

    def save_pretrained(self, save_directory: str) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFiles:
    """A model as the files of its directory, checked and ready to write."""

    tensors: dict[str, dict[str, Tensor]]
    """File name → tensors."""
    texts: dict[str, str]
    """File name → content."""

    @property
    def num_bytes(self) -> int:
        """About what they take on disk."""
        return sum(tensor.nbytes for tensors in self.tensors.values() for tensor in tensors.values())

    def write(self, directory: Path) -> None:
        """Into a directory that `durable.publish` watches over."""
        for name, tensors in self.tensors.items():
            save_file(_own_memory(tensors), directory / name, {"format": "pt"})
        for name, text in self.texts.items():
            (directory / name).write_text(text, encoding="utf-8")
        # safetensors makes files for their owner alone; a model is as readable as its configuration.
        for name in self.tensors:
            shutil.copymode(directory / "config.json", directory / name)


def save_bitnet(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    layout: Layout = "training",
    packed: bool = False,
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Publish a converted model as a directory, in place of what an earlier save left there."""
    target = Path(directory)
    # Whatever can be wrong with the model is found before anything is written.
    files = checkpoint_files(model, layout=layout, packed=packed)
    replace = (target / RECORD_NAME).is_file()
    with publish(target, replace=replace, bytes_needed=files.num_bytes) as temporary:
        files.write(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
    return target


def checkpoint_files(
    model: nn.Module,
    *,
    layout: Layout = "training",
    packed: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> CheckpointFiles:
    """The files of a converted model, for a caller that publishes them among its own.

    `state_dict` is for a model whose parameters are sharded: the gathered tensors, under the same names.
    """
    _check_request(model, layout, packed)
    walked = walk(model)
    record = describe(model, walked, layout=layout, packed=packed)
    named = model.state_dict() if state_dict is None else state_dict
    refuse_unusable_tensors(named, action="save")
    tensors = {name: tensor.detach().cpu() for name, tensor in named.items() if name not in record.ties}
    config = _config(model, walked, tensors)
    files = {TENSORS_NAME: tensors}
    if layout == "stock":
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        dense = [name for name in linears if name not in record.ternary]
        stock = to_stock(tensors, config, record, walked, dense=dense)
        config, record = stock.config, stock.record
        files = {TENSORS_NAME: stock.tensors} | ({ORIGINALS_NAME: stock.originals} if stock.originals else {})
    texts = {
        "config.json": json.dumps(config, indent=2, sort_keys=True) + "\n",
        RECORD_NAME: record.to_json(),
        "README.md": model_card(record, type(model).__name__, config["dtype"]),
    }
    generation_config = getattr(model, "generation_config", None)
    if generation_config is not None:
        texts["generation_config.json"] = generation_config.to_json_string()
    return CheckpointFiles(tensors=files, texts=texts)


def load_bitnet(directory: str | os.PathLike[str]) -> PreTrainedModel:
    """The model that `save_bitnet` left in a directory, to the bit, on the CPU and in evaluation mode."""
    source, record = open_checkpoint(directory)
    model = empty_model(source, record)
    make_ternary(model, record, source)
    hand_over(model, read_tensors(source, record), record, source)
    set_block_diffusion(model, record.diffusion)
    finish(model, source)
    return model


def load_packed(directory: str | os.PathLike[str]) -> dict[str, TernaryWeight]:
    """Codes and scale of every ternary projection of a saved model, by module path."""
    source, record = open_checkpoint(directory)
    return ternary_weights(read_tensors(source, record), record)


def open_checkpoint(directory: str | os.PathLike[str]) -> tuple[Path, BitnetRecord]:
    """Check every byte of a saved model and read its record."""
    source = Path(directory)
    _refuse_foreign(source)
    verify(source)
    return source, read_record(source)


def read_tensors(source: Path, record: BitnetRecord) -> dict[str, Tensor]:
    """All tensors, named and valued as in the state dict of the saved model; packed weights as codes and
    scale.
    """
    tensors = _load_file(source / TENSORS_NAME)
    if record.layout == "training":
        return tensors
    originals = source / ORIGINALS_NAME
    return from_stock(tensors, _load_file(originals) if originals.is_file() else {}, record)


def _check_request(model: nn.Module, layout: str, packed: bool) -> None:
    if layout not in LAYOUTS:
        raise UserError("layout: no such choice", layout, exit_code=ExitCode.BAD_INPUT, choices=LAYOUTS)
    if packed and layout == "training":
        raise UserError(
            "packed: the training layout keeps latent weights",
            found='layout="training"',
            fix='use layout="stock" for packed weights',
            exit_code=ExitCode.BAD_INPUT,
        )
    if not packed and any(isinstance(module, PackedBitLinear) for module in model.modules()):
        raise UserError(
            "packed: this model was loaded from packed weights and has no latent ones",
            found=f'layout="{layout}", packed=False',
            fix='use layout="stock" with packed=True',
            exit_code=ExitCode.BAD_INPUT,
        )


def _config(model: nn.Module, walked: ModelWalk, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `config.json` says: what the model is now, and nothing of how it was loaded."""
    everything = json.loads(config_of(model).to_json_string(use_diff=False))
    config: dict[str, Any] = json.loads(config_of(model).to_json_string())
    # Another class may have other defaults for these.
    config |= {name: everything[name] for name in SHARED_FIELDS if name in everything}
    for name in ("quantization_config", "auto_map", "_name_or_path"):
        config.pop(name, None)
    return config | {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[walked.family]],
        "dtype": str(tensors[f"{walked.embedding}.weight"].dtype).removeprefix("torch."),
        "tie_word_embeddings": walked.is_tied,
    }


def _own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """safetensors writes neither views nor two tensors that share their memory."""
    owned: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.contiguous()
        storage = whole.untyped_storage()
        is_shared = storage.nbytes() != whole.nbytes or storage.data_ptr() in seen
        owned[name] = whole.clone() if is_shared else whole
        seen.add(storage.data_ptr())
    return owned


def _load_file(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: not a readable safetensors file",
            found=str(error),
            fix="copy the directory again or use an earlier checkpoint",
            exit_code=ExitCode.BAD_DATA,
        ) from None


def _refuse_foreign(source: Path) -> None:
    if source.suffix in PICKLES:
        raise _pickle(source)
    if not source.is_dir():
        raise UserError(
            f"{source}: no such directory",
            found="a file" if source.exists() else None,
            fix="give the directory that save_bitnet wrote",
            exit_code=ExitCode.BAD_INPUT,
        )
    if (source / RECORD_NAME).is_file():
        return
    pickles = sorted(path for path in source.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise _pickle(pickles[0])
    raise UserError(
        f"{source}: not a directory of save_bitnet",
        found=f"no {RECORD_NAME}",
        fix="convert the model with convert_to_bitnet and save it with save_bitnet",
        exit_code=ExitCode.BAD_DATA,
    )


def _pickle(path: Path) -> UserError:
    return UserError(
        f"{path}: pickles are not read, because loading one can run any code",
        fix="convert it to safetensors where it comes from, then load the directory",
        exit_code=ExitCode.BAD_DATA,
    )
