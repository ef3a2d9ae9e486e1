"""The exceptions of the checkpoints, apart so that every module here can raise them."""

from dimmix.errors import DimmixError


class CheckpointError(DimmixError):
    """A checkpoint that cannot be found, fetched, trusted or published."""


class DamagedError(CheckpointError):
    """A file that is not what it was said to be; fetching it again may help."""
