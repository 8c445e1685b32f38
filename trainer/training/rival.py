"""Another run whose recall on the way is held beside this one's: its baseline's curve, say."""

from __future__ import annotations

from pathlib import Path

from trainer.config import TrainConfig
from trainer.errors import TrainError
from trainer.runs import CONFIG, LOG, is_finished, load_result, read_config, read_metrics


class Rival:
    """The student's R@1 of a run after each number of updates that it was measured at."""

    def __init__(self, run: Path, recalls: dict[int, float]):
        self.run, self.recalls = run, recalls
        self.told = False

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
    return Rival(run, recalls)
