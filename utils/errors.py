"""Errors that are the user's to mend: they are printed in one piece, without a traceback."""

import contextlib
import sys
import time
from collections.abc import Iterator

from utils.distributed import rank

OTHERS_WAIT = 5  # seconds until another process than the first says what went wrong


class UserError(Exception):
    """Something in the command, the config or the data is wrong; the message says what, where and how to mend it."""

    def __init__(self, message: str) -> None:
        # A DataLoader worker's exception is raised anew here with its traceback as text in front: keep what it said.
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


class ConfigError(UserError):
    """A key or value of the config is wrong; the message begins with its dotted path."""


class DataError(UserError):
    """A file of the data set is missing, damaged or not in the expected form."""


class CheckpointError(UserError):
    """A checkpoint cannot be read, is not safe to read, or does not fit the model."""


class TrainingError(UserError):
    """Training cannot go on, for instance because the loss is no longer finite."""


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError` or Ctrl-C into a message on stderr and exit status 1 or 130."""
    try:
        yield
    except UserError as error:
        if number := rank():  # the first process says what all of them meet; torchrun then ends the others
            time.sleep(OTHERS_WAIT)
        print(f"error: {error}" if number == 0 else f"error (process {number}): {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
