"""What is minimised beside the tasks' cross-entropy: pure functions of tensors, and objectives that YAML can list."""

from lit_distill.objectives.answer_consistency import AnswerConsistency
from lit_distill.objectives.attention import AttentionScores
from lit_distill.objectives.base import Objective, Step, build_objective, check_objectives, check_stored
from lit_distill.objectives.chunks import divergence, sum_of_logits
from lit_distill.objectives.contrastive import Contrastive
from lit_distill.objectives.distributions import (
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TotalVariation,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    total_variation,
)
from lit_distill.objectives.exits import MultiExit
from lit_distill.objectives.hidden import HiddenStates, PredictionHeads, ProjectorLadder
from lit_distill.objectives.mutual_information import MutualInformation
from lit_distill.objectives.mutual_information_cot import MutualInformationCoT
from lit_distill.objectives.own_text import GKD, DistiLLM, MiniLLM
from lit_distill.objectives.progressive import Progressive
from lit_distill.objectives.teacher_dropping import TeacherDropping

__all__ = [
    "GKD",
    "AnswerConsistency",
    "AttentionScores",
    "Contrastive",
    "DistiLLM",
    "Divergence",
    "ForwardKL",
    "HiddenStates",
    "JensenShannon",
    "MiniLLM",
    "MultiExit",
    "MutualInformation",
    "MutualInformationCoT",
    "Objective",
    "PredictionHeads",
    "Progressive",
    "ProjectorLadder",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "Step",
    "TeacherDropping",
    "TotalVariation",
    "build_objective",
    "check_objectives",
    "check_stored",
    "divergence",
    "forward_kl",
    "jensen_shannon",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "sum_of_logits",
    "total_variation",
]
