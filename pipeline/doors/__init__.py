"""The doors: each module is a command, with `add_arguments` and `run`."""
