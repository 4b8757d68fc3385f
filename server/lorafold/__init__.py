"""lorafold: a generation server that folds LoRA adapters in and out of one base model, and a client for it.

Importing this package loads neither torch nor grpc: every client imports it.
"""
