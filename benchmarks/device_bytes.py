"""What an accelerator would hold in a training step that runs on the CPU, whose allocator counts nothing.

Counted are the tensors that the step makes, for as long as they live, and what was there before: all that it reads, and
the models that train, but for weights that are parked. Not counted is what lies still: cached pictures, text encoders
and the VAE after encoding. What kernels take for themselves between two operations is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, UntypedStorage, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from svft_diffusion.adapters.injection import spectral_layers


class DeviceBytes(TorchDispatchMode):
    """Counts while entered.

    Attributes:
        peak: most bytes at a time of what was made meanwhile.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._made: set[int] = set()  # storages
        self._read: dict[int, int] = {}  # bytes by address, of what was there before
        self._old: dict[int, UntypedStorage] = {}  # which is kept, so that no other comes to its place
        for model in models:
            parked = {
                layer.get_base_layer().weight for layer in spectral_layers(model).values() if layer.has_parked_weight
            }
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor not in parked:
                    self._note_read(tensor)

    @property
    def before(self) -> int:
        """Bytes of what was there before and is read, or would be held in any case."""
        total = end = 0
        for first, size in sorted(self._read.items()):  # some are parts of others
            total += max(0, first + size - max(first, end))
            end = max(end, first + size)
        return total

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view:  # reads nothing
            return func(*args, **kwargs)
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor) and given.untyped_storage()._cdata not in self._made:
                self._note_read(given)
        result = func(*args, **kwargs)
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self._note_made(made)
        return result

    def _note_read(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._old[storage._cdata] = storage
        # Not the storage: a file that is mapped into memory has several tensors in one.
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        size = span * tensor.itemsize if tensor.numel() else 0
        self._read[tensor.data_ptr()] = max(self._read.get(tensor.data_ptr(), 0), size)

    def _note_made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._made or key in self._old:
            return
        self._made.add(key)
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._made.discard(key)
        self._live -= size
