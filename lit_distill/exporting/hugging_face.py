"""Export a trained student in the Hugging Face format, with prefixes, generation settings and model card."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

import httpx2
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from lit_distill import __version__
from lit_distill.errors import UserError
from lit_distill.files import atomic_folder, flatten, write_text
from lit_distill.shrinking.shrink import without_zeros
from lit_distill.students import load
from lit_distill.students.files import CHECKPOINT_KEY, read_checkpoint
from lit_distill.students.tokens import Family
from lit_distill.tables import markdown_table

_HUB_ERRORS = (OSError, ValueError, httpx2.HTTPError)
"""Exceptions of hub calls: no network, unknown name, no permission."""


@dataclass(frozen=True)
class CardFacts:
    """What a model card says."""

    method: str
    dataset: str
    student: str
    tasks: Mapping[str, Mapping[str, Any]]  # task -> its prefix, and the arguments of `generate`; none of a corpus
    settings: Mapping[str, Any]
    data: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)  # of test; bounds of intervals end in _low and _high
    rows: int = 0  # number of test rows
    baseline: Mapping[str, float] = field(default_factory=dict)  # the label-only baseline's metrics, as logged
    base_model: str | None = None  # hub name of the model that was finetuned
    license: str | None = None  # the base model's licence
    hub_dataset: str | None = None  # the dataset's name on the hub
    family: Family = "seq2seq"  # the student's
    chat: bool = False  # whether its tokenizer has a chat template
    adapter_alone: bool = False  # whether the folder holds only an adapter


def export_checkpoint(checkpoint: Path, folder: Path, facts: CardFacts) -> None:
    """Export a checkpoint's student to a folder, which is replaced.

    Its defaults in generation are those of the first task; prefixes are where Hugging Face's ``pipeline`` finds them.
    """
    content = read_checkpoint(str(checkpoint))
    record = content[CHECKPOINT_KEY]
    # without `adapter`, the adapter is merged into the student
    adapter = record.get("adapter") if facts.adapter_alone else None
    student = load(checkpoint, dtype=record["config"].get("dtype") or "float32", adapter=adapter)
    if "Pruning" in content.get("callbacks", {}):
        student.model = without_zeros(student)
    network: Any = student.network
    set_tasks(network, facts.tasks)
    for config in getattr(student.model, "peft_config", {}).values():
        config.base_model_name_or_path = str(facts.settings["student"])
    with atomic_folder(folder) as tmp_path:
        student.save(tmp_path)
        write_text(tmp_path / "README.md", model_card(facts))


def set_tasks(network: Any, tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """Put tasks into a model's configuration, and the first one's generation into its defaults."""
    network.config.task_specific_params = {name: dict(settings) for name, settings in tasks.items()}
    if (first := next(iter(tasks.values()), None)) is None:
        return
    network.config.prefix = first["prefix"]
    # greedy: the pretrained model's sampling settings would contradict it
    network.generation_config.update(**generation_of(first), do_sample=False)


def generation_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a task that are arguments of ``generate``."""
    return {name: value for name, value in settings.items() if name in ("max_new_tokens", "num_beams")}


def model_card(facts: CardFacts) -> str:
    """The model card in Markdown, with the metadata block of the hub."""
    title = f"{facts.student} trained on {facts.dataset} with {facts.method}"
    results = [_eval_result(facts, name, value, bounds) for name, value, bounds in _measured(facts.metrics) if bounds]
    metadata = ModelCardData(
        library_name="peft" if facts.adapter_alone else "transformers",
        pipeline_tag="text2text-generation" if facts.family == "seq2seq" else "text-generation",
        tags=["lit_distill", "distilling-step-by-step"],
        base_model=facts.base_model,
        license=facts.license,
        datasets=None if facts.hub_dataset is None else [facts.hub_dataset],
        model_name=title if results else None,
        eval_results=results or None,
    )
    first = next(iter(facts.tasks.values()), None)
    card = ModelCard.from_template(
        metadata,
        template_path=str(Path(__file__).with_name("model_card.md")),
        title=title,
        version=__version__,
        facts=facts,
        kind="Seq2SeqLM" if facts.family == "seq2seq" else "CausalLM",
        source=first and _source_code(first),
        max_new_tokens=first and first["max_new_tokens"],
        tasks=markdown_table(("task", "input", "generation"), map(_task_row, facts.tasks, facts.tasks.values())),
        metrics=markdown_table(("metric", "value", "95 % interval"), _metric_rows(facts)) if facts.metrics else "",
        settings=_settings_table(facts.settings),
        rows=_settings_table(facts.data),
    )
    return f"{card}\n"


