"""Does an engine compute with a GGUF file what PyTorch computes with the checkpoint?

Next-token distributions at a few hundred positions of text, one call of the engine each. Types of plain
fp16 and fp32 leave activations alone, so they are held against the model with float activations, narrowly.
All other types have the engine round activations, in blocks of its own choice, so they are held against the
int8 model, within twice of what int8 rounding does to that model anyway.

    f16, f32    mean KL(float ‖ engine) ≤ 1e-5, and the same most likely token wherever the model prefers it
                by more than five times the engine's error
    others      mean KL(int8 ‖ engine) ≤ 2 · mean KL(int8 ‖ float), or ≤ 1e-5 where that is less

Shapes: P positions, V vocabulary, K tokens that the engine names.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bitnet_serving.divergence import as_tensors, kl, kl_to_top
from bitnet_serving.engine import Engine, TopLogProbs
from bitnet_serving.reference import Reference, Tables, load_reference, reference_log_probs
from durable import ExitCode, UserError

FLOAT_TYPES = ("f16", "f32")
LARGEST_FLOAT_KL = 1e-5
INT8_NOISE_FACTOR = 2.0
CLEAR_PREFERENCE = 5.0
"""Top-two gap over the measured error of log-probabilities."""
WHOLE_VOCABULARY = 2048
"""Up to here the engine names every token; above, the most likely `TOP_K`."""
TOP_K = 256
LONGEST_SEQUENCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCheck:
    """What the engine's predictions are, next to PyTorch's. KL in nats, means over positions."""

    num_positions: int
    num_named: int
    """Tokens that the engine named at each."""
    kl_to_float: float
    kl_to_int8: float
    int8_noise: float
    """KL(int8 ‖ float): what int8 rounding does to the model itself."""
    error: float
    """Root mean square of log-probabilities' difference from the float model's."""
    num_clear: int
    """Positions where the float model prefers one token clearly."""
    num_clear_missed: int
    """Those where the engine prefers another."""
    is_float: bool
    """The type leaves activations alone."""

    @property
    def kl(self) -> float:
        """The divergence that counts for this type."""
        return self.kl_to_float if self.is_float else self.kl_to_int8

    @property
    def largest_kl(self) -> float:
        """What it may be. Where int8 rounding is hardly felt, fp16 is what limits."""
        noise = 0.0 if self.is_float else INT8_NOISE_FACTOR * self.int8_noise
        return max(LARGEST_FLOAT_KL, noise)


def check_engine(
    path: Path,
    checkpoint: Path,
    sequences: Sequence[Sequence[int]],
    engine: Engine,
    *,
    body: str,
    tables: Tables,
) -> EngineCheck:
    """Run the file and the checkpoint over the same tokens; every position counts."""
    reference = reference_log_probs(load_reference(checkpoint), sequences, tables=tables)
    num_tokens = len(tables.embedding)
    top_k = num_tokens if num_tokens <= WHOLE_VOCABULARY else TOP_K
    top = [
        at_position
        for sequence in sequences
        for at_position in engine.next_log_probs(sequence, range(len(sequence)), top_k)
    ]
    num_whole = sum(len(set(each.ids)) == top_k for each in top)
    if not num_whole == len(top) == len(reference.int8):
        raise UserError(
            f"{path}: the engine answered with less than was asked for",
            found=f"{top_k} tokens at {num_whole} of {len(reference.int8)} positions",
            fix="export the file again",
            exit_code=ExitCode.BAD_DATA,
        )
    return compare(reference, top, is_float=body in FLOAT_TYPES)


def compare(reference: Reference, top: Sequence[TopLogProbs], *, is_float: bool) -> EngineCheck:
    """Distances between the engine's predictions and both of PyTorch's."""
    ids_PK, found_PK = as_tensors(top)
    error = float((reference.float.gather(1, ids_PK) - found_PK).square().mean().sqrt())
    best_P2, best_ids_P2 = reference.float.topk(2, dim=-1)
    clear_P = best_P2[:, 0] - best_P2[:, 1] > CLEAR_PREFERENCE * error
    missed_P = clear_P & (_most_likely(ids_PK, found_PK) != best_ids_P2[:, 0])
    return EngineCheck(
        num_positions=len(ids_PK),
        num_named=ids_PK.shape[1],
        kl_to_float=float(kl_to_top(reference.float, top).mean()),
        kl_to_int8=float(kl_to_top(reference.int8, top).mean()),
        int8_noise=float(kl(reference.int8, reference.float).mean()),
        error=error,
        num_clear=int(clear_P.sum()),
        num_clear_missed=int(missed_P.sum()),
        is_float=is_float,
    )


def _most_likely(ids_PK: Tensor, log_probs_PK: Tensor) -> Tensor:
    return ids_PK.gather(1, log_probs_PK.argmax(-1, keepdim=True)).squeeze(1)


def split(ids: Sequence[int], num_positions: int, context: int) -> list[list[int]]:
    """So many positions of a text, in sequences of about equal length that the context holds."""
    longest = max(1, min(LONGEST_SEQUENCE, context - 1))
    num_sequences = -(-num_positions // longest)
    length = -(-num_positions // num_sequences)
    return [list(ids[begin : begin + length]) for begin in range(0, num_positions, length)]
