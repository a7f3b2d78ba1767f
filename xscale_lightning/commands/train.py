"""`xscale fit | validate | test | predict`: LightningCLI over our methods, data modules and default callbacks."""

import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, TypeVar

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

import xscale_lightning.data.change
import xscale_lightning.data.folder
import xscale_lightning.data.mask_folder
import xscale_lightning.data.packed
import xscale_lightning.data.paired
import xscale_lightning.data.paired_geo
import xscale_lightning.data.sample
import xscale_lightning.data.synthetic
import xscale_lightning.data.torchgeo
import xscale_lightning.data.treesat
import xscale_lightning.tasks.change
import xscale_lightning.tasks.classification
import xscale_lightning.tasks.segmentation  # noqa: F401 (the class names of these become short names)
from xscale_lightning import checkpoints
from xscale_lightning.callbacks import (
    AffinityPictures,
    FeatureGeometry,
    FiniteGuard,
    LinearProbe,
    OnlineDenseProbe,
    OnlineKNN,
    PairAlignment,
    ProgressBar,
    ReconstructionPictures,
    RunSummary,
    TensorBoardReport,
    Throughput,
)
from xscale_lightning.callbacks.embeddings import EmbeddingWriter
from xscale_lightning.callbacks.event_log import RunLogger
from xscale_lightning.callbacks.preemption import Preemption, queue_again
from xscale_lightning.callbacks.run_checkpoint import RunCheckpoint
from xscale_lightning.callbacks.trace import Trace
from xscale_lightning.commands.bounds import check_batch, check_trainer
from xscale_lightning.commands.folders import check_writable, claim, logger_of
from xscale_lightning.commands.optional_args import settle_optional_args
from xscale_lightning.commands.parser import Parser, import_methods, resolve_method_names
from xscale_lightning.commands.resume import LAST, Found, SavedConfig, find
from xscale_lightning.commands.stage_options import Stage
from xscale_lightning.commands.writing import writing
from xscale_lightning.data.datamodule import XScaleDataModule
from xscale_lightning.errors import Stopped, UserError
from xscale_lightning.methods.base import SSLModule

# Key of the configuration -> callback class; every run has them, each configurable under its key.
CALLBACKS = {
    "preemption": Preemption,  # the first: it takes over the signals before anything is measured
    "checkpoint": RunCheckpoint,
    "guard": FiniteGuard,
    "alignment": PairAlignment,
    "knn": OnlineKNN,
    "linear": LinearProbe,
    "dense": OnlineDenseProbe,
    "geometry": FeatureGeometry,
    "pictures": ReconstructionPictures,
    "affinity": AffinityPictures,
    "throughput": Throughput,
    "embeddings": EmbeddingWriter,
    "summary": RunSummary,
    "tensorboard": TensorBoardReport,
    "progress": ProgressBar,
    "trace": Trace,
}


