"""What a person did wrong, said in one sentence."""

__all__ = ["UserError"]


class UserError(ValueError):
    """A mistake in a file, prompt, column or setting; the door prints its sentence without a
    traceback.
    """
