"""The words that a manifest has for a choice. They are imported by command lines, so nothing heavy may be here."""

from typing import Literal

EncodingKind = Literal["float32", "float16", "bfloat16", "int8", "float8_e4m3"]
# The blosc ones shuffle bytes by the size of the stored type.
Compression = Literal["none", "zstd", "blosc:lz4", "blosc:zstd"]
StoreKind = Literal["zarr", "webdataset"]
# Number format of the weights of linear layers in memory, where it is not the one they were saved in.
Quantization = Literal["int8", "fp8"]
# joint: context and noisy tokens attend to each other, so each timestep computes both. reused: the context attends to
# itself alone, at the clean noise level, so that its keys and values are the same at every timestep.
ContextMode = Literal["joint", "reused"]
# What becomes of the few channels that are many times larger than the others, before anything is stored.
MassiveChannels = Literal["keep", "remove", "standardize"]
# Times the median of the channels. Ours, and untuned: papers name massive channels of a model by hand.
DEFAULT_MASSIVE_FACTOR = 10.0
# What an image encoder is shown of a photograph: the crop of the object, or all of it.
EncoderInput = Literal["object", "image"]
# What the crop of an object is: its box, squashed to a square, or the square around its box.
ObjectCrop = Literal["box", "square"]
# How student images are stored: squashed to a square, or with the aspect that they were taken with.
ImageShape = Literal["square", "aspect"]
# The view of the k-th random crop of an image, counted from 0.
CROP_VIEW = "crop."
# What a teacher is conditioned on: the caption of each image, or an empty prompt.
TextCondition = Literal["caption", "none"]
