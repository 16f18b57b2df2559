"""Every error this project raises on purpose, each with one sentence: what was given, what is allowed, what to do.

The text of an error lives where it is raised; only the types live here. Those that are raised while Keras traces a
training step derive from no other built-in error: TensorFlow would wrap them in an error of its own.
"""


class PrivacyError(Exception):
    """Base of every error raised on purpose by `tfprivacy_ft` and `federated`."""


class InvalidArgumentError(PrivacyError, ValueError):
    """An argument is outside its range, or two arguments contradict each other."""


class UnsupportedModelError(PrivacyError):
    """The model, its loss or the way it is trained cannot be made private; the text names the layer and the fix."""


class RawGradientsError(PrivacyError):
    """Gradients that were neither clipped nor noised reached a DP optimizer."""


class UnsupportedBackendError(PrivacyError, ImportError):
    """Keras runs on another backend than TensorFlow, whose graphs the clipping reads."""


class BudgetExceededError(PrivacyError):
    """One more step or round would pass the target epsilon; nothing was released."""


class UnsupportedEventError(PrivacyError):
    """The accountant asked for has no bound for this release, or releases that do not compose were added."""


class LedgerError(PrivacyError):
    """The ledger could not be written or read; training must not go on."""


class LedgerDamagedError(LedgerError):
    """A ledger file was cut, edited or corrupted; the text says where."""


class LedgerLockedError(LedgerError):
    """Another process is writing this ledger."""


class CheckpointError(PrivacyError):
    """A checkpoint cannot be read or written, or it is of another run; the text says which."""


class DatasetError(PrivacyError):
    """A data set is unknown, missing, damaged, empty, or its parts have different lengths."""


class WeightsError(PrivacyError):
    """Pretrained weights are unknown, missing, damaged, or of another architecture; the text says where they belong."""


class MissingDependencyError(PrivacyError, ImportError):
    """An optional package is needed; the text gives the command that installs it."""


class UnsupportedSystemError(PrivacyError):
    """The operating system does not allow what was asked for; the text names it and what to do instead."""


class WorkerUnreachableError(PrivacyError):
    """A remote TFF worker does not answer; nothing was computed, and nothing released."""


class WorkerLostError(PrivacyError):
    """A TFF worker went away during a computation: a round that it cut short counts, and can be run again as a new one."""
