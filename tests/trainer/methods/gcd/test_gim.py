import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.errors import TrainError
from trainer.methods.gcd.config import GimConfig
from trainer.methods.gcd.gim import GenerativeInjectionModule

B, P, L, CT, C = 3, 2, 5, 7, 16


def make_gim(**options) -> GenerativeInjectionModule:
    torch.manual_seed(0)
    return GenerativeInjectionModule(L, CT, C, P, GimConfig(queries=4, bridge_layers=2, heads=2, **options)).eval()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, C, generator=generator), torch.randn(B, P, L, CT, generator=generator)


@pytest.mark.parametrize(
    "options",
    [{}, {"infuse_layers": 2}, {"timestep_embedding": False, "position_embedding": False}, {"final_norm": False},
     {"token_norm": "standardize"}],
)  # fmt: skip
def test_every_image_and_timestep_gets_one_embedding_of_the_students_width(inputs, options):
    assert make_gim(**options)(*inputs).shape == (B, P, C)


def test_without_bridging_layers_the_tokens_themselves_are_infused(inputs):
    gim = GenerativeInjectionModule(L, CT, C, P, GimConfig(bridge_layers=0, heads=2))
    assert gim.bridge(inputs[1]).shape == (B, P, L, C)
    assert gim(*inputs).shape == (B, P, C)


def test_one_batched_call_gives_what_image_by_image_calls_give(inputs):
    student, tokens = inputs
    gim = make_gim(infuse_layers=2)
    alone = torch.cat([gim(student[i : i + 1], tokens[i : i + 1]) for i in range(B)])
    torch.testing.assert_close(gim(student, tokens), alone)


def test_one_timesteps_embedding_depends_on_that_timesteps_tokens_alone(inputs):
    student, tokens = inputs
    gim = make_gim()
    changed = tokens.clone()
    changed[:, 1] = changed[:, 1].flip(-1)
    before, after = gim(student, tokens), gim(student, changed)
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.allclose(before[:, 1], after[:, 1])


def test_every_bridging_layer_reads_the_tokens_through_keys_and_values_of_its_own(inputs):
    gim = make_gim()
    context = gim.tokens(inputs[1]).flatten(0, 1)
    queries = gim.queries.expand(B * P, -1, -1)
    for layer in gim.bridge_layers:
        own = layer.attention
        kv = own.key_value(context).unflatten(-1, (2, own.heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        q = own.query(layer.norm(queries)).unflatten(-1, (own.heads, -1)).transpose(1, 2)
        read = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        queries = queries + own.out(read.transpose(1, 2).flatten(2))
        queries = queries + layer.ffn(queries)
    torch.testing.assert_close(gim.bridge(inputs[1]).flatten(0, 1), queries, atol=1e-6, rtol=1e-6)


class ProductsOverTokens(TorchDispatchMode):
    """Counts matrix products that go through every token of every image and timestep."""

    def __init__(self, rows: int):
        super().__init__()
        self.rows, self.count = rows, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shapes = [a.shape for a in args if isinstance(a, torch.Tensor)]
        if "mm" in func.__name__ and any(len(shape) == 2 and shape[0] == self.rows for shape in shapes):
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_what_the_queries_look_at_is_what_they_read(inputs):
    torch.manual_seed(0)
    gim = GenerativeInjectionModule(L, CT, C, P, GimConfig(queries=4, bridge_layers=1, heads=1)).eval()
    weights = gim.attention(inputs[1])
    assert weights.shape == (B, P, 4, L)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, P, 4))
    (layer,) = gim.bridge_layers
    values = layer.attention.key_value(gim.tokens(inputs[1]))[..., C:]  # (B, P, L, C)
    queries = gim.queries + layer.attention.out(weights @ values)
    torch.testing.assert_close(queries + layer.ffn(queries), gim.bridge(inputs[1]))


