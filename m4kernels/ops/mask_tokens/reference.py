"""Masking in plain PyTorch: the specification of every other backend, which agree with it bit for bit.

All arithmetic is on integers; `>>` of a negative number rounds down.

**Random words.** `word(purpose, m, j)` is word `j & 3` of the Philox4x32-10 block with the key (seed bits 0-31, seed
bits 32-63) and the counter (purpose * 2^24 + m * 2^16 + (j >> 2), epoch, sample id bits 0-31, sample id bits 32-63).
Negative seeds and sample ids count as their two's complement.

**Sizes.** n_in = low + (word(SIZES, 0, 0) * (high - low + 1) >> 32); n_out likewise from word(SIZES, 0, 1).

**log2 of a Gamma draw**, Q20, from a word u and the alpha's table. v = 2u + 1, tail = v >> 32; if tail is 1,
v = 2^33 - v. So v is odd and below 2^32; e is the place of its leading bit and h = (v << (31 - e)) - 2^31 the 31 bits
after it. With k = 64 e + (h >> 25): table[tail, k] + ((table[tail, k + 1] - table[tail, k]) * (h & (2^25 - 1)) >> 25).

**Dirichlet budgets** of n tokens. g_m is the Gamma draw of word(DIRICHLET, m, 0); modalities that never occur take no
part. d_m = max g - g_m; f = d_m & (2^20 - 1); k = f >> 10; weight w_m =
(exp2[k] + ((exp2[k + 1] - exp2[k]) * (f & 1023) >> 10)) >> min(d_m >> 20, 31). Budget = floor(n * w_m / sum of w).
The n - (sum of budgets) leftovers are fewer than the modalities that take part. Leftover i goes to the modality with
the largest Gamma draw of word(LEFTOVERS, m, i), the lowest m on a tie.

**Clamping.** Inputs to the available length; then targets to what the inputs leave of it.

**Positions.** Position j of modality m has the key word(POSITIONS, m, j). Of the available positions, ordered by
(key, position), the first are the inputs, the next the targets. Each comes out ordered by position.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from m4kernels.backend import runs_always
from m4kernels.ops.mask_tokens.arguments import Draw, MaskArguments
from m4kernels.ops.mask_tokens.plan import NEVER, Plan, Side
from m4kernels.segments import IGNORE_INDEX

SIZES, INPUT_DIRICHLET, INPUT_LEFTOVERS, TARGET_DIRICHLET, TARGET_LEFTOVERS, POSITIONS = range(6)
INPUT, TARGET = 1, 2
LOW32 = 2**32 - 1


can_run = runs_always


def philox4x32_10(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of a Philox4x32-10 block; int64 tensors of 32-bit values that broadcast.

    Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The int64 product wraps to the right 64 bits; the mask undoes the sign extension of the shift.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & LOW32) ^ c1 ^ k0, p1 & LOW32, ((p0 >> 32) & LOW32) ^ c3 ^ k1, p0 & LOW32
        k0, k1 = (k0 + 0x9E3779B9) & LOW32, (k1 + 0xBB67AE85) & LOW32
    return c0, c1, c2, c3


def random_words(draw: Draw, purpose: int, modality: int, count: int) -> Tensor:
    """int64 (B, count): word(purpose, modality, j) for j < count."""
    ids = draw.sample_ids[:, None]
    blocks = torch.arange((count + 3) // 4, device=ids.device)
    c0 = (blocks + (purpose << 24) + (modality << 16))[None]
    counter = (c0, torch.full_like(c0, draw.epoch), ids & LOW32, (ids >> 32) & LOW32)
    words = philox4x32_10(counter, (draw.seed & LOW32, (draw.seed >> 32) & LOW32))
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def log_gamma_draw(words: Tensor, table: Tensor) -> Tensor:
    """Gamma draws: words int64 (...), table int32 (2, KNOTS) → log2, Q20, int64 (...)."""
    v = 2 * words + 1
    tail = v >> 32
    v = torch.where(tail == 1, 2**33 - v, v)
    e = torch.frexp(v.double()).exponent.long() - 1  # exact: v has fewer bits than a double
    h = (v << (31 - e)) - 2**31
    k = tail * table.shape[1] + 64 * e + (h >> 25)
    flat = table.flatten().long()
    low, high = flat[k], flat[k + 1]
    return low + ((high - low) * (h & (2**25 - 1)) >> 25)


def dirichlet_budgets(draw: Draw, plan: Plan, side: Side, n: Tensor, dirichlet: int, leftovers: int) -> Tensor:
    """int64 (B, M) budgets of n (B,) tokens, from the words of the purposes `dirichlet` and `leftovers`."""
    takes_part = [m for m, row in enumerate(side.rows) if row != NEVER]

    def gamma(purpose: int, count: int) -> Tensor:  # (B, count, modalities that take part)
        return torch.stack(
            [log_gamma_draw(random_words(draw, purpose, m, count), plan.gamma[side.rows[m]]) for m in takes_part], -1
        )

    g = gamma(dirichlet, 1).squeeze(1)
    d = g.amax(1, keepdim=True) - g
    f, exp2 = d & (2**20 - 1), plan.exp2.long()
    low, high = exp2[f >> 10], exp2[(f >> 10) + 1]
    weights = (low + ((high - low) * (f & 1023) >> 10)) >> (d >> 20).clamp(max=31)
    budgets = n[:, None] * weights // weights.sum(1, keepdim=True)

    if len(takes_part) > 1:
        extra = gamma(leftovers, len(takes_part) - 1)
        index = torch.arange(len(takes_part), device=n.device)
        winner = 255 - (((extra << 8) + (255 - index)).amax(-1) & 255)  # (B, leftovers), the lowest index on a tie
        wanted = torch.arange(winner.shape[1], device=n.device) < (n - budgets.sum(1))[:, None]
        budgets = budgets.scatter_add(1, winner, wanted.long())
    out = n.new_zeros(n.shape[0], len(side.rows))
    out[:, takes_part] = budgets
    return out


def draw_counts(draw: Draw, plan: Plan, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(inputs, targets) of each modality: int64 (B, M) each, for int64 (B, M) available lengths."""
    sizes = random_words(draw, SIZES, 0, 2)
    low = torch.tensor([plan.inputs.low, plan.targets.low], device=sizes.device)
    high = torch.tensor([plan.inputs.high, plan.targets.high], device=sizes.device)
    n_in, n_out = (low + (sizes * (high - low + 1) >> 32)).unbind(1)
    inputs = dirichlet_budgets(draw, plan, plan.inputs, n_in, INPUT_DIRICHLET, INPUT_LEFTOVERS)
    inputs = torch.minimum(inputs, lengths)
    targets = dirichlet_budgets(draw, plan, plan.targets, n_out, TARGET_DIRICHLET, TARGET_LEFTOVERS)
    return inputs, torch.minimum(targets, lengths - inputs)


