"""Students keep their tying, their logits and their tokenizer wherever they go."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from lit_distill.errors import UserError
from lit_distill.students import load_model, load_tokenizer, read_config
from lit_distill.students.models import build_model, is_tied, record_model, save_model, true_config, untie
from lit_distill.students.tokens import restore_tokenizer
from tests.students import CONFIG, WORDS, make_student_folder, make_tokenizer

REAL = Path(__file__).parents[3] / "shared/models/t5-v1_1-small"
IDS = torch.tensor([[3, 17, 18, 1], [4, 20, 1, 0]])
TARGETS = torch.tensor([[21, 1], [22, 1]])


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, attention_mask=(IDS != 0).long(), decoder_input_ids=TARGETS).logits
    return found


def saved(folder: Path, tied: bool, seed: int = 3) -> T5ForConditionalGeneration:
    """A student's folder with weights, written by transformers alone, and the student itself."""
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(T5Config(**{**CONFIG, "tie_word_embeddings": tied}))
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        model._tied_weights_keys = {k: v for k, v in model._tied_weights_keys.items() if k != "lm_head.weight"}
        model.all_tied_weights_keys = dict(model._tied_weights_keys)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    # as the files on the hub have it: transformers 5 would write `true` here in any case
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
    return model


# ------------------------------------------------------------------------------------------------ from a configuration


def test_what_a_forward_returns_is_for_its_caller_to_say(tmp_path: Path) -> None:
    saved(tmp_path / "a", tied=False)
    path = tmp_path / "a" / "config.json"
    flags = {"output_attentions": True, "output_hidden_states": True, "return_dict": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | flags))
    for student in (load_model(tmp_path / "a"), load_model(tmp_path / "a", from_scratch=True)):
        assert logits(student).shape == (2, 2, CONFIG["vocab_size"])
        save_model(student, make_tokenizer(), tmp_path / "b")


def test_an_untied_head_is_a_tensor_of_its_own_with_unit_logits() -> None:
    torch.manual_seed(0)
    # wide enough that the estimate of the deviation is good to a per cent
    model: Any = build_model(CONFIG | {"d_model": 64, "vocab_size": 512})
    assert not is_tied(model)
    assert model.lm_head.weight.data_ptr() != model.shared.weight.data_ptr()
    assert model.shared.weight is model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight
    # 32,768 draws: the standard error of the deviation is 0.4 %
    head = model.lm_head.weight.detach()
    assert float(head.std()) == pytest.approx(64**-0.5, rel=0.02)
    assert float(head.mean()) == pytest.approx(0, abs=0.003)
    # nor does the forward pass scale once more what such a head is scaled for
    assert model.config.scale_decoder_outputs is False


def first_loss(model: Any, vocabulary: int) -> float:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (4, 16), generator=generator)
    model.eval()
    with torch.no_grad():
        return float(model(input_ids=ids, labels=torch.randint(3, vocabulary, (4, 64), generator=generator)).loss)


def test_the_first_loss_is_near_that_of_chance() -> None:
    torch.manual_seed(0)
    model: Any = build_model(CONFIG | {"d_model": 64, "vocab_size": 512})
    # with logits of unit variance its expectation is ln(vocabulary) + 1/2; 161 was measured for a tied T5-small
    assert math.log(512) < first_loss(model, 512) < math.log(512) + 1


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there: the released configuration of T5 v1.1 small")
def test_the_first_loss_of_the_real_configuration() -> None:
    torch.manual_seed(0)
    model: Any = load_model(REAL, from_scratch=True)
    assert not is_tied(model)
    assert float(model.lm_head.weight.detach().std()) == pytest.approx(512**-0.5, rel=0.01)
    assert math.log(32128) < first_loss(model, 32128) < math.log(32128) + 1


def test_a_tied_configuration_stays_tied() -> None:
    for config in (CONFIG | {"tie_word_embeddings": True}, {k: v for k, v in CONFIG.items() if "tie" not in k}):
        model = build_model(config)
        assert is_tied(model)
        assert model.config.scale_decoder_outputs is True
        model.tie_weights()
        assert is_tied(model)


