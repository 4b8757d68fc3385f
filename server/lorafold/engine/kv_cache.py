"""Keys and values of running sequences, in pages. `pages` knows which is whose, `step` where a step reads and writes.

Per layer two tensors [P, S, K, D]: P pages of S tokens, K key-value heads, D head width. A place is a token's index in
[P * S]. T: packed tokens of one step.
"""

from collections.abc import Sequence

from torch import Tensor


class PagedCache:
    """Keys and values of every layer, made when the layer first runs."""

    def __init__(self, *, pages: int, size: int) -> None:
        self.pages = pages
        self.size = size
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def store(self, layer: int, key: Tensor, value: Tensor, place_T: Tensor) -> tuple[Tensor, Tensor]:
        """Puts `key` and `value` [1, K, T, D] in their places; returns all of the layer's, [P, S, K, D]."""
        if layer not in self._layers:
            self._layers[layer] = (self._room(key), self._room(value))
        keys, values = self._layers[layer]
        keys.flatten(0, 1).index_copy_(0, place_T, key[0].transpose(0, 1))
        values.flatten(0, 1).index_copy_(0, place_T, value[0].transpose(0, 1))
        return keys, values

    def fill(self, pages: Sequence[int]) -> None:
        """Writes something to these pages of every layer that has run: memory never written to is no real memory."""
        for layer in self._layers.values():
            for tensor in layer:
                tensor[pages[0] : pages[-1] + 1] = 0.01

    def _room(self, like: Tensor) -> Tensor:
        return like.new_empty(self.pages, self.size, like.shape[1], like.shape[3])

    @property
    def nbytes(self) -> int:
        """Memory of all layers that have run."""
        return sum(key.nbytes + value.nbytes for key, value in self._layers.values())
