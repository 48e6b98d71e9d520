"""Errors on purpose: the message says what was found, what was expected, and what to do next.

A command prints the message of such an error. Any other error is a bug, and keeps its traceback.
"""


class JaxlmError(Exception):
    """An error that jaxlm raises on purpose; each is also one of Python's own."""


class InputError(JaxlmError, ValueError):
    """A value, a file or a checkpoint is not as it must be."""


class RunError(JaxlmError, RuntimeError):
    """Something cannot be done as things are on this machine."""


class FileError(JaxlmError, OSError):
    """A file cannot be read or written."""


class MissingFileError(JaxlmError, FileNotFoundError):
    """A file is not there."""


class NoConnectionError(JaxlmError, ConnectionError):
    """A server cannot be reached."""


class MissingPackageError(JaxlmError, ImportError):
    """An optional package is not installed."""
