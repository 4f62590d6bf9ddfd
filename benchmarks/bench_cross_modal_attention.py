"""cross_modal_attention at the shapes of M4's layers: 10 heads of 64, ragged samples of at most 256 tokens."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.device import ON_GPU, Unavailable, backends
from benchmarks.measure import Run, Work
from benchmarks.peers import flex, installed, sdpa
from benchmarks.suite import Case, Suite, test_guard, test_time  # noqa: F401
from m4kernels import Segments, cross_modal_attention
from m4kernels.cases import M4_INPUT_MEANS, M4_TARGET_MEANS, m4_counts

HEADS, HEAD_DIM, WIDTH = 10, 64, 256  # WIDTH: the slots of a padded sample in M4


class Layer(NamedTuple):
    q: Tensor  # (Tq, H, Dh)
    k: Tensor  # (Tk, H, Dh)
    v: Tensor  # (Tk, H, Dh)
    q_segments: Segments
    k_segments: Segments
    allow: Tensor | None  # (M, M)
    backward: bool


def layer(kind: str, batch: int, *, backward: bool, within_modality: bool = False) -> Layer:
    """Self-attention of the encoder or decoder, or cross-attention from the one to the other."""
    g = torch.Generator().manual_seed(0)
    counts = {"encoder": m4_counts(batch, M4_INPUT_MEANS, g), "decoder": m4_counts(batch, M4_TARGET_MEANS, g)}
    for value in counts.values():
        value[:, 0].clamp_(min=1)  # one sample at a time, PyTorch has nothing to do for an empty one
        value.copy_((value * (WIDTH / value.sum(1, keepdim=True)).clamp(max=1)).ceil().int())
        value[:, 2] -= (value.sum(1) - WIDTH).clamp(min=0).int()
    segments = {name: Segments.from_counts(value, max_seqlen=WIDTH) for name, value in counts.items()}
    q_segments, k_segments = (
        segments["decoder" if kind != "encoder" else kind],
        segments[kind.replace("cross", "encoder")],
    )

    def tokens(of: Segments) -> Tensor:
        return torch.randn(int(of.cu_seqlens[-1]), HEADS, HEAD_DIM, generator=g).requires_grad_(backward)

    allow = torch.eye(4, dtype=torch.bool) if within_modality else None
    return Layer(tokens(q_segments), tokens(k_segments), tokens(k_segments), q_segments, k_segments, allow, backward)


def work(inputs: Layer) -> Work:
    q_counts, k_counts = inputs.q_segments.counts.double().cpu(), inputs.k_segments.counts.double().cpu()
    allow = torch.ones(4, 4) if inputs.allow is None else inputs.allow.cpu()
    pairs = float(torch.einsum("bi,bj,ij->", q_counts, k_counts, allow.double()))
    products = 7 if inputs.backward else 2
    return Work(
        2 * products * HEADS * HEAD_DIM * pairs,
        "FLOP",
        "FLOP = 2 x (2 or, with backward, 7 products) x H x Dh x allowed pairs",
    )


def trained(inputs: Layer, tensors: tuple[Tensor, ...], attention: Callable[..., Tensor]) -> Run:
    """Forward, and backward with a gradient of ones where the case wants it."""

    def run() -> None:
        out = attention(*tensors)
        if inputs.backward:
            out.backward(torch.ones_like(out))
            for tensor in tensors:
                tensor.grad = None

    return run


def ours(backend: str) -> Callable[[Layer], Run]:
    def prepare(inputs: Layer) -> Run:
        q, k, v, q_segments, k_segments, allow, _ = inputs
        return trained(
            inputs,
            (q, k, v),
            lambda q, k, v: cross_modal_attention(q, k, v, q_segments, k_segments, allow=allow, backend=backend),
        )

    return prepare


def padded(inputs: Layer) -> Run:
    q, k, v, q_segments, k_segments, allow, backward = inputs
    tensors = tuple(
        sdpa.pad(x.detach(), s).requires_grad_(backward) for x, s in ((q, q_segments), (k, k_segments), (v, k_segments))
    )
    mask = sdpa.padded_mask(q_segments, k_segments, allow)
    return trained(inputs, tensors, lambda q, k, v: sdpa.padded(q, k, v, mask))


def by_sample(inputs: Layer) -> Run:
    q, k, v, q_segments, k_segments, allow, _ = inputs
    q_ends, k_ends = q_segments.cu_seqlens.tolist(), k_segments.cu_seqlens.tolist()
    masks: list[Tensor | None] = [None] * q_segments.batch_size
    if allow is not None:
        q_mods, k_mods = sdpa.modalities(q_segments), sdpa.modalities(k_segments)
        masks = [
            allow[q_mods[q_ends[b] : q_ends[b + 1]].unsqueeze(1), k_mods[k_ends[b] : k_ends[b + 1]]]
            for b in range(q_segments.batch_size)
        ]
    return trained(inputs, (q, k, v), lambda q, k, v: sdpa.by_sample(q, k, v, q_ends, k_ends, masks))


def flex_attention(inputs: Layer) -> Run:
    mask = flex.block_mask(inputs.q_segments, inputs.k_segments, inputs.allow)
    return trained(inputs, (inputs.q, inputs.k, inputs.v), lambda q, k, v: flex.forward(q, k, v, mask))


def varlen(inputs: Layer) -> Run:
    q, k, v, q_segments, k_segments, allow, _ = inputs
    if allow is not None:
        raise Unavailable("varlen_attn knows no modalities")
    run = trained(inputs, (q, k, v), lambda q, k, v: installed.varlen_attention(q, k, v, q_segments, k_segments))
    run()  # one that is absent says so here
    return run


FORWARD_ONLY = () if ON_GPU else ("FlexAttention",)
BACKENDS = backends("cross_modal_attention")
BASELINES = ("reference", "SDPA padded", *(("varlen_attn",) if ON_GPU else ("SDPA by sample",)))

SUITE = Suite(
    "cross_modal_attention",
    {
        "encoder, forward": Case(lambda: layer("encoder", 8, backward=False), work),
        "encoder": Case(lambda: layer("encoder", 8, backward=True), work, without=FORWARD_ONLY),
        "cross": Case(lambda: layer("cross", 8, backward=True), work, without=FORWARD_ONLY),
        "sparse: within modality": Case(
            lambda: layer("encoder", 8, backward=True, within_modality=True),
            work,
            without=FORWARD_ONLY,
        ),
        "small: 1 sample": Case(lambda: layer("encoder", 1, backward=True), work, without=FORWARD_ONLY),
        "decoder": Case(lambda: layer("decoder", 8, backward=True), work, without=FORWARD_ONLY, full=True),
        "encoder, batch 96": Case(
            lambda: layer("encoder", 96, backward=True), work, without=FORWARD_ONLY, full=True, gpu=True
        ),
        "decoder, batch 96": Case(lambda: layer("decoder", 96, backward=True), work, gpu=True, cpu=False),
        "cross, batch 96": Case(lambda: layer("cross", 96, backward=True), work, gpu=True, cpu=False),
        "encoder, forward, batch 96": Case(lambda: layer("encoder", 96, backward=False), work, gpu=True, cpu=False),
        "within modality, batch 96": Case(
            lambda: layer("encoder", 96, backward=True, within_modality=True), work, gpu=True, cpu=False
        ),
    },
    {name: ours(name) for name in BACKENDS}
    | {
        "SDPA padded": padded,
        "SDPA by sample": by_sample,
        "FlexAttention": flex_attention,
    }
    | ({"varlen_attn": varlen} if ON_GPU else {}),
    guards=tuple((name, baseline) for name in BACKENDS[:-1] for baseline in BASELINES),
    dtype=torch.bfloat16,
    long=("FlexAttention",),  # compiles for half a minute
)