def test_dropout_replaces_the_configurations(tmp_path: Path) -> None:
    model: Any = build_model(CONFIG, dropout=0.25)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}
    saved(tmp_path, tied=False)
    loaded: Any = load_model(tmp_path, dropout=0.25)
    assert {m.p for m in loaded.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}
    # none given: the file's
    assert {m.p for m in load_model(tmp_path).modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


@pytest.mark.parametrize("tied", [False, True])
def test_dropout_is_on_in_a_loaded_student(tmp_path: Path, tied: bool) -> None:
    """`from_pretrained` hands out a model in evaluation mode, and Lightning trains it as it is."""
    saved(tmp_path, tied)
    model: Any = load_model(tmp_path, dropout=0.5)
    first, second = (model(input_ids=IDS, labels=TARGETS).loss.item() for _ in range(2))
    assert first != second


# ------------------------------------------------------------------------------------------------ from weights


@pytest.mark.parametrize("tied", [False, True])
def test_loading_saving_and_loading_leave_the_logits(tmp_path: Path, tied: bool) -> None:
    original = saved(tmp_path / "original", tied)
    loaded: Any = load_model(tmp_path / "original")
    assert is_tied(loaded) is tied
    assert torch.equal(logits(loaded), logits(original))
    save_model(loaded, load_tokenizer(tmp_path / "original"), tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["tie_word_embeddings"] is tied
    again: Any = load_model(tmp_path / "again")
    assert is_tied(again) is tied
    assert torch.equal(logits(again), logits(original))
    by_transformers = T5ForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(by_transformers), logits(original))


@pytest.mark.parametrize("from_scratch", [False, True])
def test_tying_again_does_nothing_to_an_untied_student(tmp_path: Path, from_scratch: bool) -> None:
    saved(tmp_path, tied=False)
    model: Any = load_model(tmp_path, from_scratch=from_scratch)
    before = logits(model)
    model.tie_weights()
    assert not is_tied(model)
    assert torch.equal(logits(model), before)
    model.resize_token_embeddings(len(WORDS) + 8)
    assert not is_tied(model)
    assert torch.equal(logits(model)[..., : len(WORDS)], before)
    save_model(model, make_tokenizer(), tmp_path / "resized")
    again: Any = load_model(tmp_path / "resized")
    assert torch.equal(logits(again), logits(model))


def test_a_configuration_that_lies_about_the_tying(tmp_path: Path) -> None:
    """What transformers 5 writes for an untied student, whose weights tell otherwise."""
    original = saved(tmp_path, tied=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model: Any = load_model(tmp_path)
    assert not is_tied(model)
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert true_config(model)["tie_word_embeddings"] is False


def test_untying_a_tied_student_leaves_its_logits() -> None:
    torch.manual_seed(0)
    model: Any = build_model(CONFIG | {"tie_word_embeddings": True})
    before = logits(model)
    untie(model)
    assert not is_tied(model)
    assert torch.equal(logits(model), before)
    model.tie_weights()
    assert not is_tied(model)


def test_half_precision_weights_are_trained_in_float32(tmp_path: Path) -> None:
    saved(tmp_path, tied=False).bfloat16().save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load_model(tmp_path).parameters()} == {torch.float32}


def test_from_scratch_ignores_weights(tmp_path: Path) -> None:
    original = saved(tmp_path, tied=False)
    assert not torch.equal(load_model(tmp_path, from_scratch=True).shared.weight, original.shared.weight)


# ------------------------------------------------------------------------------------------------ the tokenizer


def test_a_record_holds_the_tokenizer(tmp_path: Path) -> None:
    record = record_model(build_model(CONFIG), make_tokenizer())
    torch.save(record, tmp_path / "record.pt")
    restored = restore_tokenizer(torch.load(tmp_path / "record.pt", weights_only=True)["tokenizer"])
    text = "predict: the cat is red so what"
    assert restored(text)["input_ids"] == [3, 9, 17, 11, 19, 2, 2, 1]
    assert restored.decode([17, 19, 1, 0], skip_special_tokens=True) == "cat red"


def test_a_records_file_names_stay_in_their_folder(tmp_path: Path) -> None:
    record = record_model(build_model(CONFIG), make_tokenizer())
    target = tmp_path / "outside.json"
    record["tokenizer"][str(target)] = torch.zeros(3, dtype=torch.uint8)
    record["tokenizer"]["../../outside.json"] = torch.zeros(3, dtype=torch.uint8)
    restore_tokenizer(record["tokenizer"])
    assert not target.exists()


def test_a_saved_student_has_its_tokenizer(tmp_path: Path) -> None:
    save_model(build_model(CONFIG), make_tokenizer(), tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("explain: dog")["input_ids"] == [4, 18, 1]


# ------------------------------------------------------------------------------------------------ errors


def fails(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_folder_without_weights_says_what_to_set(student_folder: Path) -> None:
    with pytest.raises(UserError) as error:
        load_model(student_folder)
    message = fails(error)
    assert message.startswith(f"student: no weights in the folder {str(student_folder)!r}")
    assert "from_scratch" in message


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    for load in (load_model, read_config):
        with pytest.raises(UserError) as error:
            load(tmp_path / "nowhere")
        message = fails(error)
        assert message.startswith("student: ")
        assert str(tmp_path / "nowhere") in message
        assert "no folder here" in message


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^student: .*config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("kind", ["bert", "rwkv"])
def test_a_model_that_cannot_be_a_student(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    for from_scratch in (False, True):
        with pytest.raises(UserError) as error:
            load_model(tmp_path, from_scratch=from_scratch)
        message = fails(error)
        assert message.startswith("student: ")
        assert f"{kind!r}" in message
        assert "allowed are t5" in message


@pytest.mark.parametrize(("content", "said"), [("{", "cannot read a configuration"), ('"t5"', "the config.json of")])
def test_a_configuration_that_is_no_json_object(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=f"^student: {said}"):
        load_model(tmp_path)


def test_a_configuration_that_makes_no_model(tmp_path: Path) -> None:
    make_student_folder(tmp_path, feed_forward_proj="nonsense-relu-x")
    with pytest.raises(UserError, match=r"^student: "):
        load_model(tmp_path, from_scratch=True)


def test_a_tokenizer_that_names_a_token_it_does_not_have(tmp_path: Path) -> None:
    make_student_folder(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    assert content["post_processor"]["special_tokens"].pop("</s>")
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"^tokenizer: cannot load one from"):
        load_tokenizer(tmp_path)


def test_weights_that_cannot_be_read(tmp_path: Path) -> None:
    saved(tmp_path, tied=True)
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"^student: cannot load"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocab_size": 10**18}, "vocab_size must be an integer in [1, 1073741824]"),
        ({"d_model": -1}, "d_model must be an integer in [1, 1073741824]"),
        ({"num_layers": 0}, "num_layers must be an integer in [1, 1000]"),
        ({"d_ff": 2**20, "d_model": 2**20, "num_layers": 9}, "GiB of memory"),
        ({"pad_token_id": 10**6}, "pad_token_id must be an integer in [0, "),
        ({"decoder_start_token_id": None}, "decoder_start_token_id must be an integer in"),
        ({"dropout_rate": 7.0}, "dropout_rate must be"),
    ],
)
def test_a_configuration_of_impossible_sizes(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    make_student_folder(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        load_model(tmp_path, from_scratch=True)
    assert fails(error).startswith("student: the configuration makes no model in ")
    assert reason in fails(error)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_files_that_are_nested_too_deep(tmp_path: Path, name: str) -> None:
    saved(tmp_path, tied=False)
    (tmp_path / name).write_text("[" * 100_000)
    load = load_tokenizer if "tokenizer" in name else load_model
    with pytest.raises(UserError, match=r"^(student|tokenizer): cannot "):
        load(tmp_path)


def test_a_tokenizer_that_makes_no_ids_or_ends_no_target(tmp_path: Path) -> None:
    saved(tmp_path, tied=False)
    path = tmp_path / "tokenizer_config.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"model_max_length": "x"}))
    with pytest.raises(UserError, match=r"^tokenizer: cannot load one from"):
        load_tokenizer(tmp_path)
    path.write_text(json.dumps(told | {"eos_token": None}))
    with pytest.raises(UserError, match=r"^tokenizer: .*no end-of-sequence token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content.pop("state_dict"), "is a checkpoint without weights"),
        (
            lambda content: content["state_dict"].update({"student.model.shared.weight": 3}),
            "is a checkpoint without weights",
        ),
        (lambda content: content["state_dict"].pop("student.model.shared.weight"), "Missing key"),
        (
            lambda content: content["state_dict"].update({"student.model.shared.weight": torch.zeros(3)}),
            "size mismatch",
        ),
        (lambda content: content["lit_distill_student"].pop("tokenizer"), "is not a checkpoint of lit_distill"),
        (lambda content: content["lit_distill_student"]["config"].pop("model_type"), "cannot be a student"),
    ],
)
def test_checkpoints_that_lack_a_part(tmp_path: Path, change: Callable[[dict[str, Any]], object], reason: str) -> None:
    student = build_model(CONFIG)
    content = {
        "lit_distill_student": dict(record_model(student, make_tokenizer())),
        "state_dict": {f"student.model.{name}": tensor for name, tensor in student.state_dict().items()},
    }
    change(content)
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(UserError) as error:
        load_model(tmp_path / "a.ckpt")
    assert reason in fails(error)


def test_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert fails(error).startswith("tokenizer: none in the folder")


def test_checkpoint_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^student: no checkpoint file '.*gone.ckpt'$"):
        load_model(tmp_path / "gone.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    for load in (load_model, load_tokenizer, read_config):
        with pytest.raises(UserError, match=r"^student: .*foreign\.ckpt' is not a checkpoint of lit_distill"):
            load(tmp_path / "foreign.ckpt")
    (tmp_path / "broken.ckpt").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"^student: cannot read the checkpoint file '.*broken\.ckpt'"):
        load_model(tmp_path / "broken.ckpt")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_restored_student_has_its_weights_and_draws_none(tied: bool) -> None:
    config = CONFIG | {"tie_word_embeddings": tied}
    original: Any = build_model(config)
    state = torch.get_rng_state()
    restored: Any = build_model(config, original.state_dict(), dropout=0.25)
    assert torch.equal(torch.get_rng_state(), state)
    assert (restored.training, restored.config.dropout_rate) == (True, 0.25)
    assert torch.equal(logits(restored), logits(original))
    assert is_tied(restored) is tied
    # the embedding of both stacks is one
    assert restored.encoder.embed_tokens.weight is restored.shared.weight
    assert restored.decoder.embed_tokens.weight is restored.shared.weight
    assert len(list(restored.parameters())) == len(list(original.parameters()))
    restored.tie_weights()
    assert is_tied(restored) is tied
    # and none is left that nobody has drawn
    weights = {name: tensor for name, tensor in original.state_dict().items() if name != "shared.weight"}
    with pytest.raises(RuntimeError, match="Missing key"):
        build_model(config, weights)


def test_a_folder_that_is_removed_is_not_needed(tmp_path: Path) -> None:
    saved(tmp_path / "student", tied=False)
    model: Any = load_model(tmp_path / "student")
    tokenizer = load_tokenizer(tmp_path / "student")
    shutil.rmtree(tmp_path / "student")
    record = record_model(model, tokenizer)
    rebuilt: Any = build_model(record["config"])
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(logits(rebuilt), logits(model))
