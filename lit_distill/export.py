"""Export a trained student in the Hugging Face format, with prefixes, generation settings and model card."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from lit_distill import __version__
from lit_distill.errors import UserError
from lit_distill.files import atomic_folder, flatten
from lit_distill.students import CHECKPOINT_KEY, load, read_checkpoint
from lit_distill.students.tokens import Family

_HUB_ERRORS = (OSError, ValueError, httpx2.HTTPError)
"""Exceptions of hub calls: no network, unknown name, no permission."""


@dataclass(frozen=True)
class CardFacts:
    """The facts of a model card."""

    method: str
    dataset: str
    student: str
    settings: Mapping[str, Any]
    data: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of test; the bounds of intervals end in ``_low`` and ``_high``."""
    rows: int = 0  # number of test rows
    baseline: Mapping[str, float] = field(default_factory=dict)
    """The label-only baseline's metrics, by their logged names."""
    base_model: str | None = None  # hub name of the model that was finetuned
    license: str | None = None  # the base model's licence
    hub_dataset: str | None = None  # the dataset's name on the hub
    family: Family = "seq2seq"  # the student's
    chat: bool = False  # whether its tokenizer has a chat template
    adapter_alone: bool = False  # whether the folder holds only an adapter


def export_checkpoint(
    checkpoint_path: Path,
    folder: Path,
    *,
    prefixes: Mapping[str, str],
    generation: Mapping[str, Mapping[str, Any]],
    facts: CardFacts,
) -> Path:
    """Export a checkpoint's student to a folder, and return the folder.

    Args:
        checkpoint_path: a checkpoint of this framework, with a full state dict.
        folder: the target; an existing one is replaced.
        prefixes: task -> input prefix.
        generation: task -> ``generate``'s arguments; those of the first task become the defaults.
        facts: the content of the model card.
    """
    record = read_checkpoint(str(checkpoint_path))[CHECKPOINT_KEY]
    # without `adapter`, the adapter is merged into the student
    adapter = record.get("adapter") if facts.adapter_alone else None
    student = load(checkpoint_path, dtype=record["config"].get("dtype") or "float32", adapter=adapter)
    network = student.network
    first = next(iter(prefixes))
    for name, value in generation[first].items():
        setattr(network.generation_config, name, value)
    # greedy: the pretrained model's sampling settings would contradict it
    network.generation_config.do_sample = False
    for config in getattr(student.model, "peft_config", {}).values():
        config.base_model_name_or_path = str(facts.settings["student"])
    with atomic_folder(folder) as tmp_path:
        student.save(tmp_path)
        path = tmp_path / "config.json"
        if path.exists():
            # Hugging Face's field for input prefixes
            config = json.loads(path.read_text())
            config["prefix"] = prefixes[first]
            config["task_specific_params"] = {
                task: {"prefix": prefix, **generation[task]} for task, prefix in prefixes.items()
            }
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (tmp_path / "README.md").write_text(model_card(facts, prefixes, generation), encoding="utf-8")
    return folder


def model_card(facts: CardFacts, prefixes: Mapping[str, str], generation: Mapping[str, Mapping[str, Any]]) -> str:
    """The model card in Markdown, with the metadata block of the hub."""
    first = next(iter(prefixes))
    results = _eval_results(facts)
    settings = {task: ", ".join(f"{key} {value}" for key, value in own.items()) for task, own in generation.items()}
    name = f"{facts.student} trained on {facts.dataset} with {facts.method}"
    data = ModelCardData(
        library_name="peft" if facts.adapter_alone else "transformers",
        pipeline_tag="text2text-generation" if facts.family == "seq2seq" else "text-generation",
        tags=["lit_distill", "distilling-step-by-step"],
        base_model=facts.base_model,
        license=facts.license,
        datasets=None if facts.hub_dataset is None else [facts.hub_dataset],
        model_name=name if results else None,
        eval_results=results or None,
    )
    lines = [
        f"# {name}",
        "",
        f"Trained with lit_distill {__version__} after *Distilling step-by-step* (Hsieh et al., Findings of ACL 2023).",
        "",
        "```python",
        *_snippet(facts, prefixes[first], generation[first]["max_new_tokens"]),
        "```",
        "",
        "## Prefixes",
        "",
        "| task | prefix | generation |",
        "|---|---|---|",
        *(f"| {task} | `{json.dumps(prefix)}` | {settings[task]} |" for task, prefix in prefixes.items()),
    ]
    if facts.metrics:
        lines += ["", "## Metrics", "", *_metric_rows(facts)]
    for title, content in (("Method", facts.settings), ("Data", facts.data)):
        if content:
            lines += ["", f"## {title}", "", "| | |", "|---|---|", *_rows(content)]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"))


