"""What tells settings apart in the configs of runs."""

import json
import re
from collections.abc import Mapping
from typing import Any

from lit_distill.files import flatten

STUDENT = "model.init_args.student"
WEIGHT = "model.init_args.rationale_weight"
LABELS = "data.init_args.label_source"
FRACTION = "data.init_args.train_fraction"
PAIRING = "data.init_args.rationale_pairing"
VARIANT = "variant"

NOT_THE_RESULT = re.compile(
    r"trainer\.(logger|enable_\w+|log_every_n_steps|profiler|strategy|accelerator)\b"
    # how the tested checkpoint is chosen does make a difference
    r"|checkpoint$|checkpoint\.(?!(monitor|mode)$)|(ckpt_path|predictions|weights_only|cpu_threads)\b"
    r"|(test_after_fit|baseline_after_fit|push_to_hub|resume)$"
    r"|data\.init_args\.(num_workers|eval_batch_size|predict_split)$"
    r"|model\.init_args\.(num_samples|score_choices|evaluate_\w+|fast)$"
    r"|model\.init_args\.teachers\.[^.]+\.(device|offload)$"
    # seeds, and where files are
    r"|(seed_everything|data\.init_args\.seed)$"
    r"|(trainer\.default_root_dir|data\.init_args\.(data_dir|cache_dir)|run_dir|out)$"
)
"""Config keys without influence on results, or only through data whose hashes are compared."""

_OBSERVER = re.compile(
    r'^{"class_path": "[\w.]*\b(GradientShares|LearningRateMonitor|DeviceStatsMonitor|\w+ProgressBar|\w+ModelSummary)"'
)
"""A callback that changes nothing in training."""


_ADDED = {"model.init_args.weighting": "fixed"}
"""Keys that older configs lack -> the value that means the same."""


def as_text(value: object) -> str:
    """A config value as text, for comparing and showing."""
    if isinstance(value, float):
        return f"{value:.15g}"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def identifying(config: Mapping[str, Any]) -> dict[str, str]:
    """The config keys that distinguish settings, with their values as text."""
    flat = sorted(config_text(config).items())
    return {key: value for key, value in flat if value not in ("null", "false")}


def config_text(config: Mapping[str, Any]) -> dict[str, str]:
    """The keys that may influence results, dotted, with values as text; devices count only through the batch size."""
    flat = {key: None if _ADDED.get(key) == value else value for key, value in flatten(config).items()}
    if isinstance(callbacks := flat.get("trainer.callbacks"), list):
        flat["trainer.callbacks"] = [one for one in callbacks if not _OBSERVER.match(as_text(one))] or None
    of_batch = flat.get("model.init_args.effective_batch_size") is None
    hidden = () if of_batch else ("trainer.devices", "trainer.num_nodes")
    return {key: as_text(value) for key, value in flat.items() if key not in hidden and not NOT_THE_RESULT.match(key)}
