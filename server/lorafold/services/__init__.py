"""One thin translator per gRPC service: message in, dataclass out, and back."""
