"""What a person did wrong, said in one sentence, and the code of a command that was stopped."""

import signal

__all__ = ["UserError", "code_of"]


class UserError(ValueError):
    """A mistake in a file, prompt, column or setting; the door prints it without a traceback."""


def code_of(signum: int) -> int:
    """The exit code of a command that a signal has stopped, 128 and the signal; SIGUSR1, by which
    schedulers announce SIGTERM, has the same as that one, so that a script has one to look for.
    """
    return 128 + (signal.SIGTERM if signum == signal.SIGUSR1 else signum)
