"""A few bytes by which singular factors from another machine are brought back to the basis an adapter was trained in.

A weight does not settle its singular vectors: ``(u_i, v_i)`` may change sign together, triplets with (nearly) equal
singular values may rotate among themselves, and where ``sigma`` is (nearly) zero, ``u`` and ``v`` may do so
independently. Which of all these a decomposition returns depends on the driver and on how the weight was rounded,
and an update ``U M V^T`` depends on it as well: a diagonal ``M`` on rotations, any other on the signs too.

A sketch holds, in this order:

* a header of 3 bytes: version and contents, then k;
* for each triplet 4 bits: which of 8 fixed projections of ``u_i`` is largest in magnitude, and its sign. The largest
  of 8 is far from zero, so that no rounding of the weight turns its sign;
* the probes (`spectral.probes`) of two fixed random updates, eight numbers in 16 bits each: by them the error that
  alignment leaves is measured, down to about 1e-4;
* for each cluster of c nearly tied triplets, c + 1 fixed projections of its ``u`` in 16 bits each, and as many of its
  ``v`` if the cluster touches zero. That settles the rotation to about 1e-4.

Singular values are nearly tied when their gap is below 16 times what rounding the weight to float16 moves them by;
beyond it such rounding turns the vectors by less than 1/16. ``sigma`` and ``-sigma`` count as a pair: that is how
a singular value ties with zero.

What cannot be aligned: clusters that the byte budget leaves out, and for a weight that is not square the longer
vectors of zero singular values: these lie anywhere in a null space larger than the cluster. Both are seen in
`Alignment.error`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from svft_diffusion.spectral.core import Core
from svft_diffusion.spectral.decomposition import SingularFactors
from svft_diffusion.spectral.portable_random import project_columns, random_signs
from svft_diffusion.spectral.probes import NUMBER_OF_PROBES, probe_error, probe_update

_VERSION = 1
_HAS_SIGNS = 1  # flag beside the version
_HEADER_BYTES = 3
_PROBED_UPDATES = 2
_PROBE_BYTES = 2 * _PROBED_UPDATES * NUMBER_OF_PROBES
_CLUSTER_HEADER_BYTES = 3
_LARGEST_K = 2**16 - 1
_LARGEST_CLUSTER = 127  # its size shares a byte with a flag
_SIGN_PROJECTIONS = 8
_SPARE_PROJECTIONS = 1  # beyond c: the fit of a rotation to c projections is now and then ill-conditioned
_FLOAT16_ROUNDING = 2.0**-12  # typical relative rounding of an entry
_NEAR_TIE = 16
_QUANTUM = 8 / 32767  # projections and probes are about standard normal: beyond 8 there are none


class Alignment(NamedTuple):
    """Factors brought to the basis of a sketch."""

    factors: SingularFactors
    signs: Tensor  # (k,) +1 or -1: by what each pair (u_i, v_i) was multiplied before any rotation
    rotated: bool  # whether columns of nearly tied triplets were rotated among themselves
    error: float  # measured relative error of an update that remains: 0 for the basis of the sketch, 1.4 for another


class _Cluster(NamedTuple):
    """Neighbouring, nearly tied triplets ``first`` to ``last`` (exclusive)."""

    first: int
    last: int
    touches_zero: bool

    @property
    def projections(self) -> int:
        return self.last - self.first + _SPARE_PROJECTIONS

    @property
    def sides(self) -> int:
        return 2 if self.touches_zero else 1

    @property
    def data_bytes(self) -> int:
        return 2 * self.sides * self.projections * (self.last - self.first)

    @property
    def bytes(self) -> int:
        """Size in a sketch; a lone triplet away from zero needs no entry."""
        alone = self.last - self.first == 1 and not self.touches_zero
        return 0 if alone else _CLUSTER_HEADER_BYTES + self.data_bytes


class _Sketch(NamedTuple):
    """A decoded sketch."""

    largest: Tensor | None  # (k,) which projection of u_i is largest
    signs: Tensor | None  # (k,) its sign, +1 or -1
    probes: Tensor  # (8,)
    clusters: list[tuple[_Cluster, list[Tensor]]]  # with the projections (c + 1, c) of its u, and of its v


def sketch_of_basis(factors: SingularFactors, *, signs: bool, byte_budget: int) -> Tensor:
    """Sketch of the basis of ``factors``, 1-D uint8; ``signs`` for a core with entries off its diagonal.

    At most ``byte_budget`` bytes, except that the header, the signs (k/2 bytes) and the probes are always written; the
    clusters, smallest gaps first, follow as far as they fit.

    Raises:
        ValueError: there are more than 65535 triplets.
    """
    k = len(factors.S)
    if k > _LARGEST_K:
        raise ValueError(f"a sketch holds at most {_LARGEST_K} singular triplets, got {k}")
    parts = []
    if signs:
        parts.append(_encode_signs(project_columns(factors.U, _SIGN_PROJECTIONS, "basis, left").cpu()))
    parts.append(_quantised(_probes(factors, signs)))
    left = byte_budget - _HEADER_BYTES - sum(len(part) for part in parts)
    parts += [_encode_cluster(factors, cluster) for cluster in _near_ties(factors, left)]
    contents = _VERSION << 4 | _HAS_SIGNS * signs
    header = torch.tensor([contents, *k.to_bytes(2, "little")], dtype=torch.uint8)
    return torch.cat([header, *parts])


def align_basis(factors: SingularFactors, sketch: Tensor) -> Alignment:
    """``factors`` of (nearly) the same weight, brought to the basis of a ``sketch``.

    Signs are flipped first, then the columns of each cluster rotated by the orthogonal matrix that fits the stored
    projections best (orthogonal Procrustes problem): ``u`` and ``v`` together, or each on its own where the cluster
    touches zero. What agrees with the sketch already is left as it is, bit for bit. Singular values are not touched:
    after a rotation they may be off by as much as they differ within the cluster, and ``U diag(S) V^T`` with them.
    So no weight may be rebuilt from factors that were rotated.

    ``error`` is the relative error of a random update as the stored probes measure it.

    Raises:
        ValueError: the sketch is damaged, of another version, or of a weight of another size.
    """
    k = len(factors.S)
    decoded = _decode(sketch.detach().cpu(), k)
    U, S, Vh = factors
    signs = torch.ones(k)
    if decoded.largest is not None and decoded.signs is not None:
        projections = project_columns(U, _SIGN_PROJECTIONS, "basis, left").cpu()
        found = projections.gather(0, decoded.largest[None]).squeeze(0)
        signs = torch.where(found * decoded.signs < 0, -1.0, 1.0)
    if (signs < 0).any():
        U, Vh = U * signs.to(U), Vh * signs.to(Vh)[:, None]
    rotated = False
    for cluster, stored in decoded.clusters:
        columns = slice(cluster.first, cluster.last)
        flips_matter = decoded.signs is not None or cluster.touches_zero
        rotations = [_rotation(*pair, flips_matter) for pair in zip(_project(U, Vh, cluster), stored, strict=True)]
        if all(rotation is None for rotation in rotations):
            continue
        if not rotated:
            U, Vh, rotated = U.clone(), Vh.clone(), True
        for_u, for_v = rotations[0], rotations[-1]
        if for_u is not None:
            U[:, columns] = (U[:, columns].double() @ for_u.to(U.device)).to(U)
        if for_v is not None:
            Vh[columns] = (for_v.T.to(Vh.device) @ Vh[columns].double()).to(Vh)
    aligned = SingularFactors(U, S, Vh)
    return Alignment(aligned, signs, rotated, _measured_error(aligned, decoded))


def _measured_error(aligned: SingularFactors, sketch: _Sketch) -> float:
    found = _probes(aligned, sketch.signs is not None)
    return probe_error(sketch.probes, found) if (found - sketch.probes).abs().max() > _QUANTUM else 0.0


def basis_error(found: SingularFactors, expected: SingularFactors, *, signs: bool) -> float:
    """Measured relative error of a random update on the basis ``found`` in place of ``expected``.

    ``signs`` as for `sketch_of_basis`.
    """
    return probe_error(_probes(expected, signs), _probes(found, signs))


def _probes(factors: SingularFactors, signs: bool) -> Tensor:
    """Probes (8,) of updates whose cores hold random signs: on the diagonal, and beside it if joint flips matter."""
    k = len(factors.S)
    probes = []
    for update in range(_PROBED_UPDATES):
        entries = random_signs(3 if signs else 1, k, f"basis, core {update}").T.contiguous()
        if signs:
            entries[0, 0] = entries[-1, -1] = 0.0  # places outside the matrix
        probes.append(probe_update(factors.U, Core(entries.to(factors.U.device)), factors.Vh).cpu())
    return torch.cat(probes).double() / math.sqrt(entries.numel())


def _near_ties(factors: SingularFactors, byte_budget: int) -> list[_Cluster]:
    """Clusters of nearly tied triplets that fit the budget, joined over the smallest gaps first."""
    k = len(factors.S)
    sigma = factors.S.double().cpu()
    entries_of_weight = factors.U.shape[0] * factors.Vh.shape[1]
    root_mean_square = math.sqrt(float(sigma.square().sum()) / entries_of_weight)
    threshold = _NEAR_TIE * _FLOAT16_ROUNDING * root_mean_square
    gaps = torch.cat([sigma[:-1] - sigma[1:], 2 * sigma])  # to the next triplet, and to the own mirror image
    cluster_of = [_Cluster(index, index + 1, touches_zero=False) for index in range(k)]
    for candidate in gaps.argsort(stable=True).tolist():
        if gaps[candidate] > threshold:
            break
        if candidate < k - 1:
            one, other = cluster_of[candidate], cluster_of[candidate + 1]
            joined = _Cluster(one.first, other.last, one.touches_zero or other.touches_zero)
            needed = joined.bytes - one.bytes - other.bytes
        else:
            one = cluster_of[candidate - (k - 1)]
            joined = one._replace(touches_zero=True)
            needed = joined.bytes - one.bytes
        if needed <= byte_budget and joined.last - joined.first <= _LARGEST_CLUSTER:
            byte_budget -= needed
            cluster_of[joined.first : joined.last] = [joined] * (joined.last - joined.first)
    return [cluster for index, cluster in enumerate(cluster_of) if cluster.first == index and cluster.bytes > 0]


def _project(U: Tensor, Vh: Tensor, cluster: _Cluster) -> list[Tensor]:
    """Projections (c + 1, c) of a cluster's ``u``, and of its ``v`` if it touches zero, float64 on the CPU."""
    columns = slice(cluster.first, cluster.last)
    sides = [(U[:, columns], "basis, left"), (Vh[columns].T, "basis, right")][: cluster.sides]
    return [project_columns(matrix, cluster.projections, purpose).cpu() for matrix, purpose in sides]


