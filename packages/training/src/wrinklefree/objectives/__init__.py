"""What training minimises: objectives, each a sum over tokens, on one forward of the student.

    create_objective_manager({"continue_pretrain": {"weight": 1.0}, "logits_distill": {"weight": 1.0}})

One file per objective; `vocabulary.py` keeps full-vocabulary logits out of memory.
"""

from wrinklefree.objectives.attention_distill import (
    AttentionDistillConfig,
    AttentionRelationDistillationObjective,
)
from wrinklefree.objectives.base import LossSum, Needs, Objective, ObjectiveConfig
from wrinklefree.objectives.bitdistill import BitDistillConfig, BitDistillObjective, BitDistillPreset
from wrinklefree.objectives.continue_pretrain import ContinuePretrainConfig, ContinuePretrainObjective
from wrinklefree.objectives.curriculum import CurriculumPhase, CurriculumScheduler
from wrinklefree.objectives.diffusion import DiffusionConfig
from wrinklefree.objectives.divergence import Divergence
from wrinklefree.objectives.dlm import DLMConfig, DLMObjective
from wrinklefree.objectives.factory import (
    create_curriculum_scheduler,
    create_objective,
    create_objective_manager,
)
from wrinklefree.objectives.hidden_states import LayerWeights
from wrinklefree.objectives.layerwise import (
    LayerwiseConfig,
    LayerwiseDistillationObjective,
    LayerwiseLossType,
)
from wrinklefree.objectives.logits_distill import (
    LogitsDistillationObjective,
    LogitsDistillConfig,
    check_vocabularies,
)
from wrinklefree.objectives.lrc_reconstruction import (
    LRCLossType,
    LRCReconstructionConfig,
    LRCReconstructionObjective,
)
from wrinklefree.objectives.manager import ManagerOutput, ObjectiveManager
from wrinklefree.objectives.relations import Normalization
from wrinklefree.objectives.states import DecoderStates, States, decoder_states
from wrinklefree.objectives.tcs_distill import TCSDistillationObjective, TCSDistillConfig
from wrinklefree.objectives.views import ViewPlan

__all__ = [
    "AttentionDistillConfig",
    "AttentionRelationDistillationObjective",
    "BitDistillConfig",
    "BitDistillObjective",
    "BitDistillPreset",
    "ContinuePretrainConfig",
    "ContinuePretrainObjective",
    "CurriculumPhase",
    "CurriculumScheduler",
    "DLMConfig",
    "DLMObjective",
    "DecoderStates",
    "DiffusionConfig",
    "Divergence",
    "LRCLossType",
    "LRCReconstructionConfig",
    "LRCReconstructionObjective",
    "LayerWeights",
    "LayerwiseConfig",
    "LayerwiseDistillationObjective",
    "LayerwiseLossType",
    "LogitsDistillConfig",
    "LogitsDistillationObjective",
    "LossSum",
    "ManagerOutput",
    "Needs",
    "Normalization",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveManager",
    "States",
    "TCSDistillConfig",
    "TCSDistillationObjective",
    "ViewPlan",
    "check_vocabularies",
    "create_curriculum_scheduler",
    "create_objective",
    "create_objective_manager",
    "decoder_states",
]
