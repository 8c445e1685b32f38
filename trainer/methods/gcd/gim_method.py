"""What methods with a GIM have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from trainer.methods.gcd.gim import GIM_FILE, GenerativeInjectionModule, load_gim
from trainer.methods.method import Method
from trainer.methods.reading import TEACHER
from trainer.models.weights import save_weights


class GimMethod(Method):
    """A method whose GIM reads the teacher's features, at test time too."""

    readers = "queries of the GIM"
    files = (GIM_FILE,)
    gim: GenerativeInjectionModule

    def attention(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = self.gim.attention(features[TEACHER])
        return {} if found is None else {TEACHER: found}

    def save(self, run: Path) -> None:
        save_weights(self.gim.state_dict(), run / GIM_FILE)

    def load(self, run: Path) -> None:
        load_gim(self.gim, run, self.shapes[TEACHER].tap)
