"""Make the small student of the evidence: T5 v1.1's shape at a size that two cores train, with T5's own tokenizer.

python docs/evidence/make_student.py --like T5_FOLDER --out students/t5-v1_1-mini

T5_FOLDER holds a T5 v1.1's config.json and tokenizer files; its weights are not needed: the student starts from random
ones.
"""

import argparse
import json
import shutil
from pathlib import Path

SIZE = {"d_model": 96, "d_kv": 24, "d_ff": 192, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}


def main() -> None:
    """Write the student's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    config = json.loads((arguments.like / "config.json").read_text()) | SIZE
    (arguments.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (arguments.like / name).exists():
            shutil.copy(arguments.like / name, arguments.out / name)
    print(arguments.out)


if __name__ == "__main__":
    main()