def _source_code(settings: Mapping[str, Any]) -> str:
    """Python that makes an input of a task."""
    if "input" not in settings:
        return f'{settings["prefix"]!r} + "your input"'
    fields = dict.fromkeys(name for _, name, _, _ in Formatter().parse(settings["input"]) if name is not None)
    given = {name: f"your {name}" for name in fields}
    if "after" in settings:
        given["rationale"] = f"its text for {settings['after']}"
    values = ", ".join(f"{name}={value!r}" for name, value in given.items())
    return f"{settings['prefix']!r} + {settings['input']!r}.format({values})"


def _task_row(name: str, settings: Mapping[str, Any]) -> tuple[str, str, str]:
    generation = ", ".join(f"{key} {value}" for key, value in generation_of(settings).items())
    after = f"; {{rationale}} is its text for {settings['after']}" if "after" in settings else ""
    source = settings["prefix"] + settings.get("input", "{input}")
    return name, f"`{json.dumps(source, ensure_ascii=False)}`{after}", generation


def _measured(metrics: Mapping[str, float]) -> Iterator[tuple[str, float, tuple[float, float] | None]]:
    """Name, value and 95 % interval of each metric; losses have no interval."""
    for name, value in metrics.items():
        if not name.endswith(("_low", "_high")):
            bounds = (metrics[f"{name}_low"], metrics[f"{name}_high"]) if f"{name}_low" in metrics else None
            yield name, value, bounds


def _eval_result(facts: CardFacts, name: str, value: float, bounds: tuple[float, float]) -> EvalResult:
    return EvalResult(
        task_type="text2text-generation",
        dataset_type=facts.hub_dataset or facts.dataset,
        dataset_name=facts.dataset,
        dataset_split="test",
        dataset_args={"rows": facts.rows},
        metric_type=next((kind for kind in ("accuracy", "f1", "rouge") if kind in name), name),
        metric_name=name,
        metric_value=round(value, 6),
        metric_args={"confidence_interval_95": [round(bound, 6) for bound in bounds]},
    )


def _metric_rows(facts: CardFacts) -> Iterator[tuple[str, str, str]]:
    """The student's metrics, and the baseline's accuracy."""
    baseline = {name.removeprefix("test/"): value for name, value in facts.baseline.items() if "test/accuracy" in name}
    for title, metrics in (("{}", facts.metrics), ("{} of the label-only baseline", baseline)):
        for name, value, bounds in _measured(metrics):
            interval = f"{bounds[0]:.4f} to {bounds[1]:.4f}" if bounds else ""
            yield title.format(name), f"{value:.4f}", interval


def _settings_table(settings: Mapping[str, Any]) -> str:
    rows = []
    for name, value in flatten(settings).items():
        # a local folder means nothing to readers of the card
        shown = Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        rows.append((name, f"{shown:.4f}" if isinstance(shown, float) and 1e-3 <= abs(shown) < 1 else str(shown)))
    return markdown_table(("", ""), rows)


def origin(student: str, *, from_scratch: bool) -> tuple[str | None, str | None]:
    """Hub name and licence of the model that a student (a hub name or a folder) started from, where known."""
    if from_scratch:
        return None, None
    local = Path(student).exists()
    try:
        if not local:
            # one try: many training machines cannot reach the hub
            found = HfApi().model_info(student, timeout=5).card_data
            return student, None if found is None else found.license
        found = ModelCard.load(Path(student) / "README.md", ignore_metadata_errors=True).data
    except _HUB_ERRORS:
        return None if local else student, None
    return found.base_model if isinstance(found.base_model, str) else None, found.license


def check_hub(repository: str, kind: str = "model") -> None:
    """Create a repository on the hub if absent. Raises a ``UserError`` if the user cannot write to it."""
    try:
        HfApi().create_repo(repository, repo_type=kind, exist_ok=True)
    except _HUB_ERRORS as error:
        raise UserError(
            f"push_to_hub: cannot write to {repository!r} on the Hugging Face hub ({_reason(error)});"
            " log in with `hf auth login`, or set HF_TOKEN"
        ) from error


def push_folder(folder: Path, repository: str, kind: str = "model") -> None:
    """Upload a folder, without its hidden files. Raises a ``UserError`` if it cannot be uploaded; the folder stays."""
    message, hidden = f"Add the {kind}", [".*"]
    try:
        HfApi().upload_folder(
            repo_id=repository, folder_path=folder, repo_type=kind, commit_message=message, ignore_patterns=hidden
        )
    except _HUB_ERRORS as error:
        raise UserError(
            f"push_to_hub: {folder} was not uploaded ({_reason(error)});"
            f" `hf upload {repository} {folder}{' --repo-type dataset' if kind == 'dataset' else ''}` tries again"
        ) from error


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
