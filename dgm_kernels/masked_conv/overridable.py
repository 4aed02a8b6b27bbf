"""Lets tensor-like arguments take over a call of a public function, so that torch.fx can record it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch.overrides import handle_torch_function, has_torch_function_unary

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def overridable(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """The function, unless its first argument has a ``__torch_function__`` of its own, as with PyTorch's functions."""
    name = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        first = args[0] if args else kwargs.get(name)
        if has_torch_function_unary(first):
            return handle_torch_function(call, (first,), *args, **kwargs)
        return function(*args, **kwargs)

    return call