def _snippet(facts: CardFacts, prefix: str, length: int) -> list[str]:
    """Example code for one input."""
    kind = "Seq2SeqLM" if facts.family == "seq2seq" else "CausalLM"
    if facts.adapter_alone:
        name, imports = f"AutoPeftModelFor{kind}", [f"from peft import AutoPeftModelFor{kind}"]
    else:
        name, imports = f"AutoModelFor{kind}", []
    imports.append(f"from transformers import {'' if facts.adapter_alone else f'{name}, '}AutoTokenizer")
    if facts.chat:
        inputs = [
            f'turns = [{{"role": "user", "content": {prefix!r} + "your input"}}]',
            'settings = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}',
            "inputs = tokenizer.apply_chat_template(turns, **settings)",
        ]
    else:
        newline = "" if facts.family == "seq2seq" else "\\n"
        inputs = [f'inputs = tokenizer({prefix!r} + "your input{newline}", return_tensors="pt")']
    new = "output[0]" if facts.family == "seq2seq" else 'output[0, inputs["input_ids"].shape[1] :]'
    return [
        *imports,
        f'tokenizer, model = AutoTokenizer.from_pretrained("."), {name}.from_pretrained(".")',
        *inputs,
        f"output = model.generate(**inputs, max_new_tokens={length})",
        f"print(tokenizer.decode({new}, skip_special_tokens=True))",
    ]


def origin(student: str, *, from_scratch: bool) -> tuple[str | None, str | None]:
    """Hub name and licence of the model that a student started from, where known.

    Args:
        student: a hub name (whose card is read if the hub is reachable) or a folder.
        from_scratch: the weights were initialised randomly.
    """
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
    try:
        HfApi().upload_folder(
            repo_id=repository,
            folder_path=folder,
            repo_type=kind,
            commit_message=f"Add the {kind}",
            ignore_patterns=[".*"],
        )
    except _HUB_ERRORS as error:
        raise UserError(
            f"push_to_hub: {folder} was not uploaded ({_reason(error)});"
            f" `hf upload {repository} {folder}{' --repo-type dataset' if kind == 'dataset' else ''}` tries again"
        ) from error


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n", maxsplit=1)[0]


def _measured(facts: CardFacts) -> list[str]:
    """The names of the metrics, without interval bounds."""
    return [name for name in facts.metrics if not name.endswith(("_low", "_high"))]


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    """Accuracies, F1 and ROUGE on test; no losses, which differ between methods."""
    return [
        EvalResult(
            task_type="text2text-generation",
            dataset_type=facts.hub_dataset or facts.dataset,
            dataset_name=facts.dataset,
            dataset_split="test",
            dataset_args={"rows": facts.rows},
            metric_type=next((kind for kind in ("accuracy", "f1", "rouge") if kind in name), name),
            metric_name=name,
            metric_value=round(facts.metrics[name], 6),
            metric_args={
                "confidence_interval_95": [round(facts.metrics[f"{name}_{end}"], 6) for end in ("low", "high")]
            },
        )
        for name in _measured(facts)
        if f"{name}_low" in facts.metrics
    ]


def _metric_rows(facts: CardFacts) -> list[str]:
    """The student's metrics with their intervals, and the baseline's accuracies."""
    rows = [(name, name, facts.metrics) for name in _measured(facts)]
    if facts.baseline:
        rows.append(("accuracy of the label-only baseline", "test/accuracy", facts.baseline))
    lines = [f"Of {facts.rows} rows of test.", "", "| metric | value | 95 % interval |", "|---|---|---|"]
    for title, name, metrics in rows:
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        interval = "" if low is None or high is None else f"{low:.4f} to {high:.4f}"
        lines.append(f"| {title} | {metrics[name]:.4f} | {interval} |")
    return lines


def _rows(content: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, value in flatten(content).items():
        # a local folder means nothing to readers of the card
        shown = Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        text = f"{shown:.4f}" if isinstance(shown, float) and 1e-3 <= abs(shown) < 1 else f"{shown}"
        rows.append(f"| {name} | {text} |")
    return rows
