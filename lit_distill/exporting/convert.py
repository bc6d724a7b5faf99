"""Write a student in CTranslate2's format."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from lit_distill.errors import UserError
from lit_distill.exporting.engine import CTranslate2Engine, import_ctranslate2
from lit_distill.students import Student, StudentFiles
from lit_distill.students.models import save_description

DTYPES = {"int8": "int8", "bf16": "bfloat16", "float32": "float32"}
"""Quantization -> dtype of the weights."""


def check_architecture(files: StudentFiles) -> None:
    """Raise a ``UserError`` if CTranslate2 cannot run a student, or is not installed."""
    import_ctranslate2()
    # no public name has them
    from ctranslate2.converters.transformers import _MODEL_LOADERS  # type: ignore[import-untyped]

    kind = type(AutoConfig.for_model(**files.config)).__name__
    if kind not in _MODEL_LOADERS:
        raise UserError(
            f"to: ctranslate2 cannot run a {files.config['model_type']!r} student; it runs t5, mt5, llama, mistral,"
            " qwen2, qwen3, gpt2, phi3, gemma and others; --to safetensors takes every student"
        )
    vocabulary = sorted(files.tokenizer().get_vocab().values())
    if vocabulary != list(range(len(vocabulary))):
        raise UserError("to: ctranslate2 needs a tokenizer whose ids are 0 to its size, without holes")


def convert(
    files: StudentFiles, config: dict[str, Any], load: Callable[[], Student], quantization: str, folder: Path
) -> None:
    """Write a student: CTranslate2's files, and in ``student`` tokenizer and configuration.

    ``load`` is called once and its student is used up. The configuration says how the student generates. Raises a
    ``UserError`` if CTranslate2 cannot run what was written.
    """
    from ctranslate2.converters import TransformersConverter  # type: ignore[import-untyped]

    # where `StudentFiles` looks, as in a run; CTranslate2 has a `config.json` of its own
    described = folder / "student"
    described.mkdir()
    tokenizer = files.tokenizer()
    save_description(config, tokenizer, described)

    class Converter(TransformersConverter):  # type: ignore[misc]  # a class of Any
        """Converts a student as it is, not as transformers reads it."""

        def load_model(self, *args: Any, **kwargs: Any) -> Any:
            network: Any = load().network.eval()
            if network.config.is_encoder_decoder:
                # its loader scales the logits by d_model^-0.5 where this says so, which transformers 5 sets to true
                # for every T5; v1.1, Flan and mT5 do not scale
                network.config.tie_word_embeddings = getattr(network.config, "scale_decoder_outputs", False)
            return network

        def load_tokenizer(self, *args: Any, **kwargs: Any) -> Any:
            # embeddings may have more rows than there are tokens: without a name of their own, CTranslate2 would call
            # them <extra_id_0> and so on, as T5's sentinels are
            missing = range(len(tokenizer), config["vocab_size"])
            tokenizer.add_tokens([f"<no_token_{number}>" for number in missing])
            return tokenizer

    made = folder / "made"
    Converter(str(described)).convert(str(made), quantization=DTYPES[quantization])
    for path in made.iterdir():
        path.rename(folder / path.name)
    made.rmdir()
    try:
        CTranslate2Engine(folder).score([[0, 1]], [[0, 1]])
    except (ValueError, RuntimeError) as error:
        # it finds out when it runs, as of a Llama whose grouped heads are together wider or narrower than d_model
        raise UserError(
            f"to: ctranslate2 cannot run a student of these sizes ({error}); --to safetensors takes every student"
        ) from error
