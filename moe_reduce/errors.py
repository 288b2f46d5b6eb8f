"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """A mistake in a configuration, a file or a command line.

    Its message is ONE line that names the key, file or value and the remedy. Commands print it and
    exit with status 2; any other exception is a defect of ours and keeps its traceback.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))
