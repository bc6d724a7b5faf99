"""What a stage needs of a split: labels to compare with, targets to train on."""

from typing import TYPE_CHECKING

from lit_distill.data.selection import Flag, having
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split

if TYPE_CHECKING:
    from lit_distill.data.base import RationaleDataModule


def check_split(data: "RationaleDataModule", split: Split, stage: str) -> None:
    """Raise a ``UserError`` if a split lacks labels, or train lacks targets, that a stage needs."""
    used, rows = data.used_rows(split), data.split_rows(split) or ()
    unlabelled = having(data.tally(split), Flag.UNLABELLED)
    if split != "train":
        if unlabelled:
            raise UserError(f"{split}: {unlabelled} of {len(rows)} rows have no label, which {stage} needs")
        return
    counts = {name: count for name, count in data.counts["train"].items() if count}
    if counts.get("pseudo_labelled", 0) == 0 and data.pseudo_labels is not None:
        raise UserError(f"pseudo_labels: {data.pseudo_labels!r} labels no row of train ({counts})")
    if data.keep is not None and not len(used.with_rationale) and any(t.uses_output for t in data.tasks.values()):
        raise UserError(f"rationale_filter: {data.rationale_filter} leaves no rationale of train ({counts})")
    for name, task in data.tasks.items():
        if any(data.targets("train", task, row) for row in used.rows):
            continue
        needs = [{"gold": "labels", "teacher": "labels of the teacher"}[data.label_source]] * task.needs_label
        if task.uses_output:
            needs.append(f"teacher outputs of kind {task.kind}" + (f" by {task.teacher}" if task.teacher else ""))
        outputs = (output for row in rows for output in row.outputs if output.text is not None)
        kinds = dict.fromkeys(f"{output.kind} by {output.teacher}" for output in outputs)
        shipped = (data.prompt_file.with_suffix("") / f"{task.kind}.yaml").exists()
        more = f" --prompt {task.kind}" if shipped else f" --kind {task.kind} --prompt FILE"
        made = "" if task.kind == "rationale" else more
        makes = f"; `lit-distill annotate{made} --out FOLDER` makes them for data.rationales: [released, FOLDER]"
        raise UserError(
            f"tasks: {name} has no target in train: {task.target!r} (select: {task.select}) needs"
            f" {' and '.join(needs)}; there are outputs of kind {', '.join(kinds) or 'none'}"
            f"{makes * task.uses_output}; rationale_filter: {data.rationale_filter}; {counts}"
        )
    if unlabelled and data.label_source == "gold" and any(task.needs_label for task in data.tasks.values()):
        data.warn(f"train: {unlabelled} of {len(rows)} rows have no label to train on")
