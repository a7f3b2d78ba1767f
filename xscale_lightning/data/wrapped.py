"""What all data modules around somebody else's samples share: bands by name, raw values, gsd, size, labels."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from xscale_lightning.data import describe
from xscale_lightning.data.bands import BandSelection, match_names
from xscale_lightning.data.datamodule import DEFAULT_BANDS, Split, XScaleDataModule
from xscale_lightning.data.ground import check_gsd
from xscale_lightning.data.labels import LabelMap, refusal, settle_classes
from xscale_lightning.data.reading import OnError, Reader, check_on_error, spread
from xscale_lightning.errors import UserError

MAX_SIDE = 16384  # pixels; larger images are scenes, which are cut


@dataclass
class Prepare:
    """Makes our sample of a foreign one; lives in the worker processes."""

    source: Any
    """Dataset the samples come from."""
    owner: str
    """Its name, for messages."""
    channels: list[int] | None
    """Channels to take, in order; None takes all."""
    delivered: int
    """Number of channels the dataset has to deliver."""
    size: tuple[int, int] | None
    """Height and width to resize to, or None."""
    gsd: float | None
    """Metres per pixel the user gave; wins over the data's own."""
    preset_gsd: float | None
    """Metres per pixel of the sensor preset, where nothing else says it."""
    label_map: LabelMap | None = None
    """From mask values to classes; None leaves masks as they are."""

    def __call__(self, sample: Mapping[str, Any], index: Any) -> dict[str, Any]:
        """Return `image [C, H, W]` float32 in raw units, `gsd`, and `label`, `mask` and `file` where there are any.

        Raises:
            UserError: if the image has another number of channels than named, or the gsd is not known.
            ValueError: if the mask has another size than the image or a value that is no class.
        """
        if "image" not in sample:
            raise UserError(f"data: samples of {self.owner} have no 'image', only {', '.join(sample)}.")
        image = torch.as_tensor(sample["image"])
        if image.ndim != 3 or image.shape[0] != self.delivered:
            raise UserError(
                f"data.bands: {self.owner} delivers images of shape {tuple(image.shape)}, but {self.delivered} bands "
                "are named; fit data.bands, or set data.channels to the names of all channels it delivers."
            )
        result: dict[str, Any] = {"image": (image if self.channels is None else image[self.channels]).float()}
        if "label" in sample:
            result["label"] = torch.as_tensor(sample["label"]).long()
        if "mask" in sample:
            result["mask"] = self._mask(torch.as_tensor(sample["mask"]), image, index)
        gsd = self.gsd or describe.gsd_of(self.source, sample, index) or self.preset_gsd
        if gsd is None:
            raise UserError("data.gsd: neither the data nor the sensor preset say it; set it to metres per pixel.")
        height, width = image.shape[1:]
        if self.size is not None and (height, width) != self.size:
            gsd *= (height * width / (self.size[0] * self.size[1])) ** 0.5
            result |= {key: resize(result[key], self.size) for key in ("image", "mask") if key in result}
        result["gsd"] = torch.tensor(gsd)
        file = describe.file_of(self.source, index)
        if file is None and isinstance(index, int):
            return result | {"index": index}
        return result if file is None else result | {"file": file}

    def _mask(self, mask: Tensor, image: Tensor, index: Any) -> Tensor:
        mask = mask.squeeze(0)
        if self.label_map is None:  # whatever it is, nobody asks for classes
            return mask.long()
        where = describe.file_of(self.source, index) or f"sample {index} of {self.owner}"
        if mask.shape != image.shape[1:]:
            shapes = f"the mask has shape {tuple(mask.shape)}, its image {tuple(image.shape)}"
            raise ValueError(f"{shapes}; one class per pixel is needed")
        try:
            return torch.from_numpy(self.label_map(mask.numpy(), where)).long()
        except UserError as error:
            problem = refusal(error, where)
        raise ValueError(problem)  # of this sample: data.on_error says what becomes of it


