"""The loss of every packed sample under a transformers decoder: what influence differentiates.

Documents in a block do not see each other, as in training. Shapes: B samples, T tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_handler.masks import attention_mask
from data_handler.types import IGNORED_LABEL, Batch


def language_loss(model: nn.Module, batch: Batch) -> Tensor:
    """[B] mean loss over the wanted tokens of every sample; 0 where none is wanted."""
    device = next(model.parameters()).device
    batch = batch.to(device)
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=attention_mask(getattr(model, "config", None), batch.document_ids),
        use_cache=False,
    )
    logits_BTV: Tensor = output.logits[:, :-1].float()
    labels_BT = batch.labels[:, 1:]
    loss_BT = F.cross_entropy(
        logits_BTV.transpose(1, 2), labels_BT, ignore_index=IGNORED_LABEL, reduction="none"
    )
    num_wanted_B = (labels_BT != IGNORED_LABEL).sum(dim=1)
    mean_B: Tensor = loss_BT.sum(dim=1) / torch.clamp(num_wanted_B, min=1)
    return mean_B
