"""How many weights of each layer are zero, and how many codes have changed since the last look.

Codes of the last look are kept packed, 2 bits each, in memory and in checkpoints: what a run counts does not
depend on where it was interrupted.
"""

import pytorch_lightning as pl
from torch import Tensor, nn

from bitnet_arch.bitlinear import BitLinear
from bitnet_arch.packed import pack, unpack
from bitnet_arch.quant import quantize_weight
from wrinklefree.lightning.module import WrinkleFreeLightningModule
from wrinklefree.training.metrics import MetricsWriter


class TernaryStatisticsCallback(pl.Callback):
    """Rows of kind `ternary`: layer → share of zeros and share of flips. Only rank 0 looks."""

    def __init__(self, writer: MetricsWriter | None, *, every: int) -> None:
        self.writer = writer
        self.every = every
        self.codes: dict[str, Tensor] = {}
        """Layer → packed codes of the last look."""
        self.step = 0
        """Of the last look."""

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]

    def state_tensors(self) -> dict[str, Tensor]:
        return self.codes

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.codes = dict(tensors)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, WrinkleFreeLightningModule)
        if self.writer is not None and not self.codes:
            self.step = pl_module.progress.step
            self.codes = {name: packed(layer) for name, layer in ternary_layers(pl_module.model)}

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, WrinkleFreeLightningModule)
        step = pl_module.progress.step
        if self.writer is None or (step % self.every and step != pl_module.max_steps):
            return
        layers = {name: self._look(name, layer) for name, layer in ternary_layers(pl_module.model)}
        self.writer.write("ternary", {"step": step, "since": self.step, "layers": layers})
        self.step = step

    def _look(self, name: str, layer: BitLinear) -> dict[str, float]:
        now = packed(layer)
        num_weights = layer.weight.numel()
        codes, before = (unpack(each.to(now.device))[:num_weights] for each in (now, self.codes[name]))
        self.codes[name] = now
        return {
            "zeros": float((codes == 0).float().mean()),
            "flips": float((codes != before).float().mean()),
        }


def ternary_layers(model: nn.Module) -> list[tuple[str, BitLinear]]:
    """Name and module of each ternary layer."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, BitLinear)]


def packed(layer: BitLinear) -> Tensor:
    """Its codes as one column of bytes, whatever its shape; rows that fill up a group of four are 0."""
    codes = quantize_weight(layer.weight).codes.flatten()
    return pack(nn.functional.pad(codes, (0, -len(codes) % 4)).unsqueeze(1))
