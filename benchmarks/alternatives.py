"""The tools a user would pick instead, each at the best honest setting we found for these samples.

Samples are arrays (T, L, C) of an encoded payload. Every writer puts them under a folder of its own in the order of
their rows; every reader is opened on that folder and then called with the rows of a batch. Imports happen where a tool
is used: what is not installed is only listed.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.synthetic import TAP, Workload
from cache_schema.encoding.number_formats import Array

# What a reader returns: the rows it really delivered, and their samples, one by one or as one array (B, T, L, C).
Batch = tuple[Array, Sequence[Any] | Array]
Read = Callable[[Array], Batch]

# The size of the files every tool splits its store into: that of our own shards.
FILE_BYTES = 64_000_000
# Samples in the shuffle buffer of sequential stores: two batches.
SHUFFLE_BUFFER = 64


@dataclass(frozen=True)
class Reader:
    """One way of reading a tool's store; `lazy` where a sample is a view of a mapped file that nothing has read yet."""

    name: str
    distribution: str
    store: str
    open: Callable[[Path, Workload], Read]
    lazy: bool = False


@dataclass(frozen=True)
class Writer:
    """How samples get into a tool's store; returns when everything has been handed to the operating system."""

    name: str
    distribution: str
    write: Callable[[Path, Workload, Sequence[Array]], None]


def as_array(sample: Any, workload: Workload) -> Array:
    """Return what a tool delivered as an array (T, L, C) of the stored bits, without a copy."""
    sample = sample.numpy() if isinstance(sample, torch.Tensor) else sample
    return sample.view(workload.dtype).reshape(workload.shape)


def as_tensor(sample: Array) -> torch.Tensor:
    """Return a tensor of the stored bits: litdata cannot serialise bfloat16, so int16 has to stand for it."""
    return torch.from_numpy(np.array(sample.view(np.int16) if sample.dtype == np.uint16 else sample))


def write_litdata(folder: Path, workload: Workload, samples: Sequence[Array]) -> None:
    # What `litdata.optimize` uses inside its worker processes, without the seconds it takes to start them.
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes=FILE_BYTES)
    for row, sample in enumerate(samples):
        writer.add_item(row, {"row": row, "features": as_tensor(sample)})
    writer.done()
    writer.merge(num_workers=1)


def litdata_by_index(folder: Path, workload: Workload) -> Read:
    from litdata import StreamingDataset

    dataset = StreamingDataset(str(folder))
    return lambda rows: (rows, [dataset[row]["features"] for row in rows.tolist()])


def litdata_shuffled(folder: Path, workload: Workload) -> Read:
    from litdata import StreamingDataset

    dataset = StreamingDataset(str(folder), shuffle=True)
    return _in_order_of_arrival(itertools.chain.from_iterable(itertools.repeat(dataset)), "row", "features")


def write_mds(folder: Path, workload: Workload, samples: Sequence[Array]) -> None:
    from streaming import MDSWriter

    shape = ",".join(str(size) for size in workload.shape)
    columns = {"row": "int", "features": f"ndarray:{workload.dtype}:{shape}"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=FILE_BYTES) as writer:
        for row, sample in enumerate(samples):
            writer.write({"row": row, "features": np.asarray(sample)})


def mds_by_index(folder: Path, workload: Workload) -> Read:
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(folder), shuffle=False, batch_size=1)
    return lambda rows: (rows, [dataset[row]["features"] for row in rows.tolist()])


def write_webdataset(folder: Path, workload: Workload, samples: Sequence[Array]) -> None:
    import webdataset

    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxsize=FILE_BYTES, verbose=0) as writer:
        for row, sample in enumerate(samples):
            writer.write({"__key__": f"{row:06d}", "npy": np.asarray(sample)})


def webdataset_shuffled(folder: Path, workload: Workload) -> Read:
    import webdataset

    files = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = webdataset.WebDataset(files, shardshuffle=len(files), empty_check=False)
    dataset = dataset.shuffle(SHUFFLE_BUFFER).decode()
    return _in_order_of_arrival(itertools.chain.from_iterable(itertools.repeat(dataset)), "__key__", "npy")