def _rotation(found: Tensor, stored: Tensor, flips_matter: bool) -> Tensor | None:
    """Orthogonal ``Q`` (c, c) that minimises ``||found Q - stored||``; None where the two agree as they are.

    A diagonal core does not see joint flips of ``u_i`` and ``v_i``: then columns agree up to their sign.
    """
    if not flips_matter:
        stored = torch.where((found * stored).sum(dim=0) < 0, -stored, stored)
    if (found - stored).abs().max() <= _QUANTUM:
        return None
    left, _, right = torch.linalg.svd(found.mT @ stored)
    return torch.matmul(left, right)


def _encode_signs(projections: Tensor) -> Tensor:
    """4 bits a triplet from projections (8, k): the row of the largest one in three, its sign in one."""
    largest = projections.abs().argmax(dim=0)
    negative = projections.gather(0, largest[None]).squeeze(0) < 0
    nibbles = largest.to(torch.uint8) | (negative.to(torch.uint8) << 3)
    if len(nibbles) % 2:
        nibbles = torch.cat([nibbles, nibbles.new_zeros(1)])
    return nibbles[0::2] | (nibbles[1::2] << 4)


def _encode_cluster(factors: SingularFactors, cluster: _Cluster) -> Tensor:
    size_and_flag = cluster.last - cluster.first | cluster.touches_zero << 7
    header = torch.tensor([*cluster.first.to_bytes(2, "little"), size_and_flag], dtype=torch.uint8)
    return torch.cat([header, *map(_quantised, _project(factors.U, factors.Vh, cluster))])


