"""What a client sends, and what it gets."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, model_validator

_INPUT = "Which word does not belong?\nAnswer Choices:\n(a) trout\n(b) salmon\n(c) oak"


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("must be Unicode, without half of a surrogate pair") from error
    return text


class Request(BaseModel):
    """Inputs to answer."""

    model_config = ConfigDict(strict=True)

    # a million faults would take gigabytes
    inputs: Annotated[list[Annotated[str, AfterValidator(_unicode)]], FailFast()] = Field(
        description="Texts as in the data, without a task's prefix.", examples=[[_INPUT]]
    )
    rationale: bool = Field(default=False, description="Whether to write rationales, too.")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        # one fault in place of `forbid`'s one a key
        if isinstance(value, dict) and (strange := next((key for key in value if key not in cls.model_fields), None)):
            raise ValueError(f"{strange!r:.100} is no argument; allowed are {', '.join(cls.model_fields)}")
        return value


class Prediction(BaseModel):
    """What the student says of one input."""

    label: str = Field(description="Its label, as `predict` writes it.", examples=["oak"])
    likelihood: float = Field(
        description="Of the label among the closed set of labels, where the student has one and the label is in it;"
        " of the student's text otherwise.",
        examples=[0.93],
    )
    rationale: str | None = Field(default=None, description="If it was asked for.", examples=["oak is a tree"])


class Response(BaseModel):
    """A prediction for each input, in their order."""

    predictions: list[Prediction]


class Refusal(BaseModel):
    """One line that names what is wrong and says what is allowed."""

    detail: str = Field(examples=["inputs: at most 64 are allowed, got 65"])
