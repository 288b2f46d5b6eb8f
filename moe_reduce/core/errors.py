"""Errors that end a command with one line instead of a traceback."""


class UserError(Exception):
    """A mistake in a configuration, a file or a command line.

    Its message is ONE line that names the key, file or value and the remedy. Commands print it and exit with status 2;
    any other exception is a defect of ours and keeps its traceback.
    """

    status = 2

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class PeerLost(UserError):
    """The loss of another process of the run; this process can only end and be started again."""

    status = 1
