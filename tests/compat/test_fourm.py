"""`m4.compat.FourM` beside nano4M's padded form, written for the tests in `tests/compat/padded_form.py`."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from m4.compat import FourM
from m4.model import M4, ModelConfig
from m4kernels import MaskedBatch
from tests.compat.both_forms import LENGTHS, NAMES, READ_KEYS, SHAPE, SIZES, assert_same, batch, both, masking
from tests.compat.padded_form import PaddedFourM

pytestmark = pytest.mark.usefixtures("one_thread")


def test_names_and_shapes_are_those_of_nano4m() -> None:
    ours, padded = both()
    held = {name: value.shape for name, value in ours.state_dict().items()}
    assert held == {name: value.shape for name, value in padded.state_dict().items()}
    assert [n for n, _ in ours.named_parameters() if "norm" in n and n.endswith("bias")] == []
    # In the same order too: optimizers save their state by it.
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [(n, p.shape) for n, p in padded.named_parameters()]
    ours.load_state_dict(padded.state_dict())


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("kernels", ["auto", "reference", "reference-matmul"])
def test_losses_and_gradients(average: bool, kernels: str) -> None:
    assert_same(*both(per_modality_loss_avg=average, kernels=kernels), batch())


@pytest.mark.parametrize("average", [True, False])
def test_a_modality_without_targets(average: bool) -> None:
    b = batch()
    left_out = (b["dec_modalities"] == 3) & b["dec_pad_mask"]
    b["dec_pad_mask"] &= ~left_out
    b["dec_tokens"][left_out] = -100  # padding amid the sample
    ours, padded = both(per_modality_loss_avg=average)
    assert_same(ours, padded, b)
    if average:
        assert ours(b)[1]["coords_next"] == 0


@pytest.mark.parametrize("average", [True, False])
def test_targets_to_ignore_are_attended_to(average: bool) -> None:
    """Valid slots whose target is the padding id take part in attention, not in the loss."""
    b = batch()
    b["dec_tokens"][:, 2:4] = -100
    assert bool((b["dec_pad_mask"] & (b["dec_tokens"] == -100)).any())
    assert_same(*both(per_modality_loss_avg=average), b)


def test_without_pad_masks_all_is_valid() -> None:
    b = {name: values[:, :6].clone() for name, values in batch().items() if not name.endswith("pad_mask")}
    assert_same(*both(), b)


def test_slots_in_any_order() -> None:
    b = batch()
    shuffled = dict(b)
    for side in ("enc", "dec"):
        order = torch.rand(b[f"{side}_tokens"].shape).argsort(1)
        for field in ("tokens", "positions", "modalities", "pad_mask"):
            shuffled[f"{side}_{field}"] = b[f"{side}_{field}"].gather(1, order)
    ours, padded = both()
    expected = ours(b)[0]
    assert torch.equal(ours(shuffled)[0], expected)
    assert_same(ours, padded, shuffled)


def test_other_integers_and_other_keys() -> None:
    b = batch()
    ours, _ = both()
    expected = ours(b)[0]
    narrow = {name: values.to(torch.int32) if values.dtype != torch.bool else values for name, values in b.items()}
    assert torch.equal(ours(narrow)[0], expected)
    named = FourM(
        **{key: f"my_{name}" for key, name in READ_KEYS.items()},
        modalities=NAMES,
        vocab_sizes=SIZES,
        max_seq_lens=LENGTHS,
        **SHAPE,
    )
    named.load_state_dict(ours.state_dict())
    assert torch.equal(named({f"my_{name}": values for name, values in b.items()})[0], expected)


def test_another_padding_id() -> None:
    b = batch()
    expected = both()[0](b)[0]
    b["dec_tokens"] = b["dec_tokens"].masked_fill(~b["dec_pad_mask"], -1)
    assert torch.equal(both(padding_idx=-1)[0](b)[0], expected)


def test_both_forms_train_alike() -> None:
    """The same masks, the same AdamW, step after step; and the loss falls."""
    ours, padded = both(seed=1)
    exact = PaddedFourM(NAMES, SIZES, LENGTHS, **SHAPE).double()
    exact.load_state_dict(padded.state_dict())
    models = {"ours": ours, "padded": padded, "exact": exact}
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
        for name, model in models.items()
    }
    history: dict[str, list[float]] = {name: [] for name in models}
    for step in range(16):
        b = batch(seed=step % 2, samples=4)
        for name, model in models.items():
            loss, _ = model(b)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[name].step()
            optimizers[name].zero_grad()
            history[name].append(loss.item())
    exact_losses = torch.tensor(history["exact"], dtype=torch.float64)
    off = {name: (torch.tensor(history[name]) - exact_losses).abs() / exact_losses for name in ("ours", "padded")}
    # Roundings grow from step to step, in ours as in the padded form in float32.
    assert off["ours"][0] < 1e-5
    assert off["ours"].max() < 10 * off["padded"].max() + 1e-5, off
    assert off["ours"].max() < 1e-3, off
    assert history["ours"][-1] < 0.8 * history["ours"][0], history["ours"]


def test_training_goes_on_from_nano4m() -> None:
    """Weights, and moments, which optimizers save by the order of parameters."""
    _, padded = both()
    ours, _ = both(seed=5)

    def optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
        decayed = [p for p in model.parameters() if p.ndim >= 2]
        others = [p for p in model.parameters() if p.ndim < 2]
        return torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=1e-2)

    def train(model: torch.nn.Module, seed: int) -> float:
        loss, _ = model(batch(seed))
        optimizers[model].zero_grad()
        loss.backward()
        optimizers[model].step()
        return loss.item()

    optimizers = {model: optimizer(model) for model in (ours, padded)}
    for seed in range(3):
        train(padded, seed)
    ours.load_state_dict(padded.state_dict())
    optimizers[ours].load_state_dict(copy.deepcopy(optimizers[padded].state_dict()))
    for seed in range(3, 6):
        assert train(ours, seed) == pytest.approx(train(padded, seed), rel=1e-4)


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = FourM(modalities=["a"], vocab_sizes=[400], max_seq_lens=[9], dim=64, enc_depth=1, dec_depth=1, init_std=0.5)
    assert float(model.enc_tok_emb.weight.detach().std()) == pytest.approx(0.5, rel=0.05)
    assert not model.to_logits.weight.any()
    assert not model.dec_context_proj.bias.any()
    torch.manual_seed(0)
    usual = FourM(modalities=["a"], vocab_sizes=[400], max_seq_lens=[9], dim=64, enc_depth=1, dec_depth=1)
    assert float(usual.enc_tok_emb.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    b = masking(modalities=["a"], vocab_sizes=[400], max_seq_lens=[9], input_alphas=[1], target_alphas=[1],
                input_tokens_range=4, target_tokens_range=4)({"a": torch.arange(9)})  # fmt: skip
    loss, metrics = usual({name: values[None] for name, values in b.items()})
    assert loss.item() == pytest.approx(math.log(400), rel=1e-5)
    assert list(metrics) == ["a"]


def test_what_is_read_of_the_model() -> None:
    model, padded = both()
    left_out = sum(p.numel() for n, p in padded.named_parameters() if "emb" in n or "to_logits" in n)
    total = sum(p.numel() for p in padded.parameters())
    assert (model.get_num_params(False), model.get_num_params()) == (total, total - left_out)
    assert (model.device.type, model.vocab_size, model.num_modalities, model.max_posemb_len) == ("cpu", 61, 4, 16)
    assert (model.modalities, model.vocab_sizes, model.max_seq_lens) == (NAMES, SIZES, LENGTHS)


def test_encoder_and_logits() -> None:
    ours, padded = both()
    b = batch()
    enc = [b["enc_tokens"], b["enc_modalities"], b["enc_positions"]]
    x, positions = ours.forward_encoder(*enc, b["enc_pad_mask"])
    true_x, true_positions = padded.encode(*enc, b["enc_pad_mask"])
    valid = b["enc_pad_mask"]
    torch.testing.assert_close(x[valid], true_x[valid], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(positions[valid], true_positions[valid])
    assert not x[~valid].any()
    logits = ours.forward_model(*enc, b["dec_modalities"], b["dec_positions"], b["enc_pad_mask"], b["dec_pad_mask"])
    valid = b["dec_pad_mask"]
    torch.testing.assert_close(logits[valid], padded.logits(b)[valid], rtol=1e-4, atol=1e-4)
    assert not logits[~valid].any()
    logits.sum().backward()  # as for a loss of one's own
    assert ours.enc_tok_emb.weight.grad is not None


def test_autocast_is_close() -> None:
    ours, _ = both()
    expected = ours(batch())[0].item()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = ours(batch())
    loss.backward()
    assert abs(loss.item() - expected) < 0.02 * expected


def test_in_distributed_data_parallel(tmp_path: Any) -> None:
    """As nano4M wraps it, buffers and all."""
    ours, _ = both()
    ours(batch())[0].backward()
    expected = [p.grad.clone() for p in ours.parameters()]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(both()[0])
        for _ in range(2):
            wrapped.zero_grad()
            wrapped(batch())[0].backward()
        for p, want in zip(wrapped.module.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, want)
    finally:
        torch.distributed.destroy_process_group()


def test_attention_patterns_are_those_of_m4() -> None:
    torch.manual_seed(0)
    ours, _ = both(attention={"decoder": "within_modality"}, activation_checkpointing=True)
    config = ModelConfig(NAMES, [61] * 4, LENGTHS, **SHAPE)
    config.attention.decoder = "within_modality"
    model = M4(config)
    model.load_state_dict({n: v for n, v in ours.state_dict().items() if not ("norm" in n and n.endswith("bias"))})
    b = batch()
    expected = model(MaskedBatch.from_padded(b, 4)).total
    torch.testing.assert_close(ours(b)[0], expected)
    assert both()[0](b)[0].item() != pytest.approx(expected.item(), rel=1e-6)


# What is refused ------------------------------------------------------------------------------------------------------


def spoilt(**changes: Any) -> dict[str, Any]:
    b: dict[str, Any] = batch()
    for name, change in changes.items():
        b[name] = change(b[name]) if callable(change) else change
    return b


def put(value: int, slot: tuple[int, int] = (1, 0)) -> Any:
    def change(values: Tensor) -> Tensor:
        values = values.clone()
        values[slot] = value
        return values

    return change


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"enc_tokens": put(61)}, "enc_tokens: expected 0 to 60 in every valid slot, got 61 in sample 1, slot 0"),
        ({"enc_tokens": put(-1)}, "enc_tokens: expected 0 to 60"),
        ({"dec_tokens": put(61)}, "dec_tokens: expected 0 to 60"),
        ({"dec_tokens": put(-7)}, "dec_tokens: expected 0 to 60 in every valid slot, got -7"),
        ({"enc_positions": put(16)}, "enc_positions: expected 0 to 15"),
        ({"dec_modalities": put(4)}, "dec_modalities: expected 0 to 3"),
        ({"dec_tokens": put(5, (0, -1))}, "dec_tokens: 1 slots that dec_pad_mask leaves out hold a target"),
        ({"enc_tokens": lambda x: x.float()}, "enc_tokens: expected an integer tensor .B, N., got torch.float32"),
        (
            {"enc_positions": lambda x: x[0]},
            r"enc_positions: expected an integer tensor .B, N., got torch.int64 \(24,\)",
        ),
        ({"enc_positions": lambda x: x[:, 1:]}, r"enc_positions: expected shape \(6, 24\).*got \(6, 23\)"),
        ({"dec_pad_mask": lambda x: x[:, 1:]}, r"dec_pad_mask: expected shape \(6, 20\)"),
        ({"dec_pad_mask": lambda x: x.long()}, "dec_pad_mask: expected a bool tensor .*got torch.int64"),
        ({"dec_modalities": None}, "dec_modalities: expected an integer tensor .*NoneType"),
    ],
)
def test_batches_that_do_not_fit(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        both()[0](spoilt(**changed))
    assert "\n" not in str(caught.value)


def test_batches_that_lack_something() -> None:
    ours, _ = both()
    b = batch()
    del b["dec_tokens"]
    with pytest.raises(ValueError, match="the batch lacks dec_tokens; it has enc_tokens"):
        ours(b)
    with pytest.raises(ValueError, match="expected a padded batch, a dict of tensors, got a Tensor"):
        ours(torch.zeros(2))
    b = batch() | {name: values[:2] for name, values in batch().items() if name.startswith("dec")}
    with pytest.raises(ValueError, match="dec_tokens has 2 samples, enc_tokens 6"):
        ours(b)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_bias": True}, "use_bias: expected False, got True"),
        ({"use_bias": "no"}, "use_bias: expected True or False, got 'no'"),
        ({"vocab_sizes": [61, 40]}, "vocab_sizes has 2 entries, modalities has 4"),
        ({"max_seq_lens": [16, 9, "16", 9]}, "max_seq_lens: expected integers, got '16'"),
        ({"modalities": "tok_rgb"}, "modalities: expected a list, got 'tok_rgb'"),
        ({"modalities": ()}, "modalities must name at least one"),
        ({"dim": 36}, "dim must be even and a multiple of head_dim=8"),
        ({"dim": "32"}, "dim: expected integers, got '32'"),
        ({"mlp_ratio": "4"}, "mlp_ratio: expected a number, got '4'"),
        ({"init_std": 0.0}, "init_std: expected a number above 0, got 0.0"),
        ({"padding_idx": 0}, "padding_idx: expected no id of the vocabulary of 61, got 0"),
        ({"kernels": "fast"}, "kernels must be one of"),
        ({"dec_tokens_read_key": None}, "dec_tokens_read_key: expected the name of a key, got None"),
        ({"attention": {"middle": "full"}}, "attention must be a section of encoder"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], said: str) -> None:
    arguments: dict[str, Any] = {"modalities": NAMES, "vocab_sizes": SIZES, "max_seq_lens": LENGTHS, **SHAPE}
    with pytest.raises(ValueError, match=said):
        FourM(**(arguments | changes))


def test_unknown_arguments_are_not_passed_over() -> None:
    with pytest.raises(TypeError, match="share_embeddings"):
        FourM(modalities=NAMES, vocab_sizes=SIZES, max_seq_lens=LENGTHS, **SHAPE, share_embeddings=True)


@pytest.mark.parametrize(
    ("method", "instead"), [("forward_decoder", "forward_model"), ("compute_ce_loss", "call the model")]
)
def test_what_is_not_supported_says_what_is(method: str, instead: str) -> None:
    with pytest.raises(NotImplementedError, match=f"FourM.{method}: .*{instead}"):
        getattr(both()[0], method)(torch.zeros(1))
