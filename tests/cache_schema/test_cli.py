"""Both commands fail in one line with a meaningful exit code, and start fast."""

import errno
import os
import signal
import subprocess
import sys

import pytest
import typer

from cache_schema import DitDistillError
from cache_schema.cli import expand_home, run

app = typer.Typer()


@app.callback()
def options() -> None:
    """A command with several things to do."""


@app.command()
def fail(kind: str) -> None:
    """Fail in one of several ways."""
    if kind == "user":
        raise DitDistillError("the cache is missing; build it")
    if kind == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/file")
    if kind == "there":
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), "/data/file")
    if kind == "system":
        raise OSError(errno.EIO, "Input/output error")
    if kind == "interrupt":
        raise KeyboardInterrupt
    if kind.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[kind])
    if kind == "bug":
        raise ValueError("two\nlines")
    typer.echo(f"done with {kind}")


def outcome(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        run(app, list(argv), name="dit-test", interrupted_hint="try again")
    captured = capsys.readouterr()
    return int(left.value.code or 0), captured.out, captured.err


@pytest.fixture(autouse=True)
def _restore_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def test_success_is_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(capsys, "fail", "nothing") == (0, "done with nothing\n", "")


def test_a_users_error_is_one_line_and_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(capsys, "fail", "user") == (1, "", "error: the cache is missing; build it\n")


def test_a_full_disk_is_one_line_and_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(capsys, "fail", "full") == (1, "", "error: No space left on device: /data/file\n")


def test_a_file_where_a_folder_is_to_be_is_one_line_and_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(capsys, "fail", "there") == (1, "", "error: File exists: /data/file\n")


@pytest.mark.parametrize("kind", ["interrupt", "SIGINT", "SIGTERM", "SIGHUP"])
def test_an_interrupt_is_one_line_and_1(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    assert outcome(capsys, "fail", kind) == (1, "", "interrupted: try again\n")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_that_the_parent_had_ignored_stays_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert outcome(capsys, "fail", "SIGINT") == (0, "done with SIGINT\n", "")
    finally:
        signal.signal(signal.SIGINT, usual)


def test_wrong_usage_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, shown = outcome(capsys, "fail")
    assert code == 2
    assert "Usage: dit-test fail" in shown


@pytest.mark.parametrize(
    "argv", [("--debug", "fail", "user"), ("fail", "user", "--debug"), ("fail", "--debug", "user")]
)
def test_debug_adds_the_traceback_wherever_it_stands(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...]) -> None:
    code, _, shown = outcome(capsys, *argv)
    assert code == 1
    assert "Traceback" in shown
    assert shown.endswith("error: the cache is missing; build it\n")


def test_after_a_bare_double_dash_debug_is_an_argument(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(capsys, "fail", "--", "--debug") == (0, "done with --debug\n", "")


def test_a_failure_of_the_machine_that_no_user_can_mend_is_not_hidden() -> None:
    with pytest.raises(OSError, match="Input/output"):
        run(app, ["fail", "system"], name="dit-test")


def test_a_bug_is_one_line_that_says_how_to_see_more(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="two") as caught:
        run(app, ["fail", "bug"], name="dit-test")
    sys.excepthook(caught.type, caught.value, caught.tb)
    assert capsys.readouterr().err == (
        "error: this is a bug: ValueError: two lines; run again with --debug for the traceback\n"
    )


def test_the_command_line_parts_import_nothing_heavy() -> None:
    script = (
        "import sys, cache_schema, cache_schema.cli, cache_schema.errors\n"
        "heavy = {'torch', 'numpy', 'pyarrow', 'zarr', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert 'open_cache' in cache_schema.__all__ and callable(cache_schema.open_cache)\n"
        "assert all(hasattr(cache_schema, name) for name in cache_schema.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("argument", "expanded"),
    [
        ("~", "/home/ada"),
        ("~/birds", "/home/ada/birds"),
        ("--data=~/birds", "--data=/home/ada/birds"),
        ("data.root=~/birds", "data.root=/home/ada/birds"),
        ("caches=~/a,/b,~/c", "caches=/home/ada/a,/b,/home/ada/c"),
        ("timm:vit=~/w.safetensors", "timm:vit=/home/ada/w.safetensors"),
        ("./~/birds", "./~/birds"),
        ("data/~old", "data/~old"),
        ("about ~5 birds, ~grey", "about ~5 birds, ~grey"),
        ("~no-such-user-here/x", "~no-such-user-here/x"),
    ],
)
def test_a_tilde_at_the_beginning_of_a_path_is_a_home(monkeypatch, argument, expanded):
    monkeypatch.setenv("HOME", "/home/ada")
    assert expand_home(argument) == expanded


def test_every_command_gets_paths_with_the_home_in_place_of_a_tilde(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/ada")
    with pytest.raises(SystemExit) as leaving:
        run(app, ["fail", "~/birds"])
    assert leaving.value.code == 0
    assert capsys.readouterr().out == "done with /home/ada/birds\n"


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
    ids=["nothing set", "spins set", "policy set"],
)
def test_waiting_threads_sleep_soon_unless_the_user_has_said_how_they_wait(given, expected):
    script = (
        "import os, typer\nfrom cache_schema.cli import run\napp = typer.Typer()\n"
        "@app.command()\ndef show(): print(os.environ.get('GOMP_SPINCOUNT'))\nrun(app, [])"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run([sys.executable, "-c", script], env={**kept, **given}, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr
