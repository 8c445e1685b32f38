"""A batch of features as it lies in the cache: encoded, to be decoded where it is used."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from cache_schema.encoding.float8 import float8_to_float32
from cache_schema.encoding.number_formats import Array
from cache_schema.errors import CacheRequestError
from cache_schema.format.layout import PAYLOAD_DTYPES
from cache_schema.format.manifest import EncodingKind
from cache_schema.reading.fused import scale_in_one_pass

TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "float8_e4m3": torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class EncodedBatch:
    """Encoded features of B samples at T timesteps, as torch tensors.

    `payload` (B, T, L, C) is float32, float16, bfloat16, int8 or float8_e4m3fn, as `encoding` says. The last two come
    with `scale` (B, T, L) and `channel` (T, C), or (B, T, C) where each sample has timesteps of its own, both float32;
    batches of the same timesteps may share `channel`. Move it to the device as it is and decode it there: fewer bytes
    cross the bus.
    """

    payload: torch.Tensor
    scale: torch.Tensor | None
    channel: torch.Tensor | None
    encoding: EncodingKind

    @property
    def coarse(self) -> bool:
        """Whether no stored number is more precise than a bfloat16."""
        return self.encoding in ("bfloat16", "int8", "float8_e4m3")

    @property
    def shape(self) -> torch.Size:
        """(B, T, L, C)."""
        return self.payload.shape

    def decode(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        non_blocking: bool = False,
        fused: bool = False,
    ) -> torch.Tensor:
        """Return the features (B, T, L, C) on `device` as `dtype`; the result shares no memory with the batch.

        In a cache with PCA these are the coordinates; `Cache.restore` returns to the teacher's channels. `fused`: on a
        CUDA device in one pass over memory, by a kernel whose compilation takes seconds; the same elsewhere.
        """
        encoded = self.to(device, non_blocking=non_blocking)
        if encoded.scale is None or encoded.channel is None:
            # A copy even where nothing changes, so that the buffer can be read into again.
            return encoded.payload.to(dtype, copy=encoded.payload is self.payload)
        if fused:
            found = scale_in_one_pass(encoded.payload, encoded.scale, encoded.channel, dtype)
            if found is not None:
                return found
        # In float32 whatever the result's type: three roundings to bfloat16 would cost more than the encoding did.
        float8 = encoded.payload.dtype == torch.float8_e4m3fn
        values = float8_to_float32(encoded.payload) if float8 else encoded.payload.to(torch.float32)
        values *= encoded.scale[..., None]
        values *= encoded.channel.unsqueeze(-2)  # (T, 1, C) or (B, T, 1, C)
        return values.to(dtype)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "EncodedBatch":
        """Return the batch, still encoded, on another device."""
        return replace(
            self,
            payload=self.payload.to(device, non_blocking=non_blocking),
            scale=None if self.scale is None else self.scale.to(device, non_blocking=non_blocking),
            channel=None if self.channel is None else self.channel.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "EncodedBatch":
        """Return the batch in page-locked memory, as a DataLoader asks for."""
        return replace(
            self,
            payload=self.payload.pin_memory(),
            scale=None if self.scale is None else self.scale.pin_memory(),
            channel=None if self.channel is None else self.channel.pin_memory(),
        )


def stored_batch(
    payload: Array, scale: Array | None, channel: torch.Tensor | None, encoding: EncodingKind, shape: tuple[int, ...]
) -> EncodedBatch:
    """Return the batch, with any leading axes, of arrays in NumPy's types of the store; `shape` is (T, L, C).

    Raises CacheRequestError for a payload or a scale that is not of this shape and encoding.
    """
    dtype = PAYLOAD_DTYPES[encoding]
    if payload.shape[-3:] != shape or payload.dtype.name != dtype:
        expected = f"(..., {', '.join(map(str, shape))}) {dtype}"
        raise CacheRequestError(f"the payload is {payload.shape} {payload.dtype}, stored values are {expected}")
    if channel is None and scale is not None:
        raise CacheRequestError(f"{encoding} has no scales; decode the payload alone")
    if channel is not None and (scale is None or scale.shape != payload.shape[:-1] or scale.dtype.name != "float32"):
        given = "none" if scale is None else f"{scale.shape} {scale.dtype}"
        raise CacheRequestError(f"{encoding} needs the scales {payload.shape[:-1]} float32 of its payload, not {given}")
    scales = None if scale is None else _as_tensor(scale)
    return EncodedBatch(_as_tensor(payload).view(TORCH_DTYPES[encoding]), scales, channel, encoding)


def _as_tensor(values: Array) -> torch.Tensor:
    return torch.from_numpy(np.require(values, requirements=["C", "W"]))
