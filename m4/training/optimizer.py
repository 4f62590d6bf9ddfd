"""AdamW with decay groups, Muon for the matrices of the trunk, and the learning rate over counted tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from m4.config import TrainConfig
from m4.distributed.shards import like
from m4.modalities import RowLayout
from m4.training.adamw import EPS, AdamW, scale_gradients
from m4.training.muon import muon

# A group has these rates, each times its scale: "bins_lr" is that of the first rows, which are coordinate bins.
RATES = {"lr": "lr_scale", "bins_lr": "bins_lr_scale"}
VOCABULARY = ("enc_tok_emb.weight", "to_logits.weight")  # a row for every id
TRUNK = ("encoder.blocks.", "decoder.blocks.")


class MuonAndAdamW(torch.optim.Optimizer):
    """Looks like one optimiser: Muon for some matrices, AdamW for the other parameters.

    Muon reads ``found_inf`` on the host: it knows nothing of it, and has to be left out where a step must not update.

    Args:
        matrices: two-dimensional parameters.
        others: groups of AdamW.
        config: the run.
    Raises:
        ConfigError: this torch has no Muon.
    """

    def __init__(self, matrices: list[nn.Parameter], others: list[dict[str, Any]], config: TrainConfig) -> None:
        self.muon = muon(matrices, lr=config.lr, weight_decay=config.weight_decay)
        self.adamw = AdamW(others, config)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self._share()

    @property
    def found_inf(self) -> Tensor | None:
        """() float, 1 where the step must not update."""
        return self.adamw.found_inf

    @found_inf.setter
    def found_inf(self, value: Tensor) -> None:
        self.adamw.found_inf = value

    @property
    def grad_factor(self) -> Tensor | None:
        """() float, of all gradients in `step`; None for 1."""
        return self.adamw.grad_factor

    @grad_factor.setter
    def grad_factor(self, value: Tensor | None) -> None:
        self.adamw.grad_factor = value

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters, or none."""
        self.adamw.step()
        if not self.found_inf:
            scale_gradients(self.muon.param_groups[0]["params"], self.grad_factor)
            self.muon.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimiser's."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """The two work on the groups and the state of this one."""
        self.muon.state = self.adamw.state = self.state
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:1], self.param_groups[1:]


def build_optimizer(model: nn.Module, config: TrainConfig) -> AdamW | MuonAndAdamW:
    """The optimiser of a run; weights and embeddings decay, norms and biases (fewer than two dimensions) do not.

    ``adamw`` is AdamW for all. ``muon`` is Muon for the matrices of the encoder's and decoder's blocks and AdamW for
    the rest. Its updates have the root mean square of AdamW's, so both have the learning rate and weight decay of the
    configuration.

    The rows of the vocabulary (token embedding and output layer) have a group of their own where their learning rate
    is another, ``config.vocab_lr_scale`` times the rate; those of coordinate bins ``config.coords_lr_scale`` times it;
    or where Adam's epsilon is another, ``config.vocab_eps``.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and name.startswith(TRUNK)] if config.optimizer == "muon" else []
    taken = {id(p) for p in matrices}
    weights = [(name, p) for name, p in named if p.ndim >= 2 and id(p) not in taken]
    of_bins = config.coords_lr_scale if config.coords_lr_scale != config.vocab_lr_scale else None
    bins = {"bins": RowLayout.of(config).bins, "bins_lr": config.lr, "bins_lr_scale": of_bins} if of_bins else {}
    apart = VOCABULARY if config.vocab_lr_scale != 1 or config.vocab_eps != EPS or bins else ()
    groups = [
        {"params": [p for name, p in weights if name not in apart], "weight_decay": config.weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
        {
            "params": [p for name, p in weights if name in apart],
            "weight_decay": config.weight_decay,
            "lr_scale": config.vocab_lr_scale,
            "eps": config.vocab_eps,
            **bins,
        },
    ]
    groups = [group for group in groups if group["params"]]
    return MuonAndAdamW(matrices, groups, config) if matrices else AdamW(groups, config)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The `RATES` of every group, times their scales; in place where one is a tensor, which a captured step reads."""
    for group, name in _rates(optimizer):
        scaled = rate * group.get(RATES[name], 1.0)
        if isinstance(group[name], torch.Tensor):
            group[name].fill_(scaled)
        else:
            group[name] = scaled


def keep_rates_on(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Make the rates tensors on the device, but for those that are read on the host."""
    for group, name in _rates(optimizer):
        if not group.get("lr_on_host"):
            group[name] = torch.zeros((), device=device)


def _rates(optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], str]]:
    """The groups, and names of the rates that each has."""
    return ((group, name) for group in optimizer.param_groups for name in RATES if name in group)


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Moments and step counts of a checkpoint; the groups' settings stay those of this run and device.

    Of parameters that are divided over ranks, each takes its part.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        number: {
            kind: like(value, parameters[number]) if getattr(value, "ndim", 0) else value
            for kind, value in of_one.items()
        }
        for number, of_one in saved["state"].items()
    }
    kept = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict({**saved, "state": state})
    for group, settings in zip(optimizer.param_groups, kept, strict=True):
        group.update(settings)
