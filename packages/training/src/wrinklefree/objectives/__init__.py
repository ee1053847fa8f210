"""What training minimises: objectives, each a sum over tokens, on one forward of the student.

    create_objective_manager({"continue_pretrain": {"weight": 1.0}, "logits_distill": {"weight": 1.0}})

One file per objective; `vocabulary.py` keeps full-vocabulary logits out of memory.
"""

from wrinklefree.objectives.base import LossSum, Needs, Objective, ObjectiveConfig
from wrinklefree.objectives.continue_pretrain import ContinuePretrainConfig, ContinuePretrainObjective
from wrinklefree.objectives.curriculum import CurriculumPhase, CurriculumScheduler
from wrinklefree.objectives.diffusion import DiffusionConfig
from wrinklefree.objectives.dlm import DLMConfig, DLMObjective
from wrinklefree.objectives.factory import (
    create_curriculum_scheduler,
    create_objective,
    create_objective_manager,
)
from wrinklefree.objectives.logits_distill import (
    LogitsDistillationObjective,
    LogitsDistillConfig,
    check_vocabularies,
)
from wrinklefree.objectives.manager import ManagerOutput, ObjectiveManager
from wrinklefree.objectives.states import DecoderStates, States, decoder_states
from wrinklefree.objectives.views import ViewPlan

__all__ = [
    "ContinuePretrainConfig",
    "ContinuePretrainObjective",
    "CurriculumPhase",
    "CurriculumScheduler",
    "DLMConfig",
    "DLMObjective",
    "DecoderStates",
    "DiffusionConfig",
    "LogitsDistillConfig",
    "LogitsDistillationObjective",
    "LossSum",
    "ManagerOutput",
    "Needs",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveManager",
    "States",
    "ViewPlan",
    "check_vocabularies",
    "create_curriculum_scheduler",
    "create_objective",
    "create_objective_manager",
    "decoder_states",
]
