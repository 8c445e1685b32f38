"""Another run whose recall on the way is held beside this one's: its baseline's curve, say."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from trainer.config import TrainConfig
from trainer.errors import TrainError
from trainer.runs import BEST, CONFIG, LOG, is_finished, load_result, read_config, read_metrics

SHOWN = 4  # numbers of updates, in an error


class Rival:
    """The student's R@1 of a run after each number of updates that it was measured at."""

    def __init__(self, run: Path, recalls: dict[int, float], classes: tuple[int, int] | None = None):
        """`classes`: how many it was trained on and how many it held out, where it says so."""
        self.run, self.recalls, self.classes = run, recalls, classes
        self.told = False

    def require_same(self, classes: tuple[int, int], measured: Iterable[int]) -> None:
        """Raise TrainError for a run on so many other classes, or one that is never measured after as many updates."""
        if self.classes not in (None, classes):
            raise TrainError(
                "against: {} was trained on {} classes and held out {}, this run has {} and {}: give one of the same "
                "data".format(self.run, *self.classes, *classes)
            )
        own = sorted(measured)
        if not self.recalls.keys() & set(own):
            raise TrainError(
                f"against: {self.run} was measured after {_some(sorted(self.recalls))} updates, and this run would be "
                f"after {_some(own)}: give both the same batch size and --eval-every"
            )

    def remark(self, update: int, recall: float) -> str | None:
        """This student's R@1 beside the other's, with a warning the first time it is behind; None if that has none."""
        theirs = self.recalls.get(update)
        if theirs is None:
            return None
        said = (
            f"after {update} updates R@1 on validation classes is {100 * recall:.1f}, that of {self.run} was "
            f"{100 * theirs:.1f}"
        )
        if self.told or recall >= theirs:
            return said
        self.told = True
        return f"warning: {said}: what is trained beside the student may hold it back"


def open_rival(config: TrainConfig) -> Rival | None:
    """The run that a config names, None where it names none; raises TrainError for one that cannot be compared."""
    if config.against is None:
        return None
    if not config.eval_every:
        raise TrainError("against: runs are compared by recall on the way; add --validation-classes 0.2 --eval-every 1")
    run = Path(config.against)
    share = read_config(run / CONFIG).get("validation_classes", 0.0)
    if share != config.validation_classes:
        raise TrainError(f"against: {run} held out {share} of the training classes, not {config.validation_classes}")
    recalls = {
        int(record["update"]): float(record["eval"]["student"]["recall_at_1"])
        for record in read_metrics(run / LOG)
        if "eval" in record
    }
    if is_finished(run):  # its last measurement is in its result
        result = load_result(run)
        recalls[int(result["student_updates"])] = float(result["validation"]["student"]["recall_at_1"])
    if not recalls:
        raise TrainError(f"against: {run} was not measured on the way; train it with --eval-every 1")
    return Rival(run, recalls, _classes_of(run))


def _classes_of(run: Path) -> tuple[int, int] | None:
    """How many classes a run was trained on and held out; what it did best so far says so before it is finished."""
    for folder in (run, run / BEST):
        if is_finished(folder):
            result = load_result(folder)
            return int(result["train_classes"]), int(result["validation_classes"])
    return None


def _some(updates: list[int]) -> str:
    return ", ".join(map(str, updates[:SHOWN])) + (" …" if len(updates) > SHOWN else "")
