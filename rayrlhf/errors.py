"""The one exception for mistakes that a user can mend."""


class UserError(Exception):
    """Bad input or an impossible request.

    The message is one line: what is wrong, where (file, row or key), how to mend it.
    Entry points print it without a traceback and exit with status 2.
    """
