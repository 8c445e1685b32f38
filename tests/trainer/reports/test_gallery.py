import numpy as np
import torch
import torch.nn.functional as F

from trainer.reports.gallery import make_gallery


def test_the_gallery_shows_successes_and_failures_with_their_hits():
    # A pair that lie together, a pair with ten strangers between them.
    labels = torch.tensor([0, 0, 1, 1, *range(2, 12)])
    spread = torch.tensor([0.0, 5.0, 80.0, 270.0, *range(150, 200, 5)]).deg2rad()
    embeddings = torch.stack([spread.cos(), spread.sin()], dim=1)
    most, least = make_gallery({"one": embeddings}, np.arange(10, 24), labels, each=1)
    assert (most.title, least.title) == ("Best queries", "Worst queries")
    assert most.examples[0].row == 10
    assert [(hit.row, hit.correct) for hit in most.examples[0].found["one"][:2]] == [(11, True), (12, False)]
    assert least.examples[0].row == 12
    assert not any(hit.correct for hit in least.examples[0].found["one"])


def test_the_gallery_compares_the_last_run_with_the_first():
    labels = torch.arange(4).repeat_interleave(5)  # 20 images, so that the eight nearest leave some out
    good = F.one_hot(labels, 4).float()
    bad = good.clone()
    bad[0], bad[5] = good[5], good[0]
    groups = {group.title: group for group in make_gallery({"bad": bad, "good": good}, np.arange(20), labels, each=1)}
    gain = groups["Where good finds most that bad does not"].examples[0]
    assert gain.row in (0, 5)
    assert sum(hit.correct for hit in gain.found["good"]) > sum(hit.correct for hit in gain.found["bad"])
    assert "Where all runs miss most" in groups
