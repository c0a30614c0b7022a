"""Keys and values of the tokens that a layer has read."""

import torch


class KeyValueCache:
    """Room for the keys and values of a layer.

    Args:
        capacity: tokens of each text, at most.
    """

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None

    def extend(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the newest tokens' and return those of all.

        Shapes:
            key and value [s, b, g, d] -> twice [all, b, g, d]
        """
        if self._room is None:
            shape = (self.capacity, *key.shape[1:])
            self._room = key.new_empty(shape), value.new_empty(shape)
        start, self.length = self.length, self.length + key.shape[0]
        for room, newest in zip(self._room, (key, value), strict=True):
            room[start:self.length] = newest
        keys, values = (room[:self.length] for room in self._room)
        return keys, values
