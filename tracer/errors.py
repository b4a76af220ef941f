"""The errors that moescope raises on purpose; everything else is a bug."""


class MoescopeError(Exception):
    """A failure that the message explains: what was wrong, where, and what to do next."""


class InputError(MoescopeError, ValueError):
    """The user gave something unusable; the message names the field, the value and the remedy."""


class UnsupportedModelError(MoescopeError):
    """The model's routing can't be seen (or steered) here; the message says what to do."""


class TracerError(MoescopeError):
    """Tracing can't go on without losing rows that it promised to keep."""


class StoreError(MoescopeError):
    """A trace store is missing, damaged, of another format or of another model."""


class SlotsFullError(MoescopeError):
    """Every mask slot is in use by requests with other masks; a later try may find one free."""
