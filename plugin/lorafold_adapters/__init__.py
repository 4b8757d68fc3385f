"""LoRA adapters on a transformers model: folded into the weights with an exact undo, or beside them, row by row."""

from lorafold_adapters.checkpoint import Checkpoint, read_again, read_checkpoint
from lorafold_adapters.folded import FoldState
from lorafold_adapters.manager import AdapterManager

__all__ = ["AdapterManager", "Checkpoint", "FoldState", "read_again", "read_checkpoint"]