def select(keys: Tensor, available: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """The role of each position of one modality.

    Args:
        keys: int64 (B, n), 32-bit values.
        available: int64 (B,), positions from here on do not exist.
        inputs: int64 (B,), number of input positions.
        targets: int64 (B,), number of target positions.

    Returns:
        int64 (B, n): INPUT, TARGET or 0.
    """
    position = torch.arange(keys.shape[1], device=keys.device)
    order = torch.where(position < available[:, None], keys << 18 | position, 2**62).argsort(dim=1)
    rank = torch.empty_like(order).scatter_(1, order, position.expand_as(order))
    inputs, targets = inputs[:, None], targets[:, None]
    return (rank < inputs) * INPUT + ((rank >= inputs) & (rank < inputs + targets)) * TARGET


def mask_tokens(call: MaskArguments) -> tuple[Tensor, ...]:
    """Of inputs, then targets: ids, positions, modalities int64 (T,), cu_seqlens int32 (B + 1,), counts int32 (B, M)"""
    tokens, draw, lengths, plan, capacity = call
    lens = plan.spec.max_seq_lens
    batch, device = tokens.shape[0], tokens.device
    longest = torch.tensor(lens, device=device)
    if lengths is None:
        lengths = longest.expand(batch, -1)
    else:
        check_lengths(lengths, lens)
        lengths = lengths.long()
    inputs, targets = draw_counts(draw, plan, lengths)
    roles = torch.cat(
        [
            select(random_words(draw, POSITIONS, m, n), lengths[:, m], inputs[:, m], targets[:, m])
            for m, n in enumerate(lens)
        ],
        dim=1,
    )
    source = (
        tokens.long(),
        torch.cat([torch.arange(n, device=device) for n in lens]).expand(batch, -1),
        torch.cat([torch.full((n,), m, device=device) for m, n in enumerate(lens)]).expand(batch, -1),
    )
    out: list[Tensor] = []
    sides = (("input", INPUT, inputs, 0), ("target", TARGET, targets, IGNORE_INDEX))
    for i, (name, role, counts, fill) in enumerate(sides):
        cu_seqlens = torch.nn.functional.pad(counts.sum(1).cumsum(0), (1, 0))
        total = cu_seqlens[-1]
        size = int(total) if capacity is None else capacity[i]
        require(total <= size, lambda: too_small(name, int(total), size))  # noqa: B023 (called at once)
        chosen = roles == role
        # What is not chosen goes to one place past the end, which is cut off.
        place = torch.where(chosen, cu_seqlens[:-1, None] + chosen.cumsum(1) - 1, size).clamp(max=size).flatten()
        for values, tail in zip(source, (fill, 0, 0), strict=True):
            packed = torch.full((size + 1,), tail, dtype=torch.int64, device=device)
            out.append(packed.scatter_(0, place, values.flatten())[:size].clone())
        out += [cu_seqlens.to(torch.int32), counts.to(torch.int32)]
    return tuple(out)


def too_small(name: str, needed: int, given: int) -> str:
    """The message about a capacity that does not hold the tokens."""
    return f"mask_tokens: capacity is too small: the {name} tokens need {needed}, but it gives them {given}"


def bad_length(lens: Sequence[int], index: int, length: int) -> str:
    """The message about a length out of range, the index-th in (B, M)."""
    b, m = divmod(index, len(lens))
    return f"mask_tokens: lengths[{b}, {m}] must be 0 to {lens[m]} (its max_seq_len), got {length}"


def check_lengths(lengths: Tensor, lens: Sequence[int]) -> None:
    """Refuse lengths (B, M) out of range."""
    lengths = lengths.long()
    bad = (lengths < 0) | (lengths > torch.tensor(lens, device=lengths.device))
    require(~bad.any(), lambda: bad_length(lens, int(bad.flatten().nonzero()[0]), int(lengths[bad][0])))


def require(condition: Tensor, message: Callable[[], str]) -> None:
    """Raise ValueError unless the condition holds; on a GPU a device assertion reports it."""
    if condition.device.type == "cpu":
        if not bool(condition):
            raise ValueError(message())
    else:  # without waiting for the device, which reports it by its own means
        torch._assert_async(condition, "mask_tokens: a length is out of range or the capacity too small")
