"""Run by torchrun in each of two processes: trains what it is told to, and interrupts what is called cut on the way.

Arguments: the cache, then OUTPUT=CONFIG.json for each run; then --, and arguments of dit-train, which is to fail: what
each process says of that is in told-NUMBER.txt in the folder of the last run.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from cache_schema import cli as commands
from cache_schema import open_cache
from trainer import processes
from trainer.cli import app
from trainer.methods.method import Moment
from trainer.methods.settings import load_config
from trainer.training import loop
from trainer.training.assembly import assemble, start
from trainer.training.distributed import wrap
from trainer.training.step import train_step


def save_gradients(config, cache, file):
    """The gradients of the second update, when memories are not empty any more; weights stay as they are."""
    parts = assemble(config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 1e-30})}), cache)
    start(parts, file, resume=False)
    together = {"wrapped": wrap(parts.method, parts.device)} if processes.count() > 1 else {}
    for update in range(2):
        batch = parts.batches[update].to(parts.device)
        train_step(parts.method, parts.optimizer, batch, 0.0, parts.config, Moment(update, 2), **together)
    if processes.leads():
        found = {name: value.grad for name, value in parts.method.named_parameters() if value.grad is not None}
        save_file(found, file)


def interrupted(method, optimizer, batch, rate, config, moment, **together):
    """Ctrl-C reaches one of the processes alone."""
    if moment.update == 3 and processes.number() == 1:
        os.kill(os.getpid(), signal.SIGINT)
    return train_step(method, optimizer, batch, rate, config, moment, **together)


def fail(file, arguments):
    """Whatever processes wait for each other for at the end, they do until the first of them is gone."""
    with file.open("w") as told, contextlib.redirect_stderr(told), contextlib.suppress(SystemExit):
        commands.run(app, arguments)


def main(place, *arguments):
    torch.set_num_threads(1)
    arguments, failing = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    cache = open_cache(place)
    for argument in arguments:
        output, _, config = argument.partition("=")
        run, config = Path(output), load_config(Path(config))
        if run.name == "cut":
            loop.train_step = interrupted
            try:
                loop.train(config, cache, run)
            except KeyboardInterrupt:
                assert (run / "checkpoints" / "update-00000004").is_dir()
            loop.train_step = train_step
        loop.train(config, cache, run, resume=run.name == "cut")
        save_gradients(config, cache, run / "gradients.safetensors")
    fail(run.parent / f"told-{os.environ['RANK']}.txt", list(failing))


if __name__ == "__main__":
    main(*sys.argv[1:])
