"""What all tests share."""

from pathlib import Path

import pytest

from tests.students import make_student_folder


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untied T5's configuration and tokenizer."""
    return make_student_folder(tmp_path_factory.mktemp("students") / "tiny")
