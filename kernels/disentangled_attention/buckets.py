"""Which row of a relative table a distance belongs to: near ones each their own, far ones in logarithmic buckets."""

from __future__ import annotations

from functools import lru_cache

import torch


def relative_bucket(distance: torch.Tensor, *, bucket_size: int = 32, max_position: int = 512) -> torch.Tensor:
    """The signed bucket of a distance; row bucket + bucket_size - 1 of a table of 2 * bucket_size - 1 rows.

    With mid = bucket_size // 2 and r = min(|distance|, max_position - 1):
    bucket = sign(distance) * (r if r <= mid else ceil((mid - 1) * ln(r / mid) / ln((max_position - 1) / mid)) + mid).
    It never decreases as the distance grows. Whole numbers alone decide, so no logarithm is rounded.

    Args:
        distance: an integer tensor, query position minus key position.
        bucket_size: B, at least 2.
        max_position: P, at least 2; distances of P - 1 and more share the last bucket.

    Returns:
        int64 of distance's shape, in -(B - 1) .. B - 1.

    Raises:
        TypeError: distance is not an integer tensor.
        ValueError: bucket_size or max_position is below 2.

    Source: LTG-BERT, arXiv 2303.09859, section 3; DeBERTa-v2's logarithmic buckets.
    """
    if distance.is_floating_point() or distance.is_complex() or distance.dtype == torch.bool:
        raise TypeError(f"distance must be an integer tensor; got {distance.dtype}")
    check_sizes(bucket_size, max_position)
    ends = torch.tensor(last_distances(bucket_size, max_position), dtype=torch.int64, device=distance.device)
    # how many buckets end below |distance|: the bucket it is in
    return torch.sign(distance).long() * torch.bucketize(distance.long().abs(), ends[:-1])


def check_sizes(bucket_size: int, max_position: int) -> None:
    for name, value in (("bucket_size", bucket_size), ("max_position", max_position)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int; got {type(value).__name__}")
        if value < 2:
            raise ValueError(f"{name} must be at least 2; got {value}")


@lru_cache
def last_distances(bucket_size: int, max_position: int) -> tuple[int, ...]:
    """The largest |distance| of each bucket that is used, from bucket 0 on; of the last one, max_position - 1."""
    mid, furthest = bucket_size // 2, max_position - 1
    near = tuple(range(min(mid, furthest) + 1))
    if furthest <= mid:
        return near
    ends = [_last_within(n, mid, furthest) for n in range(1, mid)]
    # every end is at least the one before; ends that are equal are buckets without a distance
    return (*near, *ends)


def _last_within(n: int, mid: int, furthest: int) -> int:
    """The largest r with (mid - 1) * ln(r / mid) <= n * ln(furthest / mid), by bisection over whole numbers."""
    low, high = mid, furthest
    while low < high:
        r = (low + high + 1) // 2
        # both sides raised to powers: r^(mid - 1) * mid^n <= furthest^n * mid^(mid - 1)
        if r ** (mid - 1) * mid**n <= furthest**n * mid ** (mid - 1):
            low = r
        else:
            high = r - 1
    return low
