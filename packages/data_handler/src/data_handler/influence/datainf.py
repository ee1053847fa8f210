"""DataInf (arXiv 2310.00902): influence in closed form, by swapping the mean and the inverse, layer by layer.

    (1/n Σᵢ gᵢgᵢᵀ + λI)⁻¹  ≈  1/n Σᵢ (gᵢgᵢᵀ + λI)⁻¹  =  1/λ [I − 1/n Σᵢ gᵢgᵢᵀ / (λ + ‖gᵢ‖²)]

    score(k) = Σ_layers vᵀ (that) g_k  =  Σ_layers ⟨w, g_k⟩ / λ,      w = v − 1/n Σᵢ gᵢ ⟨v, gᵢ⟩ / (λ + ‖gᵢ‖²)

v is the mean gradient of the probe. Here a score is *higher for better examples*: stepping against g_k lowers
the probe's loss (the paper's sign is the other one). For λ → ∞, λ · score(k) → ⟨v, g_k⟩. In a layer it is
exact for n = 1; the error grows with the layer, and the theory is for small ones (LoRA).

Shapes: n reference examples, m scored ones, D columns in blocks, one per layer.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from data_handler.influence.config import InfluenceConfig, InfluenceMethod
from data_handler.influence.gradients import ExampleLoss, GradientExtractor, num_examples, take


def damping_of(reference_nD: Tensor, *, ratio: float) -> Tensor:
    """λ of one layer: `ratio` times the mean squared gradient norm of the reference examples."""
    return ratio * reference_nD.pow(2).sum(dim=1).mean()


def swapped_inverse_times(probe_D: Tensor, reference_nD: Tensor, damping: Tensor) -> Tensor:
    """1/n Σᵢ (gᵢgᵢᵀ + λI)⁻¹ v in one layer, without a matrix of D × D."""
    shrink_n = (reference_nD @ probe_D) / (damping + reference_nD.pow(2).sum(dim=1))
    return (probe_D - (shrink_n @ reference_nD) / reference_nD.shape[0]) / damping


class DataInfCalculator:
    """Scores examples by how much a step on each would help each probe domain."""

    def __init__(self, extractor: GradientExtractor, config: InfluenceConfig | None = None) -> None:
        self.extractor = extractor
        self.config = config or InfluenceConfig()
        self._probes: dict[str, Tensor] = {}

    @property
    def is_cached(self) -> bool:
        return bool(self._probes)

    @property
    def domains(self) -> list[str]:
        return list(self._probes)

    def clear_cache(self) -> None:
        self._probes.clear()

    def cache_probe_gradients(self, probes: Mapping[str, Iterable[object]]) -> None:
        """Keep the mean gradient of every domain (D numbers each), at the model as it is now."""
        self._probes = {domain: self._mean_gradient(domain, batches) for domain, batches in probes.items()}

    def _mean_gradient(self, domain: str, batches: Iterable[object]) -> Tensor:
        total, count = torch.zeros(self.extractor.dim, dtype=torch.float64), 0
        for batch in batches:
            for start in range(0, num_examples(batch), self.extractor.chunk):
                part = take(batch, slice(start, start + self.extractor.chunk))
                count += num_examples(part)
                total += self.extractor(part).sum(dim=0).double().cpu()
        if count == 0:
            raise ValueError(f"The probe {domain} has no examples.")
        return total / count

    def gradients(self, batches: Iterable[object]) -> Tensor:
        """[m, D] on the CPU."""
        parts = [self.extractor(batch).cpu() for batch in batches]
        return torch.cat(parts) if parts else torch.zeros(0, self.extractor.dim)

    def directions(self, reference_nD: Tensor) -> dict[str, Tensor]:
        """Domain → w/λ [D]: the score of an example is the product of its gradient with this."""
        if not self.is_cached:
            raise RuntimeError("Call cache_probe_gradients before asking for influence.")
        if self.config.method is InfluenceMethod.GRADIENT_DOT:
            return dict(self._probes)
        return {domain: self._direction(probe_D, reference_nD) for domain, probe_D in self._probes.items()}

    def _direction(self, probe_D: Tensor, reference_nD: Tensor) -> Tensor:
        direction_D = torch.zeros_like(probe_D)
        for block in self.extractor.blocks.values():
            layer_nD = reference_nD[:, block].double()
            damping = damping_of(layer_nD, ratio=self.config.damping)
            # A layer without any gradient (a head that no example reached) says nothing.
            if damping != 0:
                direction_D[block] = swapped_inverse_times(probe_D[block], layer_nD, damping)
        return direction_D

    def compute_influence(
        self,
        batch: object,
        *,
        reference: Tensor | None = None,
        domain_weights: Mapping[str, float] | None = None,
    ) -> Tensor:
        """[B] scores, higher is better: the weighted mean over the domains.

        `reference` [n, D] are gradients of training examples (`gradients`); without it the batch is its own.
        """
        gradients_BD = self.extractor(batch).double().cpu()
        return self.scores(
            gradients_BD,
            reference=gradients_BD if reference is None else reference,
            domain_weights=domain_weights,
        )

    def scores(
        self, gradients_mD: Tensor, *, reference: Tensor, domain_weights: Mapping[str, float] | None = None
    ) -> Tensor:
        """[m] scores of examples whose gradients are known."""
        directions = self.directions(reference)
        shares = domain_shares(list(directions), domain_weights)
        direction_D = torch.stack([share * directions[domain] for domain, share in shares.items()]).sum(dim=0)
        return gradients_mD.double().cpu() @ direction_D


def domain_shares(domains: list[str], weights: Mapping[str, float] | None) -> dict[str, float]:
    """Weights of the domains that add up to 1; equal when none are given, and every domain must be named."""
    if weights is None:
        return {domain: 1 / len(domains) for domain in domains}
    if set(weights) != set(domains):
        raise ValueError(f"Domain weights name {sorted(weights)}, but the probes are {sorted(domains)}.")
    total = sum(weights.values())
    if not (total > 0 and min(weights.values()) >= 0):
        raise ValueError(f"Domain weights must be 0 or more with a sum above 0, got {dict(weights)}.")
    return {domain: weights[domain] / total for domain in domains}


def create_influence_calculator(
    model: nn.Module, loss: ExampleLoss, config: InfluenceConfig | None = None
) -> DataInfCalculator:
    """A calculator with its extractor, as `config` describes them."""
    config = config or InfluenceConfig()
    extractor = GradientExtractor(
        model,
        loss,
        layers=config.target_layers,
        projection_dim=config.projection_dim,
        seed=config.seed,
        chunk=config.batch_size,
    )
    return DataInfCalculator(extractor, config)
