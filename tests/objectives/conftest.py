"""What the tests of objectives share."""

from pathlib import Path

import pytest

from tests.students import make_causal_folder, make_student_folder


@pytest.fixture(scope="module", params=["t5", "llama"])
def either_family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny student of each family."""
    folder = tmp_path_factory.mktemp("students") / "tiny"
    return make_causal_folder(folder) if request.param == "llama" else make_student_folder(folder)
