"""The rules of the house: light command lines, true docs, no door between trainer and pipeline."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
READMES = [
    ROOT / "README.md",
    *(path for room in ("cache_schema", "pipeline", "trainer") for path in sorted((ROOT / room).rglob("README.md"))),
]
HEAVY = ("torch", "numpy", "diffusers", "transformers", "peft", "timm", "zarr", "pyarrow", "matplotlib", "pydantic")


@pytest.mark.parametrize("module", ["pipeline.cli", "trainer.cli"])
def test_a_command_line_answers_help_without_importing_anything_heavy(module):
    script = (
        f"import sys; sys.argv = ['x', '--help']\nimport {module} as m\n"
        f"try: m.main()\nexcept SystemExit: pass\nprint([n for n in {HEAVY!r} if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert "Usage" in done.stdout
    assert done.stderr.strip() == "[]"


def readme_commands() -> list[str]:
    text = "\n".join(path.read_text(encoding="utf-8") for path in READMES)
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


def test_every_make_target_in_the_readme_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    named = {line.split()[1] for line in readme_commands() if line.startswith("make ")}
    assert {"demo", "test", "cache", "train", "eval"} <= named
    assert named <= targets


def options_in_readmes() -> dict[tuple[str, str], set[str]]:
    """The options that each command is shown with."""
    shown: dict[tuple[str, str], set[str]] = {}
    for line in readme_commands():
        if line.startswith(("dit-cache", "dit-train")):
            program, sub, *rest = line.split()
            shown.setdefault((program, sub), set()).update(word for word in rest if word.startswith("--"))
    return shown


@pytest.mark.parametrize("command", options_in_readmes(), ids=" ".join)
def test_every_command_in_a_readme_has_the_options_it_is_given(command):
    program, sub = command
    helped = subprocess.run(
        [str(Path(sys.executable).parent / program), sub, "--help"],
        capture_output=True, text=True, env={"COLUMNS": "200", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert helped.returncode == 0, helped.stderr
    assert not [option for option in options_in_readmes()[command] if option not in helped.stdout]


def test_every_link_in_a_readme_leads_somewhere():
    for readme in [*READMES, ROOT / "benchmarks/README.md", ROOT / "examples/slurm/README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", readme.read_text(encoding="utf-8")):
            assert (readme.parent / target).exists(), (readme, target)


def test_the_public_names_of_the_contract_are_there():
    import cache_schema

    assert callable(cache_schema.open_cache)
    assert callable(cache_schema.create_cache)
    assert all(hasattr(cache_schema.Cache, name) for name in ("read", "images", "__len__"))
    assert all(hasattr(cache_schema.EncodedBatch, name) for name in ("decode",))
    assert all(hasattr(cache_schema.CacheWriter, name) for name in ("missing_shards", "write_shard", "seal"))


def test_imports_keep_to_the_house_plan():
    lint = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([str(lint)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_the_committed_teacher_weights_stay_under_twenty_megabytes():
    weights = ROOT / "pipeline/teachers/demo_weights"
    assert 0 < sum(p.stat().st_size for p in weights.rglob("*") if p.is_file()) < 20e6
