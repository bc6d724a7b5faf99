"""``inspect`` on the command line: parses any config of ``fit``, and builds the data only."""

from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lit_distill.commands.inspect import inspect_data, render, write_report
from lit_distill.commands.parser import Parser, check_nulls, import_class
from lit_distill.commands.settings import linked
from lit_distill.commands.train import DistillCLI
from lit_distill.data.base import RationaleDataModule
from lit_distill.errors import UserError
from lit_distill.messages import COMMANDS
from lit_distill.modules.base import DistillModule


class InspectCLI(DistillCLI):
    """Parses what ``fit`` parses, but builds the data only.

    Args:
        args: the arguments after ``inspect``.
    """

    def __init__(self, args: list[str]) -> None:
        super().__init__(
            DistillModule,
            RationaleDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            run=False,
            parser_class=Parser,
            parser_kwargs={
                "prog": "lit-distill inspect",
                "description": f"{COMMANDS['inspect']} A student is never built.",
            },
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """As for ``fit``, but the model is optional."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.add_lightning_class_args(DistillModule, "model", subclass_mode=True, required=False)
        parser.add_lightning_class_args(RationaleDataModule, "data", subclass_mode=True)
        parser.add_argument("--json", type=str | None, default=None, help="Also write the report to this JSON file.")
        # a config may have keys for `fit` only
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="Ignored.")

    def add_links(self, parser: LightningArgumentParser) -> None:
        """None: the tokenizer is given directly."""

    def before_instantiate_classes(self) -> None:
        """Name nothing."""

    def instantiate_classes(self) -> None:
        """Build the data module with the method's tasks, and print the report."""
        data = self.config["data"]
        arguments: dict[str, Any] = (data.get("init_args") or Namespace()).as_dict()
        if (model := self.config.get("model")) is not None:
            arguments |= linked(model)
        check_nulls(import_class(data["class_path"]), arguments)
        built: RationaleDataModule = import_class(data["class_path"])(**arguments)
        report = inspect_data(built)
        render(report)
        if self.config["json"] is not None:
            try:
                write_report(report, Path(self.config["json"]))
            except OSError as error:
                raise UserError(f"json: {self.config['json']!r} cannot be written ({error.strerror})") from error
