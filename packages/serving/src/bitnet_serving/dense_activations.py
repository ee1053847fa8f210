"""What a model loses that was trained with sparse activations (Q-Sparse, arXiv 2407.10969) when an engine
computes it with all of them, which is the only way that engines know.

    KL(sparse ‖ dense) of the next token, in nats, over a page of text, both with int8 activations

This loads the whole model.
"""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from bitnet_arch import set_sparsity
from bitnet_serving.divergence import kl
from bitnet_serving.engine_check import split
from bitnet_serving.reference import load_reference, log_probs
from bitnet_serving.sample_text import DEFAULT_TEXT
from bitnet_serving.tokenizer_metadata import TOKENIZER_NAME

POSITIONS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseActivationsCost:
    """How far the dense model is from the sparse one."""

    kl: float
    """Mean over positions."""
    share_changed: float
    """Of the positions, where another token is the most likely one."""
    num_positions: int

    def __str__(self) -> str:
        changed = f"another most likely token at {100 * self.share_changed:.1f} %"
        return (
            "activations are sparse in the checkpoint and dense here: "
            f"{self.kl:.2e} nats of KL, and {changed} of {self.num_positions} positions"
        )


def cost_of_dense_activations(
    checkpoint: Path,
    *,
    tokenizer_dir: Path | None = None,
    text: str = DEFAULT_TEXT,
    positions: int = POSITIONS,
) -> DenseActivationsCost:
    """Read a text with a checkpoint's own sparsity, and without."""
    tokenizer = Tokenizer.from_file(str((tokenizer_dir or checkpoint) / TOKENIZER_NAME))
    ids = tokenizer.encode(text).ids[:positions]
    model = load_reference(checkpoint, keep_sparsity=True)
    sequences = split(ids, len(ids), model.config.max_position_embeddings)
    sparse_PV = log_probs(model, sequences, num_tokens=model.config.vocab_size)
    set_sparsity(model, None)
    dense_PV = log_probs(model, sequences, num_tokens=model.config.vocab_size)
    return DenseActivationsCost(
        kl=float(kl(sparse_PV, dense_PV).mean()),
        share_changed=float((sparse_PV.argmax(-1) != dense_PV.argmax(-1)).double().mean()),
        num_positions=len(sparse_PV),
    )
