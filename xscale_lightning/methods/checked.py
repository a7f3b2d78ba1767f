"""What a method refuses before its first step, and at its first batch: data and sizes that it cannot take."""

import math
import os
import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xscale_lightning.data.bands import Bands
from xscale_lightning.data.views import Views
from xscale_lightning.errors import UserError
from xscale_lightning.methods.checks import check_statistics
from xscale_lightning.methods.scheduled import ScheduledModule
from xscale_lightning.models.attention import available_backends, xformers_status
from xscale_lightning.models.tokenizers import check_divides


class CheckedModule(ScheduledModule):
    """A scheduled module with a band record and views, which knows what data suit it."""

    bands: Bands
    views: Views

    def check_first_batch(self, images: Tensor, raw: Tensor) -> None:
        """Refuse a first batch that the band record's statistics cannot belong to; `images` are the normalised `raw`.

        Raises:
            UserError: as `check_statistics`.
        """
        check_statistics(images, raw, self.bands)

    def check_data(self, data: Any, fitting: bool) -> None:
        """Refuse a data module whose bands or image size the model cannot take.

        While fitting both sizes count: that of the views, and the data's own, which validation, pictures and kNN see.

        Raises:
            UserError: naming the bands that differ, or the sizes that would do.
        """
        difference = self.bands.difference(data.bands) if hasattr(data, "bands") else ""
        if difference:
            raise UserError(f"the model's bands are not the data's: {difference}. Give both the same data.bands.")
        own = _height_width(getattr(data, "image_size", None))
        wanted = self.views.size if fitting else None
        height, width = _height_width(wanted or own)
        if height and width:
            self.check_size(height, width)
            self.num_tokens = math.prod(self.token_grid(height, width)) + self.backbone.num_prefix
        if wanted and all(own) and (reason := self._refusal(*own)):
            raise UserError(
                f"data.image_size {own[0]} x {own[1]}, which validation, pictures and kNN see, does not do beside "
                f"views.size {wanted}: set data.image_size to {wanted}.\n{reason}"
            )

    def _refusal(self, height: int, width: int) -> str:
        try:
            self.check_size(height, width)
        except UserError as error:  # only its words: of chained errors the command line shows the first
            return str(error)
        return ""

    def check_machine(self, device: torch.device) -> None:
        """Refuse an attention backend that cannot run on `device`, and compiled blocks where nothing compiles.

        Raises:
            UserError: with the reason.
        """
        if self.attention != "auto" and self.attention not in available_backends(device):
            raise UserError(f"model.attention {self.attention!r} cannot run: {xformers_status()[1]}. Set it to auto.")
        compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
        if self.compile_blocks and not any(map(shutil.which, compilers)):
            raise UserError(
                f"model.compile_blocks: torch.compile needs a C++ compiler, and there is no {' or '.join(compilers)}: "
                "install one, or leave it out."
            )

    def token_grid(self, height: int, width: int) -> tuple[int, int, int]:
        """Token grid `(G, H, W)` of a training image of `height x width` pixels."""
        return self.backbone.token_grid(height, width)

    def check_size(self, height: int, width: int) -> None:
        """Refuse an image size in pixels; methods add their own conditions, such as a mask that leaves no token.

        Raises:
            UserError: the patch size does not divide it.
        """
        check_divides(self.backbone.patch_size, height, width)


def _height_width(size: int | Sequence[int] | None) -> tuple[int, int]:
    """Both sides of an image size; zeros where it is not known."""
    height, width = (size, size) if isinstance(size, int) else size or (0, 0)
    return height, width
