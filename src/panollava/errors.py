"""The one exception for what a user can put right: bad rows, bad settings, bad files."""


class UserError(Exception):
    """A fault in the input. The message names the place, the value found, what was expected and
    what to do; the command line prints it without a traceback and exits with status 1."""
