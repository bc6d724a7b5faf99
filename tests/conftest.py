"""What all tests share."""

import math
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from lit_distill.students import timing
from tests.runs import at_work_in, write_release
from tests.students import add_weights, make_student_folder

# the students are tiny: a second thread only waits, several times as long where cores are shared
torch.set_num_threads(1)

# on a busy machine slowness says nothing of what is tested
hypothesis.settings.register_profile(
    "any_speed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any_speed")

# a shell's background jobs ignore Ctrl-C, and with them all that they start; some tests send it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_timed_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """``fast: auto`` takes its default path: on a busy machine timing takes now one, now another, of other dropout."""
    monkeypatch.setattr(timing, "TOO_SHORT", math.inf)


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untied T5's configuration and tokenizer."""
    return make_student_folder(tmp_path_factory.mktemp("students") / "tiny")


@pytest.fixture(scope="session")
def weights_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untied T5 that has weights."""
    return add_weights(make_student_folder(tmp_path_factory.mktemp("students") / "tiny"))


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 of the tiny one's vocabulary that is wider and has dropout; its head has rows that no token needs."""
    folder = tmp_path_factory.mktemp("teachers") / "wide"
    return add_weights(make_student_folder(folder, d_model=24, d_ff=40, num_layers=3, vocab_size=72, dropout_rate=0.3))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the test's own to work in, where no teacher but its own can be asked."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with at_work_in(tmp_path, monkeypatch) as folder:
        yield folder


@pytest.fixture
def release(here: Path) -> Path:
    """Data in the released layout."""
    return write_release(here / "data")
