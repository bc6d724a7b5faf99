"""Write the equations of SVAMP's released teacher as programs, for the evidence of methods that learn from programs.

python docs/evidence/make_programs.py --data_dir data --out annotations/svamp-programs

Each equation is one line, `answer = ...`, in the layout of `annotate`. No teacher wrote these programs.
"""

import argparse
from pathlib import Path

from lit_distill.annotation.record import Annotation, to_line
from lit_distill.annotation.store import FILE
from lit_distill.data import SVAMPDataModule
from lit_distill.equations import run_program


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    lines = []
    for row in SVAMPDataModule(arguments.data_dir).released("train") or ():
        program = f"answer = {row.teacher_label}"
        if (value := run_program(program)) is not None:
            lines.append(to_line(Annotation(row.id, "train", kind="program", rationale=program, label=value)))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / FILE).write_bytes(b"".join(lines))
    print(f"{arguments.out}: {len(lines)} programs")


if __name__ == "__main__":
    main()
