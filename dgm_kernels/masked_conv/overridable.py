"""Lets tensor-like arguments take over a call of a public function, so that torch.fx can record it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch.overrides import handle_torch_function, has_torch_function_unary

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def overridable(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """The function; where its first argument has a ``__torch_function__`` of its own, as PyTorch's functions do."""

    @functools.wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if args and has_torch_function_unary(args[0]):
            return handle_torch_function(call, args[:1], *args, **kwargs)
        return function(*args, **kwargs)

    return call
