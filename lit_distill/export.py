"""Save a trained student for use elsewhere: Hugging Face format, prefix, generation settings, model card."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from lit_distill import __version__
from lit_distill.files import atomic_folder
from lit_distill.students import (
    CHECKPOINT_KEY,
    StudentRecord,
    restore_student,
    restore_tokenizer,
    save_student,
    student_weights,
)


@dataclass(frozen=True)
class CardFacts:
    """What a model card says."""

    method: str
    dataset: str
    student: str
    settings: Mapping[str, Any]
    data: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


def export_checkpoint(
    checkpoint_path: Path,
    folder: Path,
    *,
    prefixes: Mapping[str, str],
    generation: Mapping[str, Mapping[str, Any]],
    facts: CardFacts,
) -> Path:
    """Turn a checkpoint into a student's folder.

    Args:
        checkpoint_path: a checkpoint of this framework, with a full state dict.
        folder: where the student goes; an earlier one there is replaced whole.
        prefixes: task -> input prefix.
        generation: task -> ``generate``'s arguments; those of the first task become the folder's defaults.
        facts: the model card's content.

    Returns:
        The folder.
    """
    checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True, mmap=True)
    record = cast(StudentRecord, checkpoint[CHECKPOINT_KEY])
    student = restore_student(record["config"], student_weights(checkpoint["state_dict"]))
    first = next(iter(prefixes))
    for name, value in generation[first].items():
        setattr(student.generation_config, name, value)
    # greedy search: sampling settings of a pretrained student's own would contradict it
    student.generation_config.do_sample = False
    with atomic_folder(folder) as tmp_path:
        save_student(student, restore_tokenizer(record), tmp_path)
        # Hugging Face's place for what a task puts before its inputs
        path = tmp_path / "config.json"
        config = json.loads(path.read_text())
        config["prefix"] = prefixes[first]
        config["task_specific_params"] = {
            task: {"prefix": prefix, **generation[task]} for task, prefix in prefixes.items()
        }
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (tmp_path / "README.md").write_text(model_card(facts, prefixes, generation))
    return folder


def model_card(facts: CardFacts, prefixes: Mapping[str, str], generation: Mapping[str, Mapping[str, Any]]) -> str:
    """The card as Markdown with the hub's metadata block."""
    first = next(iter(prefixes))
    length = generation[first]["max_new_tokens"]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text2text-generation",
        "tags: [lit_distill, distilling-step-by-step, t5]",
        "---",
        "",
        f"# {facts.student} trained on {facts.dataset} with {facts.method}",
        "",
        f"Trained with lit_distill {__version__} after *Distilling step-by-step* (Hsieh et al., Findings of ACL 2023).",
        "",
        "```python",
        "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer",
        'tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForSeq2SeqLM.from_pretrained(".")',
        f'inputs = tokenizer({prefixes[first]!r} + "your input", return_tensors="pt")',
        f"output = model.generate(**inputs, max_new_tokens={length})",
        "print(tokenizer.decode(output[0], skip_special_tokens=True))",
        "```",
        "",
        "## Prefixes",
        "",
        "| task | prefix | generation |",
        "|---|---|---|",
        *(f"| {task} | `{json.dumps(prefix)}` | {_settings(generation[task])} |" for task, prefix in prefixes.items()),
    ]
    for title, content in (("Metrics", facts.metrics), ("Method", facts.settings), ("Data", facts.data)):
        if content:
            lines += ["", f"## {title}", "", "| | |", "|---|---|", *_rows(content)]
    return "\n".join(lines) + "\n"


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _rows(content: Mapping[str, Any], before: str = "") -> list[str]:
    rows: list[str] = []
    for name, value in content.items():
        if isinstance(value, Mapping):
            rows += _rows(value, f"{before}{name}.")
        else:
            text = f"{value:.4f}" if isinstance(value, float) and 0 < abs(value) < 1 and value >= 1e-3 else f"{value}"
            rows.append(f"| {before}{name} | {text} |")
    return rows
