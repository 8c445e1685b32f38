"""A tiny FLUX with random weights, made of the real classes and saved as a real diffusers folder."""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from PIL import Image

from pipeline.annotate.config import AnnotateConfig
from pipeline.annotate.run import annotate
from pipeline.datasets.demo import DemoConfig, DemoDataset
from pipeline.datasets.folder import FolderDataset
from pipeline.refine.demo_text import build_text_encoders
from pipeline.teachers.flux import FluxTeacher

# Test folders are no packages, so what several modules share is loaded by its path.
_SHARED = {
    "cache_building": Path(__file__).parent.parent / "cache_schema/building.py",
    "cache_hub": Path(__file__).parent.parent / "cache_schema/hub_server.py",
    "cache_servers": Path(__file__).parent.parent / "cache_schema/servers.py",
    "cache_proxy": Path(__file__).parent.parent / "cache_schema/faulty_proxy.py",
    "dataset_layouts": Path(__file__).with_name("layouts.py"),
    "tiny_teachers": Path(__file__).with_name("tiny_teachers.py"),
    "build_process": Path(__file__).with_name("build_process.py"),
    "tiny_annotators": Path(__file__).with_name("tiny_annotators.py"),
    "hanging_teacher": Path(__file__).with_name("hanging_teacher.py"),
    "run_process": Path(__file__).with_name("run_process.py"),
}
for _name in [name for name in _SHARED if name not in sys.modules]:
    _spec = importlib.util.spec_from_file_location(_name, _SHARED[_name])
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])

RESOLUTION = 32


def save_tiny_flux(folder: Path, guidance: bool = False, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    clip, clip_tokenizer, t5, t5_tokenizer = build_text_encoders()
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
        scaling_factor=0.7,
        shift_factor=0.1,
    )
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=96,
        pooled_projection_dim=64,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_flux() -> Callable[..., Path]:
    return save_tiny_flux


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="session")
def guided_flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_flux(tmp_path_factory.mktemp("guided"), guidance=True)


@pytest.fixture(scope="session")
def builds(flux_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """Starts `dit-cache build` processes with the tiny FLUX."""
    from build_process import BuildProcesses

    here, root = Path(__file__).parent, Path(__file__).parents[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (here, root))))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield BuildProcesses(flux_folder, tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="session")
def runs(builds, flux_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """Starts `dit-cache run` processes with the tiny FLUX."""
    from run_process import RunProcesses

    return RunProcesses(flux_folder, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def load_teacher(flux_folder: Path) -> Callable[..., FluxTeacher]:
    """A fresh teacher each time: Stage I changes it."""
    return lambda **options: FluxTeacher(flux_folder, **({"resolution": RESOLUTION} | options))


@pytest.fixture(scope="session")
def teacher(flux_folder: Path) -> FluxTeacher:
    return FluxTeacher(flux_folder, resolution=RESOLUTION)


def make_tiny_dataset() -> DemoDataset:
    return DemoDataset(
        DemoConfig(groups=2, train_classes=4, test_classes=4, train_images=5, test_images=5, unlabeled=6)
    )


@pytest.fixture(scope="session")
def tiny_dataset() -> DemoDataset:
    return make_tiny_dataset()


@pytest.fixture
def photograph() -> Image.Image:
    rng = np.random.default_rng(3)
    return Image.fromarray(rng.integers(0, 255, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def bird_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of four photographs; one is turned by EXIF, one is cut short."""
    return sys.modules["tiny_annotators"].write_birds(tmp_path_factory.mktemp("birds"))


@pytest.fixture(scope="session")
def annotators(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("models")
    tiny = sys.modules["tiny_annotators"]
    return {"detector": str(tiny.save_grounding_dino(base / "dino")), "captioner": str(tiny.save_qwen(base / "qwen"))}


@pytest.fixture(scope="session")
def annotate_config(annotators: dict[str, str]) -> AnnotateConfig:
    return AnnotateConfig(**annotators, max_new_tokens=8, batch=3, save_every=3)


@pytest.fixture
def bird_set(bird_folder: Path) -> FolderDataset:
    return FolderDataset(bird_folder, superclass="bird")


@pytest.fixture(scope="session")
def finished_annotation(
    bird_folder: Path, annotate_config: AnnotateConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict], list[str]]:
    """The file of a run that nothing interrupted, its rows, and what was said; not to be changed."""
    output = tmp_path_factory.mktemp("finished") / "a.parquet"
    said: list[str] = []
    rows = annotate(FolderDataset(bird_folder, superclass="bird"), annotate_config, output, log=said.append)
    return output, rows, said
