"""Errors for users to fix."""


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its type if there is none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class UserError(Exception):
    """A mistake in the command, the config or the data. The message says what is wrong, where, and how to fix it."""

    def __init__(self, message: str) -> None:
        # An exception of a DataLoader worker is raised again with its traceback in front of the message: drop that.
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


class ConfigError(UserError):
    """Wrong key or value of the config; the message begins with its dotted path."""


class DataError(UserError):
    """Missing, damaged or malformed file of a data set."""


class CheckpointError(UserError):
    """Checkpoint that cannot be read, is not safe to read, or does not fit the model."""


class TrainingError(UserError):
    """Training cannot continue, for instance because the loss is not finite."""