def resize(array: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an image `[C, H, W]` (bilinear, antialiased) or a mask of classes `[H, W]` (nearest) to `[..., h, w]`."""
    if array.ndim == 2:
        return functional.interpolate(array[None, None].float(), size, mode="nearest-exact")[0, 0].to(array.dtype)
    return functional.interpolate(array[None], size, mode="bilinear", antialias=True)[0]


class WrappedData(XScaleDataModule):
    """Data module around a dataset that is not ours; subclasses implement `open_source`."""

    def __init__(
        self,
        bands: BandSelection = DEFAULT_BANDS,
        channels: list[str] | None = None,
        gsd: float | None = None,
        image_size: int | tuple[int, int] | None = None,
        num_classes: int | None = None,
        multilabel: bool | None = None,
        name: str | None = None,
        labels: dict[int, int] | None = None,
        class_names: list[str] | None = None,
        ignore: list[int] | None = None,
        on_error: OnError = "skip",
        keep_constant: bool = False,
        batch_size: int = 64,
        num_workers: int | None = None,
    ) -> None:
        """Check the arguments; files are opened by `setup`.

        Args:
            bands: bands to use, and their statistics.
            channels: names of all channels the data delivers, in its order, where it does not say them itself.
            gsd: metres per pixel; null takes it from the data, else from the sensor preset.
            image_size: height and width in pixels to resize to (the gsd follows); null leaves images as they are.
            num_classes: number of classes, of labels or of masks; null asks the data.
            multilabel: whether an image has several labels; null looks at the first one.
            name: short name for the log; null makes one.
            labels: class number by value in masks, such as {10: 0, 20: 1}; null takes the values themselves.
            class_names: names of the classes of masks; null asks the data.
            ignore: values in masks of pixels that do not count; they become -1.
            on_error: "skip" puts another sample in the place of a file that cannot be read and counts it; "stop" stops.
            keep_constant: deliver images that have one value in all pixels, too; else they count as damaged.
            batch_size: samples per device and step.
            num_workers: processes that read files; 0 reads in the training process, null chooses from the CPU count.

        Raises:
            UserError: naming the argument that does not fit.
        """
        super().__init__(bands, batch_size, num_workers)
        check_gsd(gsd)
        self._size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if self._size is not None and not 1 <= min(self._size) <= max(self._size) <= MAX_SIDE:
            raise UserError(f"data.image_size: {image_size} is not possible; give pixels, 1 to {MAX_SIDE}.")
        if num_classes is not None and num_classes < 1:
            raise UserError(f"data.num_classes: {num_classes} is not possible; give at least 1, or null.")
        check_on_error(on_error)
        self._channels, self._given_gsd = channels, gsd
        self._on_error: OnError = on_error
        self._keep_constant = keep_constant
        self._given_classes, self._given_multilabel = num_classes, multilabel
        self._labels, self._given_names, self._ignore = labels, class_names, ignore or []
        self.image_size = self._size or (0, 0)
        self.num_classes, self.multilabel = num_classes, bool(multilabel)
        self.gsd = gsd or self.bands.gsd
        self.name = name or self.name

    def open_source(self, split: Split) -> Dataset[Any] | None:
        """Open a split of the wrapped data (samples with `image` and perhaps `label`), or None if there is none."""
        raise TypeError(f"{type(self).__name__} must implement open_source(split).")

    def some_indices(self, split: Split, source: Dataset[Any]) -> Iterator[Any]:
        """Indices of samples of an opened split, of which one of the first has to be readable.

        They lie far apart, as files that lie side by side are damaged together.
        """
        yield 0
        yield from spread(0, len(source))  # type: ignore[arg-type]

    def build_dataset(self, split: Split) -> Dataset[Any] | None:
        """Open one split and learn image size, classes and label form from its first sample.

        Raises:
            UserError: if the folder is missing, empty or holds something else, or the bands are not in the data.
        """
        source = self.open_source(split)
        if source is None:
            return None
        names = self._channels or describe.band_names(source)
        channels = None if names is None else match_names(self.bands.names, names, self.name)
        prepare = Prepare(
            source=source,
            owner=self.name,
            channels=None if names is None or channels == list(range(len(names))) else channels,
            delivered=len(self.bands) if names is None else len(names),
            size=self._size,
            gsd=self._given_gsd,
            preset_gsd=self.bands.gsd,
        )
        place_of = partial(describe.place_of, source)
        reader = Reader(source, prepare, self._on_error, place_of, self.damage, self._keep_constant)
        indices = self.some_indices(split, source)
        first = reader.read(next(indices), indices)
        self.image_size = (first["image"].shape[1], first["image"].shape[2])
        self.gsd = float(first["gsd"])
        if "label" in first:
            self.num_classes = self._given_classes or describe.num_classes(source)
            self.multilabel = first["label"].ndim == 1 if self._given_multilabel is None else self._given_multilabel
        elif "mask" in first and first["mask"].ndim == 2:
            prepare.label_map = self._masks(source)
        return reader

    def _masks(self, source: Dataset[Any]) -> LabelMap | None:
        """Learn the classes of masks; None where nothing says how many there are."""
        names = self._given_names
        said = describe.class_names(source)
        if names is None and not self._labels and said and self._given_classes in (None, len(said)):
            names = said
        count = self._given_classes or (None if names or self._labels else describe.num_classes(source))
        self.num_classes = None  # that is of image labels
        if not (names or count or self._labels):
            return None
        label_map, self.class_names = settle_classes(self._labels, names, count, self._ignore)
        self.num_mask_classes = len(self.class_names)
        return label_map