def _quantised(numbers: Tensor) -> Tensor:
    """About standard normal ``numbers`` in 16 bits each, uint8."""
    return (numbers / _QUANTUM).round().clamp(-32767, 32767).to(torch.int16).flatten().view(torch.uint8)


def _restored(octets: Tensor) -> Tensor:
    """The numbers of `_quantised`, 1-D float64."""
    return octets.clone().view(torch.int16).double() * _QUANTUM


def _decode(sketch: Tensor, k: int) -> _Sketch:
    if sketch.dtype != torch.uint8 or sketch.ndim != 1 or len(sketch) < _HEADER_BYTES:
        raise ValueError("this is no sketch of a basis")
    content = bytes(sketch.tolist())
    version, flags = content[0] >> 4, content[0] & 15
    if version != _VERSION or flags & ~_HAS_SIGNS:
        raise ValueError(f"the sketch of the basis has version {version}, and {_VERSION} is known")
    k_of_sketch = int.from_bytes(content[1:_HEADER_BYTES], "little")
    if k_of_sketch != k:
        raise ValueError(f"the sketch is that of {k_of_sketch} singular triplets, and there are {k}")
    rest = sketch[_HEADER_BYTES:]
    largest = signs = None
    if flags & _HAS_SIGNS:
        packed, rest = _take(rest, (k + 1) // 2)
        nibbles = torch.stack([packed & 15, packed >> 4], dim=1).flatten()[:k]
        largest, signs = (nibbles & 7).long(), 1.0 - 2.0 * (nibbles >> 3)
    packed, rest = _take(rest, _PROBE_BYTES)
    return _Sketch(largest, signs, _restored(packed), _decode_clusters(rest, k))


def _decode_clusters(rest: Tensor, k: int) -> list[tuple[_Cluster, list[Tensor]]]:
    clusters: list[tuple[_Cluster, list[Tensor]]] = []
    end = 0
    while len(rest) > 0:
        header, rest = _take(rest, _CLUSTER_HEADER_BYTES)
        *place, size_and_flag = header.tolist()
        first, size = int.from_bytes(place, "little"), size_and_flag & 127
        cluster = _Cluster(first, first + size, touches_zero=size_and_flag > 127)
        if size == 0 or first < end or cluster.last > k:
            raise ValueError("the sketch of the basis is damaged: a cluster lies outside the singular triplets")
        end = cluster.last
        packed, rest = _take(rest, cluster.data_bytes)
        clusters.append((cluster, list(_restored(packed).view(cluster.sides, cluster.projections, size))))
    return clusters


def _take(content: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if len(content) < count:
        raise ValueError("the sketch of the basis is damaged: it ends too early")
    return content[:count], content[count:]
