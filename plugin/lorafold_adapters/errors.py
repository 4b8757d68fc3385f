"""Everything that can go wrong with adapters and weights, as one tree.

LorafoldError
├── AdapterError                the adapter cannot be used; the message says why and what to do
│   ├── AdapterNotFound         no such folder, or a file in it is missing
│   ├── AdapterChanged          its folder has other contents than when it was deployed
│   ├── AdapterCorrupt          a file cannot be read, or its contents contradict each other
│   ├── AdapterUnsupported      well-formed, but of a kind or with an option that is not served
│   ├── BaseMismatch            made for another base: names or shapes do not fit, or its stamp says so
│   ├── AdapterUnstamped        has no stamp where one is demanded
│   ├── CompositionInvalid      a composition of adapters asks for what there is not; names the option
│   └── DeltaLost               folding it would lose too much of it in the weights' dtype
├── AdapterNotLoaded            the name or digest is unknown to this manager
├── DeviceFull                  the device's memory does not suffice; nothing was changed
├── RoutingMismatch             a batch inside `routed` has another number of rows than was routed
├── AdapterInUse                it is folded or routed now and cannot be dropped
├── ExportExists                the folder to export into is not empty
├── ExportFailed                an export could not be written; nothing is left of it
├── ExportUnsupported           transformers cannot write a checkpoint of this base piece by piece
├── FoldFailed                  folding failed; the base was given back bit for bit
└── BaseCorrupt                 the base could not be given back, or no longer equals what was loaded

Knows no gRPC: the server maps these classes to status codes in one table.
"""


class LorafoldError(Exception):
    """Root of everything this project raises on purpose."""


class AdapterError(LorafoldError):
    """The adapter cannot be used."""


class AdapterNotFound(AdapterError):
    """No such adapter folder, or a file that every adapter has is missing from it."""


class AdapterChanged(AdapterError):
    """The folder of an adapter that is deployed has other contents than it had then."""


class AdapterCorrupt(AdapterError):
    """A file of the adapter cannot be read, or its contents contradict each other."""


class AdapterUnsupported(AdapterError):
    """The adapter is well-formed, but of a kind or with an option that is not served."""


class BaseMismatch(AdapterError):
    """The adapter was made for another base."""


class CompositionInvalid(AdapterError):
    """A composition of adapters is not well-formed."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        """The option that is wrong, e.g. `density` or `parts[0].weight`."""
        self.fact = message
        """What is wrong with it."""


class DeltaLost(AdapterError):
    """Folding the adapter would lose too much of it in the dtype of the weights."""


class AdapterUnstamped(AdapterError):
    """The adapter has no stamp, and one is demanded."""


class AdapterNotLoaded(LorafoldError):
    """The name or digest is unknown to this manager."""


class DeviceFull(LorafoldError):
    """The device's memory does not suffice; nothing was changed."""


class RoutingMismatch(LorafoldError):
    """A batch inside `routed` has another number of rows than was routed."""


class AdapterInUse(LorafoldError):
    """The adapter is folded or routed now and cannot be dropped."""


class ExportExists(LorafoldError):
    """The folder to export into is there and not empty."""


class ExportFailed(LorafoldError):
    """An export could not be written; nothing is left of it."""


class ExportUnsupported(LorafoldError):
    """No checkpoint of this base can be written piece by piece."""


class FoldFailed(LorafoldError):
    """Folding failed part-way; the base was given back bit for bit."""


class BaseCorrupt(LorafoldError):
    """The base could not be given back, or no longer equals what was loaded."""
