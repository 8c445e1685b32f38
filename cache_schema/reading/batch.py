"""A batch of features as it lies in the cache: encoded, to be decoded where it is used."""

from dataclasses import dataclass, replace

import torch

from cache_schema.encoding.float8 import float8_to_float32
from cache_schema.format.manifest import EncodingKind


@dataclass(frozen=True)
class EncodedBatch:
    """Encoded features of B samples at T timesteps, as torch tensors.

    `payload` (B, T, L, C) is float32, float16, bfloat16, int8 or float8_e4m3fn, as `encoding` says. The last two come
    with `scale` (B, T, L) and `channel` (T, C), both float32; batches of the same timesteps may share `channel`. Move
    it to the device as it is and decode it there: fewer bytes cross the bus.
    """

    payload: torch.Tensor
    scale: torch.Tensor | None
    channel: torch.Tensor | None
    encoding: EncodingKind

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
    ) -> torch.Tensor:
        """Return the features (B, T, L, C) on `device` as `dtype`; the result shares no memory with the batch.

        In a cache with PCA these are the coordinates; `Cache.restore` returns to the teacher's channels.
        """
        encoded = self.to(device, non_blocking=non_blocking)
        if encoded.scale is None or encoded.channel is None:
            # A copy even where nothing changes, so that the buffer can be read into again.
            return encoded.payload.to(dtype, copy=encoded.payload is self.payload)
        # In float32 whatever the result's type: three roundings to bfloat16 would cost more than the encoding did.
        float8 = encoded.payload.dtype == torch.float8_e4m3fn
        values = float8_to_float32(encoded.payload) if float8 else encoded.payload.to(torch.float32)
        values *= encoded.scale[..., None]
        values *= encoded.channel[:, None, :]
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