def write_torch_files(folder: Path, workload: Workload, samples: Sequence[Array]) -> None:
    folder.mkdir()
    for row, sample in enumerate(samples):
        torch.save(as_tensor(sample), folder / f"{row:06d}.pt")


def torch_files(folder: Path, workload: Workload) -> Read:
    return lambda rows: (rows, [torch.load(folder / f"{row:06d}.pt", weights_only=True) for row in rows])


def torch_mapped_files(folder: Path, workload: Workload) -> Read:
    return lambda rows: (rows, [torch.load(folder / f"{row:06d}.pt", weights_only=True, mmap=True) for row in rows])


def tensorstore_gather(folder: Path, workload: Workload) -> Read:
    import tensorstore

    store = {"driver": "file", "path": f"{folder / 'features' / TAP}/"}
    array = tensorstore.open({"driver": "zarr3", "kvstore": store}, open=True, read=True).result()[:, 0]
    buffers: dict[int, Any] = {}

    def read(rows: Array) -> Batch:
        # Into memory that is used again: twice as fast as a fresh array for every batch.
        if len(rows) not in buffers:
            buffers[len(rows)] = np.empty((len(rows), *workload.shape), workload.dtype)
        tensorstore.array(buffers[len(rows)]).write(array[rows]).result()
        return rows, buffers[len(rows)]

    return read


def zarr_by_index(folder: Path, workload: Workload) -> Read:
    import zarr

    array: Any = zarr.open_array(folder / "features" / TAP, mode="r")
    return lambda rows: (rows, [array[row] for row in rows.tolist()])


def zarrs_by_index(folder: Path, workload: Workload) -> Read:
    import zarr
    import zarrs  # noqa: F401 - registers the pipeline

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    return zarr_by_index(folder, workload)


def zarr_orthogonal(folder: Path, workload: Workload) -> Read:
    import zarr

    array: Any = zarr.open_array(folder / "features" / TAP, mode="r")
    return lambda rows: (rows, array.oindex[rows][:, 0])


def _in_order_of_arrival(stream: Iterator[Any], key: str, value: str) -> Read:
    """Return a reader for a store that chooses itself which samples come next."""

    def read(rows: Array) -> Batch:
        samples = list(itertools.islice(stream, len(rows)))
        return np.array([int(sample[key]) for sample in samples]), [sample[value] for sample in samples]

    return read


WRITERS = [
    Writer("litdata", "litdata", write_litdata),
    Writer("MosaicML streaming, MDS", "mosaicml-streaming", write_mds),
    Writer("webdataset, .npy in tars", "webdataset", write_webdataset),
    Writer("torch.save, a file per sample", "torch", write_torch_files),
]

READERS = [
    Reader("litdata, `ds[i]`", "litdata", "litdata", litdata_by_index, lazy=True),
    Reader("litdata, shuffled iteration", "litdata", "litdata", litdata_shuffled, lazy=True),
    Reader("MosaicML streaming, `ds[i]`", "mosaicml-streaming", "mosaicml-streaming", mds_by_index),
    Reader("tensorstore, one gather into a reused buffer", "tensorstore", "cache", tensorstore_gather),
    Reader("torch.load, a file per sample", "torch", "torch", torch_files),
    Reader("torch.load(mmap=True), a file per sample", "torch", "torch", torch_mapped_files, lazy=True),
    Reader("zarr-python with zarrs' pipeline, `z[i]`", "zarrs", "cache", zarrs_by_index),
    Reader("webdataset, shuffle buffer, no random access", "webdataset", "webdataset", webdataset_shuffled),
    Reader("zarr-python, `z[i]`", "zarr", "cache", zarr_by_index),
    Reader("zarr-python, `z.oindex[rows]`", "zarr", "cache", zarr_orthogonal),
]
