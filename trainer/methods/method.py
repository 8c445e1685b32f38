"""What a method is: all that training, evaluation and reports ask of one, and all that they know about it.

A new method is a folder: `config.py` with its subclass of `TrainConfig`, `method.py` with its subclass of `Method`,
and one line in `registry.METHODS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from trainer.data.batch import Batch
from trainer.data.features import FeatureShape, Needs
from trainer.models.student import Student


@dataclass(frozen=True)
class Moment:
    """Where a run stands when a batch comes: `update` (0-based) of `total`."""

    update: int
    total: int


END = Moment(1, 1)  # schedules of a method have run their course


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a multiple of the learning rate; `decay=False` spares them the weight decay."""

    parameters: list[nn.Parameter]
    lr_scale: float = 1.0
    decay: bool = True


class Method(nn.Module, ABC):
    """The student with all that helps to train it; `forward` gives the losses of one batch.

    Built after the student, with the classes M of the train split and the shapes of the features it needs. What it
    draws at random it draws from seeds of its own, derived from `config.seed`, so that two methods of one seed start
    from the same student. Its `state_dict` is all that a checkpoint keeps of it.
    """

    # Losses that belong in one figure of a report: its title → {loss: what it is measured on}.
    loss_figures: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    # What `auxiliary` returns: name → what a reader is told it is, its symbol first: "E_D, E_R masked".
    auxiliary_names: ClassVar[Mapping[str, str]] = {}
    # Which of them is made of the teacher's features alone, or nearly so: what is to be ahead of those features.
    made_of_teacher: ClassVar[str | None] = None
    # The embedding that a run is scored and compared by: E_R, or one of `auxiliary_names`, which needs the teacher's
    # features of every image at test time.
    scored: ClassVar[str] = "student"
    # What of the method `attention` is of, where it looks at single tokens of the teacher: "queries of the GIM".
    readers: ClassVar[str] = ""
    # What `save` leaves in a run's folder.
    files: ClassVar[tuple[str, ...]] = ()
    # The setting by which training itself goes by `validated`, and so needs scores before its last update.
    waits_for_scores: str | None = None
    # What to try when a loss is not finite.
    advice: ClassVar[str] = "lower --lr, or set optim.grad_clip=1"

    def __init__(self, config: Any, student: Student, classes: int, shapes: Mapping[str, FeatureShape]):
        """`config` is of the method's own class; `shapes` has an entry per name in `needs(config).features`."""
        super().__init__()
        self.student = student
        self.shapes = dict(shapes)
        self.needed = self.needs(config)

    @classmethod
    def needs(cls, config: Any) -> Needs:
        """What a batch must hold beside labelled images; nothing by default."""
        return Needs()

    @abstractmethod
    def forward(self, batch: Batch, moment: Moment = END) -> dict[str, Tensor]:
        """The losses of a batch, scalars by name; `loss` is the one to minimise."""

    def parameter_groups(self) -> list[ParameterGroup]:
        """What is trained, and how fast: everything at the learning rate itself by default."""
        return [ParameterGroup(list(self.parameters()))]

    def fit(self, batches: Iterable[Batch]) -> None:
        """Measure what must be known before the first update, on batches that are made each time they are asked for.

        A few of training's own, or (`Needs.fit_on="all"`) the features of every row that is trained on, without images.
        """

    def validated(self, scores: Mapping[str, Any]) -> None:
        """Take note of scores on validation classes, as `evaluate_modules` gives them, in the middle of a run."""

    @property
    def auxiliary_timesteps(self) -> tuple[int, ...]:
        """The timesteps along axis P of the auxiliary embeddings: by default those of the first features needed."""
        return next((shape.timesteps for shape in self.shapes.values()), ())

    def auxiliary(self, student: Tensor, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the teacher would add at test time: E_R (N, C), features (N, P, L, C_t) by name → embeddings by name.

        Each of `auxiliary_names` is (N, P, C) or (N, C); called in evaluation mode, without gradients.
        """
        return {}

    def attention(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Where the K `readers` look: features (N, P, L, C_t) by name → by the same names weights (N, P, K, L).

        Each reader's weights sum to 1 over L; called in evaluation mode, without gradients.
        """
        return {}

    def save(self, run: Path) -> None:
        """Write `files`, all that `auxiliary` needs later, into a run's folder; the student is saved elsewhere."""

    def load(self, run: Path) -> None:
        """Read what `save` wrote; raises TrainError when it does not fit the features at hand."""
