import pytest
import torch

from m4kernels import MaskedBatch, Segments, _ext
from m4kernels.cases import random_masked_batch, random_packed, random_segments


@pytest.mark.parametrize("tail", [0, 9])
def test_padded_and_back(tail: int) -> None:
    g = torch.Generator().manual_seed(0)
    batch = random_masked_batch(8, (20, 5, 20, 5), (9, 3, 9, 3), (50, 60, 70, 80), g, tail=tail)
    padded = batch.padded()
    for prefix, half, fill in (("enc", batch.encoder, 0), ("dec", batch.decoder, -100)):
        mask = padded[f"{prefix}_pad_mask"]
        lengths = half.segments.cu_seqlens.diff()
        assert mask.shape == (8, half.segments.max_seqlen)
        assert torch.equal(mask.sum(1), lengths)
        assert torch.equal(mask, torch.arange(mask.shape[1]) < lengths[:, None])  # valid tokens come first
        assert (padded[f"{prefix}_tokens"][~mask] == fill).all()
        total = int(lengths.sum())
        back = getattr(MaskedBatch.from_padded(padded, 4), {"enc": "encoder", "dec": "decoder"}[prefix])
        assert torch.equal(back.ids, half.ids[:total])
        assert torch.equal(back.positions, half.positions[:total])
        assert torch.equal(back.modalities, half.modalities[:total])
        assert torch.equal(back.segments.counts, half.segments.counts)
        assert torch.equal(back.segments.cu_seqlens, half.segments.cu_seqlens)


def test_from_padded_refuses_disorder_and_absence() -> None:
    g = torch.Generator().manual_seed(0)
    half = random_packed(Segments.from_counts(torch.tensor([[3, 2]])), (50, 60), g)
    padded = MaskedBatch(half, half).padded()
    with pytest.raises(ValueError, match="lacks enc_positions"):
        MaskedBatch.from_padded({k: v for k, v in padded.items() if k != "enc_positions"})
    with pytest.raises(ValueError, match="must be ordered by modality"):
        MaskedBatch.from_padded(padded | {"dec_modalities": padded["dec_modalities"].flip(1)})
    with pytest.raises(ValueError, match="expected the same"):
        MaskedBatch.from_padded(padded | {"enc_tokens": torch.randint(0, 9, (1, 7), generator=g)})


def test_check_values_names_the_fault() -> None:
    good = Segments.from_counts(torch.tensor([[3, 2], [0, 0], [1, 4]]))
    good.check_values("q_segments", 10)
    cu = good.cu_seqlens
    faults = {
        r"cu_seqlens ends at 10, but there are only 9 tokens": (good, 9),
        r"must start at 0": (Segments(cu + 1, good.counts, 5), 12),
        r"must not decrease": (Segments(torch.tensor([0, 5, 4, 10], dtype=torch.int32), good.counts, 6), 10),
        r"counts of sample 0 add up to 5, but cu_seqlens gives it 4": (
            Segments(torch.tensor([0, 4, 5, 10], dtype=torch.int32), good.counts, 6),
            10,
        ),
        r"max_seqlen is 4, but a sample has 5 tokens": (Segments(cu, good.counts, 4), 10),
        r"cu_seqlens must be int32 \(4,\)": (Segments(cu.long(), good.counts, 5), 10),
        r"counts must not be negative": (Segments(cu, torch.tensor([[6, -1], [0, 0], [1, 4]]).int(), 6), 10),
    }
    for message, (segments, total) in faults.items():
        with pytest.raises(ValueError, match=message):
            segments.check_values("q_segments", total)


def test_compiled_check_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged segments are found by the compiled check whenever, and only when, PyTorch finds them."""
    g = torch.Generator().manual_seed(0)
    extension, verdicts = _ext.require(), set()
    monkeypatch.setattr(_ext, "load", lambda: None)
    for _ in range(400):
        segments = random_segments(3, (4, 2), g)
        cu, counts = segments.cu_seqlens.clone(), segments.counts.clone()
        for x in (cu, counts.view(-1)):
            if torch.rand((), generator=g) < 0.3:
                x[torch.randint(len(x), (), generator=g)] += torch.randint(-2, 3, (), generator=g, dtype=torch.int32)
        total = int(cu.max()) + int(torch.randint(-1, 2, (), generator=g))
        longest = segments.max_seqlen + int(torch.randint(-1, 2, (), generator=g))
        try:
            Segments(cu, counts, longest).check_values("segments", total)
            sound = True
        except ValueError:
            sound = False
        if longest >= 0:  # else its structure is refused
            found = extension.segments_consistent(
                cu_seqlens=cu.data_ptr(),
                counts=counts.data_ptr(),
                batch=3,
                modalities=2,
                total=total,
                max_seqlen=longest,
            )
            assert found == sound
            verdicts.add(found)
    assert verdicts == {True, False}
