"""The decode engine: one thread that owns the model. Knows no gRPC."""
