"""Errors that are the user's to mend."""


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
