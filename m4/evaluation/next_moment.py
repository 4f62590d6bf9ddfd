"""The prediction of the next moment, frame and pose, from the reference moment, and how good it is.

Every token of the next moment is predicted in one pass from the whole reference and nothing else: of a coordinate the
median of the predicted distribution, of a visibility the likelier, of an image the likeliest code, by which token
accuracy is judged, and the code of least expected error (`m4.generation.estimates`), which is decoded. So nothing is
drawn, and what a figure is does not depend on how many samples are predicted together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m4.config import TrainConfig
from m4.data.store import TokenStore
from m4.data.tokenizers import tokenizer_of
from m4.device import autocast
from m4.errors import ConfigError, DataError
from m4.evaluation.displacement import DisplacementHistogram
from m4.evaluation.frames import Decode, person_boxes, pixel_figures, token_accuracy
from m4.generation.decode import generate, predict_at_once, whole_batch
from m4.generation.estimates import CodeValues
from m4.generation.options import MAX_SEED, Decoding, default_steps
from m4.modalities import NEXT, REFERENCE, VISIBILITIES, RowLayout, data_vocab_size
from m4.model import M4
from m4.poses import Poses, median_pose, nearest_figures, pose_figures
from m4.run.console import show_progress

log = logging.getLogger(__name__)

_SAMPLES_AT_ONCE = 16
MOST_FUTURES = 1024
_FRAMES, _POSES = zip(REFERENCE, NEXT, strict=True)  # pairs of names


@dataclass(frozen=True)
class Prediction:
    """Of the first N rows of a split."""

    true: np.ndarray  # int64 (N, L)
    predicted: np.ndarray  # int64 (N, L), with the next moment predicted: likeliest ids, medians of coordinates
    shown: np.ndarray  # the same, but image codes of least expected error where ``code_values`` were given
    pose_nats: float | None  # a token of the true next pose, given the reference alone


class NextMoment:
    """What can be said of the next moment of a run.

    Args:
        config: of the run.
        meta: what meta.json says of the data, {} where there is none.
    Raises:
        ConfigError: joints are in another number of bins than the run can predict, or than the reference's.
    """

    def __init__(self, config: TrainConfig, meta: Mapping[str, Any]) -> None:
        self.config, self.meta = config, meta
        self.layout = RowLayout.of(config)
        self.left_out: dict[str, str] = {}  # frame, pose → why
        self.given = [name for name in REFERENCE if name in self.layout.modalities]
        self.frame = self._pair("frame", _FRAMES, "image")
        self.pose = self._pair("pose", _POSES, "joints")
        self.bins = self._bins() if self.pose else 0

    def _pair(self, what: str, names: tuple[str, str], kind: str) -> tuple[str, str] | None:
        missing = [name for name in names if name not in self.layout.modalities]
        if missing:
            self.left_out[what] = f"the run has no {' and no '.join(missing)}"
            return None
        first, second = (self.layout[name] for name in names)
        if first.kind != kind or second.kind != kind or first.shape != second.shape:
            lengths = f"{first.length} and {second.length} tokens"
            self.left_out[what] = f"{' and '.join(names)} have {lengths} a sample, which are no {kind}"
            return None
        return names

    def _bins(self) -> int:
        sizes = [data_vocab_size(name, self.meta) for name in _POSES]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"meta.json: expected the same number of bins in {' and '.join(_POSES)}, got {sizes[0]} and "
                f"{sizes[1]}; prepare the data again"
            )
        known = dict(zip(self.config.modalities, self.config.vocab_sizes, strict=True))[_POSES[1]]
        if known < sizes[1] and not self.meta:
            self.leave_out("pose", f"no meta.json says in how many bins joints are, and the run knows but {known}")
        elif known < sizes[1]:
            raise ConfigError(
                f"vocab_sizes: the run knows {known} ids of {_POSES[1]}, the data has {sizes[1]} bins (meta.json); "
                "evaluate on data with the bins that the run was trained on"
            )
        return sizes[1]

    def check_poses(self, store: TokenStore, split: str) -> None:
        """Leave poses out where visibility is not 0 or 1, and raise DataError where a joint is beyond the bins."""
        for name in self.pose or ():
            tokens = store.tokens[:, self.layout.span(name)]
            modality = self.layout[name]
            if int(tokens[:, modality.visibility].max(initial=0)) >= VISIBILITIES:
                self.leave_out("pose", f"visibility in {name} of {split} is not 0 or 1 everywhere")
                return
            largest = int(tokens[:, modality.coordinates].max(initial=0))
            if largest >= self.bins:
                raise DataError(
                    f"{split}/{name}: expected joints in {self.bins} bins, as meta.json says, got {largest}; prepare "
                    "the data again"
                )

    def leave_out(self, what: str, why: str) -> None:
        """Say nothing of the frame or of the pose."""
        self.left_out[what] = why
        if what == "frame":
            self.frame = None
        else:
            self.pose = None

    @property
    def wanted(self) -> list[str]:
        """The modalities to predict; [] where nothing can be said."""
        return [pair[1] for pair in (self.frame, self.pose) if pair]

    def predict(
        self,
        model: M4,
        store: TokenStore,
        samples: int,
        device: torch.device,
        *,
        code_values: CodeValues | None = None,
        batch_size: int = _SAMPLES_AT_ONCE,
        after_batch: Callable[[], None] = lambda: None,
    ) -> Prediction:
        """Predict the next moment of the first ``samples`` rows.

        Args:
            model: ready to predict.
            code_values: what image codes stand for, for frames that are to be decoded.
            batch_size: samples that are predicted together; no figure depends on it.
            after_batch: called after each batch; lets a stop signal through.
        """
        limits, ordinal = self.layout.id_limits(self.meta).to(device), self.layout.ordinal().to(device)
        true, predicted, shown, nats = [], [], [], []
        for rows in self._batches(samples, batch_size):
            tokens = store.batch(rows).to(device)
            true.append(tokens.cpu().numpy())
            filled = predict_at_once(
                model,
                tokens,
                given=self.given,
                wanted=self.wanted,
                id_limits=limits,
                ordinal=ordinal,
                code_values=code_values,
            )
            predicted.append(filled.tokens.cpu().numpy())
            shown.append(filled.shown.cpu().numpy())
            if self.pose:
                nats.append(self._pose_nats(model, tokens, device))
            after_batch()
        tokens_each = self.layout[_POSES[1]].length if self.pose else 0
        mean = sum(nats) / (samples * tokens_each) if self.pose else None
        return Prediction(np.concatenate(true), np.concatenate(predicted), np.concatenate(shown), mean)

    def futures(
        self,
        model: M4,
        store: TokenStore,
        samples: int,
        device: torch.device,
        *,
        futures: int,
        batch_size: int = _SAMPLES_AT_ONCE,
    ) -> np.ndarray:
        """Next poses drawn from the model given the whole reference moment, by `generate` at temperature 1.

        A draw is a function of (``eval_seed``, its number, the row), whatever is drawn beside it.

        Args:
            samples: the first rows of the store.
            futures: draws for each, at most MOST_FUTURES.
        Returns:
            int64 (futures, samples, 3·J).
        """
        assert self.pose is not None
        span, limits = self.layout.span(self.pose[1]), self.layout.id_limits(self.meta).to(device)
        drawn = np.empty((futures, samples, span.stop - span.start), dtype=np.int64)
        steps = default_steps(self.config, self.pose[1:], span.stop - span.start)
        for rows in self._batches(samples, batch_size, f"drawing {futures} next poses each"):
            tokens = store.batch(rows).to(device)
            for number in range(futures):
                seed = (self.config.eval_seed * MOST_FUTURES + number) % (MAX_SEED + 1)
                filled = generate(
                    model,
                    tokens,
                    given=self.given,
                    wanted=[self.pose[1]],
                    id_limits=limits,
                    decoding=Decoding(steps=steps, temperature=1.0, seed=seed),
                    sample_ids=torch.from_numpy(rows),
                )
                drawn[number, rows] = filled[:, span].cpu().numpy()
        return drawn

    def _batches(self, samples: int, batch_size: int, what: str = "predicting the next moment") -> Iterator[np.ndarray]:
        rows = np.arange(samples)
        batches = [rows[first : first + batch_size] for first in range(0, samples, batch_size)]
        return show_progress(batches, what, samples, size=len)

    @torch.no_grad()
    def _pose_nats(self, model: M4, tokens: Tensor, device: torch.device) -> float:
        """Sum over the samples of −log P of their next pose, of which nothing is visible."""
        batch = whole_batch(tokens, self.layout, self.given, [_POSES[1]])
        ones = torch.ones(len(self.layout.modalities), dtype=torch.int64, device=device)
        with autocast(self.config.dtype, device):
            losses = model(batch, target_counts=ones)  # denominators of one: sums instead of means
        return float(losses.per_modality[self.layout.modalities.index(_POSES[1])])

    def figures(self, prediction: Prediction) -> dict[str, Any]:
        """The figures that need nothing but the prediction: of the pose those of `pose_figures` and nats, of the frame
        token_accuracy; each beside copying the reference."""
        found: dict[str, Any] = {"samples": len(prediction.true)}
        if self.pose:
            predicted, reference, true = self._poses(prediction)
            found["pose"] = {
                **pose_figures(predicted, reference, true),
                "nats": prediction.pose_nats,
                "copy": pose_figures(reference, reference, true),
            }
        if self.frame:
            frame, copied, following = self._three(prediction, _FRAMES)
            found["frame"] = {
                "token_accuracy": token_accuracy(frame, following),
                "copy": {"token_accuracy": token_accuracy(copied, following)},
            }
        return found

    def all_figures(
        self, prediction: Prediction, train: TokenStore, decode: Decode | None, futures: np.ndarray | None = None
    ) -> dict[str, Any]:
        """`figures`, and what needs the training set (median pose, displacements) or an image tokenizer (pixels).

        futures: next poses that `futures` drew, to compare the nearest with as many draws of the displacements.
        """
        found: dict[str, Any] = {**self.figures(prediction), "left_out": self.left_out}
        boxes = None
        if self.pose:
            here, there = (prediction.true[:, self.layout.span(name)] for name in self.pose)
            train_here, train_there = (np.asarray(train.tokens[:, self.layout.span(name)]) for name in self.pose)
            _, reference, true = self._poses(prediction)
            marginal = median_pose(Poses.of(train_there, self.bins)).repeated(len(true))
            found["pose"]["marginal"] = pose_figures(marginal, reference, true)
            displacement = DisplacementHistogram(train_here, train_there, self.bins)
            found["pose"]["displacement"] = {"nats": float(displacement.nats(here, there).mean())}
            if futures is not None:
                copied = displacement.draw(here, len(futures), self.config.eval_seed)
                for into, drawn in ((found["pose"], futures), (found["pose"]["displacement"], copied)):
                    poses = [Poses.of(tokens, self.bins) for tokens in drawn]
                    into["nearest"] = nearest_figures(poses, reference, true)
            boxes = person_boxes(true)
        if self.frame and decode is not None:
            _, copied, following = self._three(prediction, _FRAMES)
            shown = prediction.shown[:, self.layout.span(self.frame[1])]
            pixels, copied_pixels = pixel_figures([shown, copied], following, decode, boxes, _shown)
            found["frame"] |= pixels
            found["frame"]["copy"] |= copied_pixels
        return found

    def tokenizer(self) -> Decode | None:
        """What decodes the data's frames; None, which is said, where it is not at hand."""
        if not self.frame:
            return None
        try:
            if "tokenizer" not in self.meta.get("options", {}):
                raise DataError("the data has no meta.json that names the image tokenizer")
            return tokenizer_of(self.meta).decode
        except DataError as error:
            self.left_out["frame pixels"] = str(error)
            return None

    def _poses(self, prediction: Prediction) -> tuple[Poses, Poses, Poses]:
        """(predicted, reference, true)."""
        predicted, reference, true = self._three(prediction, _POSES)
        return Poses.of(predicted, self.bins), Poses.of(reference, self.bins), Poses.of(true, self.bins)

    def _three(self, prediction: Prediction, names: tuple[str, str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The tokens of (the predicted, the reference's, the true next) modality."""
        reference, following = (self.layout.span(name) for name in names)
        true = prediction.true
        return prediction.predicted[:, following], true[:, reference], true[:, following]


def _shown(firsts: Any) -> Iterator[int]:
    return show_progress(firsts, "comparing frames", len(firsts), unit="batches")


def next_moment_of(config: TrainConfig, meta: Mapping[str, Any], store: TokenStore) -> NextMoment | None:
    """What the evaluations of a training run say of the next moment; None if nothing, and why is logged.

    store: of the evaluation split.
    """
    if not config.eval_generate_samples:
        return None
    try:
        found = NextMoment(config, meta)
        found.check_poses(store, config.data.eval_split)
    except (ConfigError, DataError) as error:
        log.warning("evaluations say nothing of the next moment: %s", error)
        return None
    for what, why in found.left_out.items():
        log.info("evaluations say nothing of the next %s: %s", what, why)
    return found if found.wanted else None
