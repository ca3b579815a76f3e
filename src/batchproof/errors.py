"""The one error that a user causes and a user can mend."""


class BatchproofError(Exception):
    """Bad input. The message is one line that says what is wrong and what to write instead.

    The command line prints it without a traceback and exits with code 2.
    """
