"""Opening datasets that others wrote: their folder is checked first, and what they say is made readable."""

import inspect
import os
from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset

from xscale_lightning.data.datamodule import check_folder
from xscale_lightning.errors import UserError


def class_of(factory: Any) -> type | None:
    """Class that a factory makes: the class itself, or the one inside a `functools.partial` (jsonargparse's too)."""
    candidates = (factory, getattr(factory, "func", None), *getattr(factory, "args", ()))
    return next((candidate for candidate in candidates if isinstance(candidate, type)), None)


def is_factory(source: Any) -> bool:
    """Whether `source` has yet to be called to become a dataset."""
    return isinstance(source, type) or (callable(source) and not hasattr(source, "__getitem__"))


def short_name(source: Any) -> str:
    """Lower-case class name of a dataset, factory or data module, for log names."""
    made = class_of(source) if is_factory(source) else type(source)
    name = made.__name__ if made is not None else getattr(source, "__name__", "data")
    return name.removesuffix("DataModule").lower()


def arguments(factory: Callable[..., Any]) -> dict[str, Any]:
    """Arguments a factory accepts, with the values it would use."""
    parameters = inspect.signature(class_of(factory) or factory).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return defaults | getattr(factory, "keywords", {})


def build(
    factory: Callable[..., Any],
    name: str,
    root: str | None,
    download: bool,
    *,
    windows: bool = False,
    argument: str = "data.root",
    **options: Any,
) -> Dataset[Any]:
    """Call a dataset's constructor with our root, download and `options`.

    Args:
        factory: dataset class, or what makes one.
        name: of the data, for messages.
        root: folder, handed over as `root` or `paths`; None leaves the constructor's own.
        download: whether the dataset is to download itself.
        windows: whether it is to be a GeoDataset, which is read in windows; else it must not be one.
        argument: what the user calls the folder.
        **options: other arguments of the constructor.

    Raises:
        UserError: if the folder is missing or empty and nothing is to be downloaded into it, if the dataset does not
            find itself there, or if it is a GeoDataset where it must not be one, or the other way round.
    """
    accepted = arguments(factory)
    place = next((key for key in ("root", "paths") if key in accepted), None)
    if place is not None and root is not None:
        options[place] = root
    if download and "download" not in accepted:
        raise UserError(
            f"data.download: {name} cannot download itself; put its files into data.root and leave it false."
        )
    if download:
        options["download"] = True
    folder = options.get(place, accepted.get(place)) if place is not None else None
    remedy = "give the folder with the data" + (", or set data.download to true." if "download" in accepted else ".")
    source = _guarded(
        lambda: factory(**options), name, folder, options.get("download", accepted.get("download")), remedy, argument
    )
    if windows and not all(hasattr(source, part) for part in ("crs", "res", "index")):
        raise UserError(f"data.dataset: {name} is no GeoDataset of TorchGeo, so nothing says where it lies; give one.")
    if hasattr(source, "crs") and not windows:
        raise UserError(f"data.dataset: {name} is read in windows; give its data module as data.datamodule instead.")
    if len(source) == 0:
        raise UserError(f"{argument}: '{folder}' holds no sample of {name}; {remedy}")
    return source


def set_up(module: Any, stage: str, root: str | None, download: bool, name: str) -> None:
    """Set up a TorchGeo data module for a stage, or let it download its data with stage "prepare".

    Raises:
        UserError: if the folder is missing or empty, or holds something else.
    """
    accepted = getattr(module, "kwargs", {})  # what TorchGeo's data modules hand to their datasets
    if root is not None:
        accepted["paths" if "paths" in accepted else "root"] = root
    if download:
        accepted["download"] = True
    folder = accepted.get("root", accepted.get("paths", "data"))
    remedy = "give the folder with the data, or set data.download to true where the data set can download itself."
    step = module.prepare_data if stage == "prepare" else lambda: module.setup(stage)
    _guarded(step, name, folder, accepted.get("download", False), remedy)


def from_datamodule(module: Any, split: str) -> tuple[Dataset[Any] | None, dict[str, Any]]:
    """Dataset of one split of a set-up data module, and its sampler as a keyword of `DataLoader` (or nothing)."""
    source = getattr(module, f"{split}_dataset", None)
    if source is None and split == "train":
        source = getattr(module, "dataset", None)
    for kind in ("batch_sampler", "sampler"):
        sampler = getattr(module, f"{split}_{kind}", None) or getattr(module, kind, None)
        if source is not None and sampler is not None:
            return source, {kind: sampler}
    return source, {}


def _guarded(
    open_source: Callable[[], Any], name: str, folder: Any, downloads: Any, remedy: str, argument: str = "data.root"
) -> Any:
    """Check the folder, open the source, and turn "not found" into one line."""
    if isinstance(folder, (str, os.PathLike)) and not downloads and not os.path.isfile(folder):
        check_folder(argument, folder, remedy)
    try:
        return open_source()
    except OSError as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{argument}: '{folder}' holds no usable {name} data ({reason}); {remedy}") from error
    except AssertionError as error:  # how TorchGeo refuses an argument
        reason = " ".join(str(error).split())[:160] or "it does not say why"
        raise UserError(
            f"data: {name} refuses what it is given ({reason}); see data.splits, data.split_argument and the arguments "
            "of data.dataset."
        ) from error
