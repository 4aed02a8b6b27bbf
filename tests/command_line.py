"""The command line of dgm_models, called in this process."""

import contextlib
import io

from dgm_models.__main__ import main


def run(*arguments: object) -> tuple[int, str]:
    """Exit status and what was printed."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        status = main([str(argument) for argument in arguments])
    return status, text.getvalue()
