"""What `prepare` makes of the videos."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from m4.data.checks import check_seed
from m4.data.framing import FRAMINGS
from m4.data.preparation.captions import BLIP, CAPTIONS
from m4.data.preparation.pairs import SSIM_THRESHOLD
from m4.data.split import UNITS
from m4.data.tokenizers import TOKENIZERS
from m4.device import DTYPES, default_device, default_dtype
from m4.errors import data_error

SPLIT_OPTIONS = ("split_unit", "seed")  # decide where samples go, not what they are


@dataclass(frozen=True)
class PrepareOptions:
    """What to make of the videos; see ``python -m m4.data prepare --help``."""

    tokenizer: str = "fsq"
    cosmos_dir: str | None = None
    cosmos_dtype: str | None = None
    blip_dir: str | None = None
    captions: str = "label"
    framing: str = "subject"
    ssim_threshold: float = SSIM_THRESHOLD
    split_unit: str = "video"
    seed: int = 42

    def check(self) -> None:
        """Raises DataError for an unknown choice or a number out of range."""
        for name, choices in (
            ("tokenizer", TOKENIZERS),
            ("captions", CAPTIONS),
            ("framing", FRAMINGS),
            ("split_unit", UNITS),
        ):
            if getattr(self, name) not in choices:
                value = repr(getattr(self, name))
                raise data_error(name, expected=" or ".join(choices), actual=value, remedy="Choose one of these.")
        if self.cosmos_dtype not in (None, *DTYPES):
            value = repr(self.cosmos_dtype)
            raise data_error("cosmos_dtype", expected=" or ".join(DTYPES), actual=value, remedy="Choose one of these.")
        if not -1 < self.ssim_threshold <= 1:
            raise data_error(
                "ssim_threshold", expected="a number in (-1, 1]", actual=self.ssim_threshold, remedy="Correct it."
            )

        check_seed(self.seed)

    def record(self) -> dict:
        """What decides the content of the samples, for meta.json; of weights their name, not where they lie."""
        fields = asdict(self)
        del fields["cosmos_dir"], fields["blip_dir"]
        if self.tokenizer == "cosmos":
            fields["cosmos_dtype"] = self.cosmos_dtype or default_dtype(default_device())
        else:
            del fields["cosmos_dtype"]
        if self.captions == "blip":
            fields["blip"] = BLIP if self.blip_dir is None else Path(self.blip_dir).name
        return fields