class CLI(LightningCLI):
    """LightningCLI with our run folders, default callbacks and checks before anything is written.

    Args:
        arguments: the command line, verb first; that of the process when None.
        check_only: make and check everything, and stop before anything is written or run.
    """

    begin: Found | None = None  # the run that `--ckpt_path last` goes on with

    def __init__(self, *args: Any, arguments: list[str] | None = None, check_only: bool = False, **kwargs: Any) -> None:
        self.arguments, self.check_only = arguments, check_only
        super().__init__(*args, **kwargs)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Describe the options of the verb that is asked for alone: each verb takes as long as all the rest."""
        if self.arguments and self.arguments[0] in self.subcommands() and subcommand != self.arguments[0]:
            self._subcommand_method_arguments[subcommand] = []
            return self.init_parser(**kwargs)
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def parse_arguments(self, parser: Parser, args: ArgsType) -> None:  # type: ignore[override]
        """Parse our own arguments: those of the process stay as they are, for the processes Lightning starts."""
        self.config = parser.parse_args(self.arguments and settle_optional_args(self.arguments))

    def add_arguments_to_parser(self, parser: Parser) -> None:
        """Add the default callbacks, the run folder, and the link from the data's bands to the model's."""
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        parser.set_defaults(
            {
                "checkpoint.save_last": True,
                "checkpoint.filename": "step_{step:07d}",
                "checkpoint.auto_insert_metric_name": False,
            }
        )
        parser.add_argument("--output", type=str, default="runs", help="Folder of run folders: OUTPUT/method/time.")
        parser.add_argument(
            "--stages",
            type=list[Stage] | None,
            default=None,
            help="Stages of progressive pretraining: a list of {name, config (laid over this one), tables, optimizer}.",
        )
        parser.link_arguments("data.bands", "model.init_args.bands", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Keep the configuration as given: a checkpoint's hyper-parameters never override it (see `check_resume`).

        It is the first look at the parsed configuration, so numbers that Lightning would stumble over stop here.
        """
        config = self.config[self.config.subcommand]
        seed, accumulate = config.get("seed_everything"), config.trainer.accumulate_grad_batches
        if not isinstance(seed, bool) and seed is not None and not 0 <= seed < 2**32:
            raise UserError(f"seed_everything must be in [0, 2^32), got {seed}.")
        if accumulate is None or accumulate < 1:
            raise UserError(f"trainer.accumulate_grad_batches must be at least 1, got {accumulate}.")
        check_trainer(config)

    def before_instantiate_classes(self) -> None:
        """Refuse an output folder that cannot be written, before data is opened."""
        check_writable(Path(self._get(self.config, "output")))
        config = self.config[self.config.subcommand]
        if config.ckpt_path == LAST:
            config.ckpt_path = None  # in the run's own configuration, too
            plain = yaml.safe_load(self._parser(self.config.subcommand).dump(config, skip_none=False))
            self.begin = find(plain, self.arguments or sys.argv[1:], fitting=self.config.subcommand == "fit")
            self.save_config_kwargs = {"overwrite": self.begin is not None and self.begin.stay}

    @property
    def checkpoint(self) -> str | None:
        """The file that `ckpt_path` means."""
        return str(self.begin.checkpoint) if self.begin else self._get(self.config, "ckpt_path")

    def instantiate_classes(self) -> None:
        """As the base; a task whose weights come from `ckpt_path` is built like that checkpoint's encoder.

        The weights its run started from are then not needed, and may be gone; the configuration keeps their name.
        """
        arguments, path = self._get(self.config, "model").get("init_args"), self.checkpoint
        given = arguments.get("init_from") if arguments else None
        if given is None or path is None or not Path(path).is_file() or not self._fine_tuned(path):
            return super().instantiate_classes()
        arguments.init_from = str(path)
        try:
            super().instantiate_classes()
        finally:
            arguments.init_from = given
        self.model.init_from = given

    def _fine_tuned(self, path: str) -> bool:
        saved = checkpoints.read_metadata(path)[1]  # tasks note there where their encoder came from
        return "init_from" in saved and saved["class_path"] == self._get(self.config, "model").class_path

    def instantiate_trainer(self, **kwargs: object) -> Trainer:
        """Build the Trainer, with a TensorBoard logger in a fresh run folder unless another logger is configured."""
        config = self._get(self.config_init, "trainer")
        self._own_logger = config.get("logger") in (None, True) and not config.get("fast_dev_run")
        if self._own_logger:
            kwargs["logger"] = False  # until everything is checked: a logger's folder is made after that
        if config.get("enable_progress_bar") is False:
            self._parser(self.subcommand).callback_keys.remove("progress")
        left_out: set[str] = set(getattr(self.model, "without_callbacks", ()))
        if self.subcommand != "fit" and self.model._start[0] is not None and not self.checkpoint:
            left_out.add("pictures")  # `init_from` gives an encoder: the decoder beside it knows nothing
        for key in left_out:
            self._parser(self.subcommand).callback_keys.remove(key)
        return super().instantiate_trainer(**kwargs)

    def after_instantiate_classes(self) -> None:
        """Refuse data or a checkpoint that the model cannot take, before anything is written."""
        if not self.datamodule.downloads:
            self.datamodule.setup(self.subcommand)  # Lightning makes the run folder before it opens the data
            check_batch(self.datamodule, self.model.views.size)
        self.model.check_data(self.datamodule, fitting=self.subcommand == "fit")
        path = self.checkpoint
        if path and path not in ("best", "hpc", "registry"):
            checkpoints.check_resume(path, self.model)
        elif not path:
            start = self.model._start[0] or getattr(self.model, "init_from", None)
            if self.subcommand != "fit" and start is None:
                rank_zero_warn("neither --ckpt_path nor model.init_from is given: the weights are untrained.")
            self.model.initialise(frozen=self.subcommand != "fit")
        cores = os.cpu_count() or 1
        if isinstance(self.trainer.accelerator, CPUAccelerator) and self.trainer.num_devices > cores:
            raise UserError(
                f"trainer.devices {self.trainer.num_devices} is more than the {cores} CPU cores here: give fewer."
            )
        self.model.check_machine(self.trainer.strategy.root_device)
        if self._own_logger and not self.check_only:
            self.trainer.logger = self._logger()

    def after_fit(self) -> None:
        """Test a fine-tuned model where there is a test split: the best checkpoint, if one is monitored.

        With `trainer.max_steps: 0` nothing has been trained, and the weights are saved as they are at the start.
        """
        trainer, data = self.trainer, self.datamodule
        if trainer.max_steps == 0 and trainer.checkpoint_callback and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(Path(trainer.checkpoint_callback.dirpath) / "last.ckpt", weights_only=False)  # type: ignore[attr-defined]
        if not getattr(self.model, "test_after_fit", False) or trainer.interrupted or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if data.dataset("test") is None:
            return
        monitored = any(isinstance(c, ModelCheckpoint) and c.best_model_path for c in trainer.checkpoint_callbacks)
        path = "best" if monitored else None
        trainer.test(self.model, datamodule=data, ckpt_path=path, weights_only=True, verbose=False)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Open checkpoints without running code, unless the user says otherwise."""
        kwargs = {**super()._prepare_subcommand_kwargs(subcommand), "ckpt_path": self.checkpoint}
        if kwargs.get("weights_only", True) is None:
            kwargs["weights_only"] = True
        return kwargs

    def _run_subcommand(self, subcommand: str) -> None:
        if self.check_only:
            return
        try:
            with writing(self.trainer, self._resumed(), self.checkpoint):
                super()._run_subcommand(subcommand)
        except SystemExit:  # Lightning's way to leave after Ctrl-C
            if self.trainer.interrupted:
                raise KeyboardInterrupt from None
            raise
        except Stopped as stopped:
            if stopped.requeue:
                queue_again()
            raise

    def _resumed(self) -> Path | None:
        """Folder of the run that goes on in it."""
        return self.begin.run if self.begin and self.begin.stay and self.subcommand == "fit" else None

    def _logger(self) -> RunLogger:
        if self.begin and self._resumed():
            return logger_of(self.begin.run, self.begin.step)
        parent = Path(self._get(self.config_init, "output"))
        method = self.model.method_name
        stamp = time.strftime("%Y-%m-%d_%H-%M-%S") + ("" if self.subcommand == "fit" else f"_{self.subcommand}")
        version = claim(parent / method, stamp) if rank_zero_only.rank == 0 else stamp
        return RunLogger(str(parent), name=method, version=version, default_hp_metric=False)


AnyCLI = TypeVar("AnyCLI", bound=CLI)


def prepare(argv: list[str]) -> list[str]:
    """Make the process ready for the command line `argv` (verb first) and return it with announced names resolved."""
    lightning = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    lightning.addFilter(lambda record: "Tip:" not in record.getMessage())  # advertisements
    silenced = ["LeafSpec", "smaller than the logging interval", "overridden `on_before_batch_transfer`"]
    silenced.append(r"Found \d+ module\(s\) in eval mode")  # targets (EMA) are meant to be
    if argv[:1] != ["fit"]:
        silenced.append("The dirpath has changed")  # checkpoints are only read
    for text in silenced:
        warnings.filterwarnings("ignore", message=f".*{text}.*")
    import_methods()
    return resolve_method_names(argv)


def build(cls: type[AnyCLI], **options: Any) -> AnyCLI:
    """Make (and with that run, unless it is to check only) a command line of our classes."""
    return cls(
        SSLModule,
        XScaleDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_callback=SavedConfig,
        parser_class=Parser,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        trainer_defaults={"num_sanity_val_steps": 0, "enable_model_summary": False},
        **options,
    )
