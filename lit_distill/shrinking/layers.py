"""Which layers of a stack stay."""

import re

from lit_distill.errors import UserError


def kept_layers(name: str, text: str, total: int) -> list[int]:
    """The layers that a map names, in their order, counted from 0.

    ``uniform:N`` spreads ``N`` layers evenly from the first to the last, halves rounded up: of 12 layers
    ``uniform:6`` takes 0, 2, 4, 7, 9 and 11, as DistilBERT's initialisation does (1910.01108). That is the "maximally
    spaced" copy of 2010.13002 (Sec. 4); the authors' code has tables, and for 2 and 4 of 12 layers they take [0, 6] and
    [0, 4, 8, 11] where this takes [0, 11] and [0, 4, 7, 11]. ``first:N``, ``last:N`` and a list as ``0,2,4`` are
    themselves.

    Args:
        name: the option, for errors.
        text: the map.
        total: number of layers that there are.

    Raises:
        UserError: no such map, or it is beyond the layers.
    """
    if found := re.fullmatch(r"(uniform|first|last):([0-9]{1,4})", text):
        kind, number = found[1], int(found[2])
        if not 1 <= number <= total:
            raise UserError(f"{name}: {text!r} must keep 1 to {total} layers, as the model has {total}")
        if kind != "uniform":
            return list(range(number) if kind == "first" else range(total - number, total))
        gaps = max(number - 1, 1)
        return [(2 * i * (total - 1) + gaps) // (2 * gaps) for i in range(number)]
    if not re.fullmatch(r"[0-9]{1,4}(, *[0-9]{1,4})*", text):
        raise UserError(f"{name}: got {text!r}; allowed are uniform:N, first:N, last:N and a list such as 0,2,4")
    layers = [int(one) for one in text.split(",")]
    if layers != sorted(set(layers)) or layers[-1] >= total:
        raise UserError(f"{name}: {text!r} must rise from 0 to at most {total - 1}, as the model has {total} layers")
    return layers
