"""``python -m lit_distill``."""

from lit_distill.cli import run

if __name__ == "__main__":
    run()
