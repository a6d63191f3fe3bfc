"""Singular factors of one weight, and copies of them on the device and in the dtype of the products."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svft_diffusion.adapters.layers.parking import page_out
from svft_diffusion.adapters.methods import Triplets
from svft_diffusion.kernels.call import compute_dtype
from svft_diffusion.spectral import SingularFactors


class SpreadFactors(nn.Module):
    """The factors that one adapter stands on as frozen parameters, which FSDP spreads over processes."""

    def __init__(self, factors: SingularFactors, triplets: Triplets, dtype: torch.dtype) -> None:
        super().__init__()
        self.U = nn.Parameter(factors.U[:, triplets].to(dtype), requires_grad=False)
        self.Vh = nn.Parameter(factors.Vh[triplets].to(dtype), requires_grad=False)


class PlacedFactors:
    """The factors of a layer's weight as a matrix, float32 on the CPU, and what was copied from them so far.

    Attributes:
        factors: the factors.
        spread: the factors of the chosen triplets in another place, which the layer's module tree holds; or None.
        exact: whether they alone give the weight back to float32 accuracy. Not so after a rotation among nearly equal
            singular values; the base weight is then always part of the sum.
    """

    def __init__(self, factors: SingularFactors) -> None:
        self.factors = factors
        self.exact = True
        self.spread: SpreadFactors | None = None
        self._placed: dict[object, SingularFactors] = {}
        self._listed: tuple[object, Tensor, SingularFactors] | None = None  # of a list of triplets, which is kept too

    def replace(self, factors: SingularFactors, *, exact: bool) -> None:
        """Other factors of the same weight."""
        self.factors, self.exact = factors, exact
        self.forget_copies()

    def forget_copies(self) -> None:
        """Let go of everything that was copied."""
        self._placed.clear()
        self._listed = None

    def chosen(self, x: Tensor, module: nn.Module, triplets: Triplets) -> SingularFactors:
        """The chosen triplets, ``U`` and ``Vh`` in the dtype of the products with ``x``, all on its device."""
        device, dtype = x.device, dtype_of_products(x, module)
        if self.spread is not None:  # whole for the time of the call, and of the one adapter that is here
            S = self.singular_values(device)[triplets]
            return SingularFactors(self.spread.U.to(dtype), S, self.spread.Vh.to(dtype))
        if isinstance(triplets, slice):
            return self.neighbours(device, dtype, triplets)
        if torch.compiler.is_compiling():  # a graph can't tell whether a list is the one from before
            U, S, Vh = self.neighbours(device, dtype, slice(0, len(self.factors.S)))
            return SingularFactors(U[:, triplets], S[triplets], Vh[triplets])
        key = (device, dtype, *identity(triplets))
        if self._listed is None or self._listed[0] != key:
            self._listed = (key, triplets, self._copy(device, dtype, triplets.cpu()))
        return self._listed[2]

    def neighbours(self, device: torch.device, dtype: torch.dtype, triplets: slice) -> SingularFactors:
        """Triplets that follow one another; copied once."""
        whole = triplets == slice(0, len(self.factors.S))
        if whole and device == self.factors.U.device and dtype == self.factors.U.dtype:
            return self.factors
        key = (device, dtype, triplets.start, triplets.stop)
        if key not in self._placed:
            self._placed[key] = self._copy(device, dtype, triplets)
            self.page_out_copied()
        return self._placed[key]

    def page_out_copied(self) -> None:
        """Factors that products read from copies need not be in memory, too."""
        copies = [copy for key, copy in self._placed.items() if isinstance(key, tuple)]  # others are of values alone
        for copy in copies:
            for own, used in ((self.factors.U, copy.U), (self.factors.Vh, copy.Vh)):
                if used.untyped_storage().data_ptr() != own.untyped_storage().data_ptr():  # some rows are no copy
                    page_out(own)

    def singular_values(self, device: torch.device) -> Tensor:
        """All singular values (k,) on a device, float32."""
        S = self.factors.S
        if S.device == device:
            return S
        if device not in self._placed:
            with torch.inference_mode(False):
                moved = S.to(device)
            self._placed[device] = SingularFactors(moved, moved, moved)
        return self._placed[device].S

    @torch.compiler.assume_constant_result
    def place_for_graph(self, device: torch.device, dtype: torch.dtype, first: int, last: int) -> bool:
        """Place factors while a graph is traced: one that filled them in itself would have to be traced again."""
        self.singular_values(device)
        self.neighbours(device, dtype, slice(first, last))
        return True

    def _copy(self, device: torch.device, dtype: torch.dtype, triplets: Triplets) -> SingularFactors:
        U, S, Vh = self.factors
        with torch.inference_mode(False), torch.no_grad():  # kept beyond this call, which may be any
            return SingularFactors(
                U[:, triplets].to(device, dtype).contiguous(),
                S[triplets].to(device),
                Vh[triplets].to(device, dtype).contiguous(),
            )


def dtype_of_products(x: Tensor, module: nn.Module) -> torch.dtype:
    """The dtype in which a layer multiplies its input with its weight."""
    if not x.is_floating_point():  # the ids that an embedding takes; no autocast there
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.dtype
    return compute_dtype(x)


def identity(tensor: Tensor) -> tuple[int, int]:
    """Changes whenever the tensor's values are changed in place."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
