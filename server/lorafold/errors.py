"""What a request can do wrong, beside the adapter errors of `lorafold_adapters.errors`.

LorafoldError
├── InvalidField            a field of the request is wrong; names the field
├── ConfigError             the configuration file is wrong; names the key
├── ModelUnsupported        the base cannot be loaded or served
├── DeploymentNotFound      no deployment of that name
├── DeploymentExists        the name is taken
├── DeploymentBusy          another call is changing this deployment now
├── DeploymentUnservable    the deployment is kept, but its adapter is not what it was or not there
├── EtagMismatch            the deployment was changed since the caller read it
├── NothingToRollBack       the deployment was never updated
├── StateNotSaved           the change could not be written into the state file; nothing was changed
│   └── StateDiskFull       as there is no room for it
├── QueueFull               too many requests wait
├── KvFull                  the sequence can never fit the cache
├── DeadlineExceeded        the request's own deadline passed before it was done
├── MeasurementBusy         another measurement of the unmerged path runs now
├── ExportOff               this server writes no exports
├── StepFailed              the model failed on the batch the request was in
├── BaseReloading           the base was found damaged and is being loaded again
└── EngineStopped           the engine takes no more requests

Knows no gRPC: `services/status.py` maps these classes to status codes.
"""

from lorafold_adapters.errors import LorafoldError


class InvalidField(LorafoldError):
    """A field of the request is wrong."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        """Path of the field in the request message, e.g. `spec.sampling.top_p`."""


class ConfigError(LorafoldError):
    """The configuration file cannot be used."""


class ModelUnsupported(LorafoldError):
    """The base model cannot be loaded or served."""


class DeploymentNotFound(LorafoldError):
    """No deployment has that name."""


class DeploymentExists(LorafoldError):
    """The name is taken."""


class DeploymentBusy(LorafoldError):
    """Another call is changing this deployment now."""


class DeploymentUnservable(LorafoldError):
    """The deployment is kept, but has no adapter that could be served."""


class EtagMismatch(LorafoldError):
    """The deployment was changed since the caller read it."""


class NothingToRollBack(LorafoldError):
    """The deployment was never updated."""


class StateNotSaved(LorafoldError):
    """A change could not be written into the state file; nothing was changed."""


class StateDiskFull(StateNotSaved):
    """The state file's disk, or the quota on it, is full."""


class MeasurementBusy(LorafoldError):
    """Another measurement runs now."""


class QueueFull(LorafoldError):
    """Too many requests wait already."""


class KvFull(LorafoldError):
    """The cache of keys and values has no room for a sequence."""


class DeadlineExceeded(LorafoldError):
    """The request's deadline passed before it was done."""


class FoldInProgress(LorafoldError):
    """Another call is changing what is folded now."""


class ExportOff(LorafoldError):
    """No export folder is configured."""


class StepFailed(LorafoldError):
    """The model failed on the batch the request was in."""


class BaseReloading(LorafoldError):
    """The base was found damaged while the request ran, and is being loaded again."""


class EngineStopped(LorafoldError):
    """The engine takes no more requests."""
