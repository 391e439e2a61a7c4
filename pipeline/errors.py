"""What a person did wrong, said in one sentence, and the code of a command that was stopped."""

import signal

__all__ = ["UserError", "code_of"]


class UserError(ValueError):
    """A mistake in a file, prompt, column or setting; the door prints it without a traceback."""


def code_of(signum: int) -> int:
    """The exit code, 128 and the signal; SIGUSR1, which announces SIGTERM, counts as that one."""
    return 128 + (signal.SIGTERM if signum == signal.SIGUSR1 else signum)