def test_layers_and_heads_are_averaged_and_without_queries_nothing_looks(inputs):
    torch.testing.assert_close(make_gim().attention(inputs[1]).sum(-1), torch.ones(B, P, 4))
    assert GenerativeInjectionModule(L, CT, C, P, GimConfig(bridge_layers=0, heads=2)).attention(inputs[1]) is None


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("timesteps", [1, 4])
def test_tokens_are_read_as_often_whatever_the_number_of_layers_and_timesteps(layers, timesteps):
    torch.manual_seed(0)
    gim = GenerativeInjectionModule(L, CT, C, timesteps, GimConfig(queries=4, bridge_layers=layers, heads=2))
    with ProductsOverTokens(B * timesteps * L) as products:
        gim.bridge(torch.randn(B, timesteps, L, CT))
    assert products.count == 2  # into the GIM's width, and from there to keys and values


@pytest.mark.parametrize(
    "options",
    [{}, {"timestep_embedding": False}, {"token_norm": "standardize"}, {"token_norm": "whiten"}, {"residual": "pca"}],
)  # fmt: skip
def test_drawn_timesteps_are_treated_as_they_are_among_all(inputs, options):
    student, tokens = inputs
    gim = make_gim(**options)
    gim.fit([tokens])
    with torch.no_grad():
        if gim.shortcut is not None:
            gim.shortcut.gate.fill_(0.5)
        drawn = torch.tensor([[1], [0], [1]])
        part = tokens.take_along_dim(drawn[:, :, None, None], 1)
        found = gim.infuse(student, gim.bridge(part, drawn), False, gim.shortcut_of(part, drawn))
        expected = gim(student, tokens).take_along_dim(drawn[:, :, None], 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(TrainError, match=r"\(1, 5, 7\), got \(2, 5, 7\)"):
        gim.bridge(tokens, drawn)


def test_the_names_of_its_weights_are_those_of_runs_that_were_saved():
    names = {name for name in make_gim().state_dict() if name.startswith("bridge_layers.1.attention")}
    parts = ("query", "key_value", "out")
    assert names == {f"bridge_layers.1.attention.{part}.{kind}" for part in parts for kind in ("weight", "bias")}


def test_the_last_infusion_layers_shortcut_equals_computing_all_tokens(inputs):
    layer = make_gim().infuse_layers[0]
    sequence = torch.randn(2, 5, C)
    torch.testing.assert_close(layer(sequence, outputs=1), layer(sequence)[:, :1])


def test_the_same_tokens_at_another_timestep_or_place_are_told_apart(inputs):
    student, tokens = inputs
    same = tokens[:, :1].expand(B, P, L, CT)
    told_apart, blind = make_gim()(student, same), make_gim(timestep_embedding=False)(student, same)
    assert not torch.allclose(told_apart[:, 0], told_apart[:, 1])
    torch.testing.assert_close(blind[:, 0], blind[:, 1])
    moved = tokens.roll(1, dims=2)
    torch.testing.assert_close(
        make_gim(position_embedding=False)(student, tokens), make_gim(position_embedding=False)(student, moved)
    )
    assert not torch.allclose(make_gim()(student, tokens), make_gim()(student, moved))


def test_a_masked_student_leaves_no_trace_in_the_result(inputs):
    student, tokens = inputs
    gim = make_gim()
    assert torch.equal(gim(student, tokens, masked=True), gim(student.flip(-1), tokens, masked=True))
    assert not torch.allclose(gim(student, tokens, masked=False), gim(student.flip(-1), tokens, masked=False))


def test_a_mask_per_image_and_timestep_mixes_both(inputs):
    student, tokens = inputs
    gim = make_gim()
    mask = torch.tensor([[True, False], [False, True], [False, False]])
    mixed = gim(student, tokens, masked=mask)
    torch.testing.assert_close(mixed[mask], gim(student, tokens, masked=True)[mask])
    torch.testing.assert_close(mixed[~mask], gim(student, tokens, masked=False)[~mask])


def test_masks_are_drawn_in_training_only(inputs):
    gim = make_gim(mask_student=1.0)
    assert torch.equal(gim(*inputs), gim(*inputs, masked=False))
    assert torch.equal(gim.train()(*inputs), gim(*inputs, masked=True))


def test_masks_are_drawn_as_often_as_asked():
    mask = make_gim(mask_student=0.3).draw_mask(torch.empty(2000, 4))
    assert mask.shape == (2000, 4)
    assert mask.float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_gradients_reach_the_student_unless_it_is_detached(inputs):
    student, tokens = inputs
    student.requires_grad_()
    make_gim()(student, tokens).sum().backward()
    assert student.grad is not None
    detached = student.detach().clone().requires_grad_()
    make_gim(detach_student=True)(detached, tokens).sum().backward()
    assert detached.grad is None


def test_standardizing_takes_each_channel_of_each_timestep_to_zero_mean_and_unit_scale(inputs):
    tokens = inputs[1] * torch.arange(1, CT + 1) ** 3 + 50
    gim = make_gim(token_norm="standardize")
    gim.tokens.fit([tokens[:1], tokens[1:]])
    scaled = (tokens - gim.tokens.shift) * gim.tokens.scale
    torch.testing.assert_close(scaled.mean((0, 2)), torch.zeros(P, CT), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled.transpose(0, 1).flatten(1, 2).std(1), torch.ones(P, CT))


def test_standardizing_lets_go_of_each_batch_and_does_not_lose_a_small_spread_beside_a_large_mean():
    alive: list[weakref.ref] = []

    def batch(seed: int) -> torch.Tensor:
        noise = torch.randn(B, P, L, CT, generator=torch.Generator().manual_seed(seed))
        return noise * 0.01 + 70000 * torch.arange(CT)

    def batches():
        for seed in range(4):
            assert sum(one() is not None for one in alive) <= 1
            tokens = batch(seed)
            alive.append(weakref.ref(tokens))
            yield tokens
            del tokens

    gim = make_gim(token_norm="standardize")
    gim.tokens.fit(batches())
    every = torch.cat([batch(seed) for seed in range(4)]).double().transpose(0, 1).flatten(1, 2)
    torch.testing.assert_close(gim.tokens.shift, every.mean(1, keepdim=True).float())
    torch.testing.assert_close(gim.tokens.scale, every.std(1, keepdim=True).reciprocal().float())


def test_tokens_of_another_shape_are_refused_in_words(inputs):
    with pytest.raises(TrainError, match=r"\(2, 5, 7\), got \(2, 4, 7\)"):
        make_gim().bridge(inputs[1][:, :, :4])


def test_a_width_that_64_does_not_divide_gets_fewer_heads():
    gim = GenerativeInjectionModule(L, CT, 336, P, GimConfig(bridge_layers=1, queries=2))
    assert gim.bridge_layers[0].attention.heads == 4
    assert GenerativeInjectionModule(L, CT, 192, P, GimConfig()).bridge_layers[0].attention.heads == 3


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(TrainError, match="3 heads do not divide"):
        GenerativeInjectionModule(L, CT, C, P, GimConfig(heads=3))


@pytest.mark.parametrize("options", [{}, {"residual": "pca"}, {"token_norm": "standardize"}, {"token_norm": "whiten"}])
def test_tokens_of_bfloat16_give_what_those_of_float32_give_but_for_rounding(inputs, options):
    student, tokens = inputs
    gim = make_gim(**options)
    gim.fit([tokens + offset for offset in (0.0, 0.5)])
    exact = gim(student, tokens.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        found = gim(student, tokens.bfloat16())
    assert (found.float() - exact).abs().max() < 0.03 * exact.abs().max()


def test_the_layer_norm_of_the_tokens_leaves_them_bfloat16_under_autocast(inputs):
    encoder = make_gim().tokens
    with torch.autocast("cpu", torch.bfloat16):
        normalised = encoder._normalised(inputs[1].bfloat16(), None)
    assert normalised.dtype == torch.bfloat16
    exact = encoder._normalised(inputs[1].bfloat16().float(), None)
    assert torch.allclose(normalised.float(), exact, rtol=2**-7, atol=2**-9)


def test_pooled_tokens_are_summed_in_float32_whatever_their_type(inputs):
    gim = make_gim(residual="pca")
    tokens = 100 + inputs[1] / 10  # far from 0: rounded once more, their means would all be the same
    gim.fit([tokens])
    kept = gim.shortcut_of(tokens.bfloat16())
    assert torch.allclose(kept, gim.shortcut_of(tokens.bfloat16().float()), rtol=1e-5, atol=1e-5)
