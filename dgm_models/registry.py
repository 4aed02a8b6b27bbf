"""The models by name: register, list, create, load."""

from __future__ import annotations

import fnmatch
import inspect
import json
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from .model import CONFIG_FILE, GenerativeModel

_MODELS: dict[str, type[GenerativeModel]] = {}
_Model = TypeVar("_Model", bound=type[GenerativeModel])


def register_model(name: str) -> Callable[[_Model], _Model]:
    """Class decorator that makes a model known to :func:`create_model` under ``name``."""

    def register(cls: _Model) -> _Model:
        if name in _MODELS:
            raise ValueError(f"a model named {name!r} is registered already: {_MODELS[name].__qualname__}")
        cls.model_name = name
        _MODELS[name] = cls
        return cls

    return register


def list_models(pattern: str = "*") -> list[str]:
    """Names of the registered models that match a shell pattern, sorted.

    Example:
        >>> list_models("dd*")
        ['ddpm']
    """
    return sorted(fnmatch.filter(_MODELS, pattern))


def model_class(name: str) -> type[GenerativeModel]:
    """The class registered under ``name``."""
    if name not in _MODELS:
        raise ValueError(f"name must be one of {', '.join(list_models())}, got {name!r}")
    return _MODELS[name]


def create_model(name: str, **config: Any) -> GenerativeModel:
    """A new model with random weights (``torch.manual_seed`` governs them).

    Args:
        name: one of :func:`list_models`.
        config: the options of its class.

    Raises:
        ValueError: there is no such model, or an option has a value it cannot have.
        TypeError: the model has no such option.
    """
    cls = model_class(name)
    known = inspect.signature(cls).parameters
    for option in config:
        if option not in known:
            raise TypeError(f"{name} has no option {option!r}; its options are {', '.join(known)}")
    return cls(**config)


def from_pretrained(path: str | pathlib.Path, **kwargs: Any) -> GenerativeModel:
    """A model that ``save_pretrained`` wrote, in evaluation mode, on the CPU.

    Args:
        path: the folder, or the id of a repository on the Hugging Face Hub.
        kwargs: ``revision``, ``token``, ``cache_dir``, ... as in ``huggingface_hub``.
    """
    folder = pathlib.Path(path)
    if folder.is_dir():
        file = folder / CONFIG_FILE
        if not file.exists():
            raise ValueError(f"path must hold a saved model, but there is no {CONFIG_FILE} in {folder}")
    else:
        try:
            file = pathlib.Path(hf_hub_download(str(path), CONFIG_FILE, **kwargs))
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            raise ValueError(
                f"path must be a folder, or a repository of the Hub in reach, got {str(path)!r}"
            ) from error
    name = json.loads(file.read_text()).get("model")
    return model_class(name).from_pretrained(path, **kwargs)
