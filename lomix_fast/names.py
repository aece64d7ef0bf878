"""Near names for what was misspelt."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def did_you_mean(given: Any, known: Iterable[str]) -> str:
    """The end of a message, "; did you mean 'nnunet'?", or "" where no name is near."""
    by_letters = {name.lower(): name for name in known}
    near = get_close_matches(given.lower(), by_letters, n=1) if isinstance(given, str) else []
    return f"; did you mean {by_letters[near[0]]!r}?" if near else ""


def suggests_options(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function or constructor name the nearest option where one is unknown.

    Raises:
        TypeError: as Python raises it, with the near name.
    """
    known = tuple(name for name in inspect.signature(function).parameters if name != "self")

    @functools.wraps(function)
    def checked(*args: P.args, **options: P.kwargs) -> R:
        for name in options:
            if name not in known:
                what = function.__qualname__.removesuffix(".__init__")
                near = did_you_mean(name, known) or f"; expected some of {', '.join(known)}"
                raise TypeError(f"{what}: got an unexpected option {name!r}{near}")
        return function(*args, **options)

    return checked
