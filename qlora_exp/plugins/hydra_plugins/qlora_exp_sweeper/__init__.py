"""``hydra/sweeper=qlora_optuna``: asynchronous studies on Optuna.

Hydra imports this module whenever any Hydra application on the machine starts. So it imports little, changes nothing of
theirs and defines no dataclass.
"""

from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

ConfigStore.instance().store(
    group="hydra/sweeper",
    name="qlora_optuna",
    node={"_target_": "hydra_plugins.qlora_exp_sweeper.QloraOptunaSweeper", "params": None},
    provider="qlora_exp_sweeper",
)


class QloraOptunaSweeper(Sweeper):
    """Passes the sweep to :mod:`qlora_exp.orchestration`, and its workers to the launcher that Hydra was given."""

    def __init__(self, params: dict[str, str] | None = None, **others: Any) -> None:
        """The sweep reads ``params`` from the configuration, as they were written. It rejects the ``others``."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from qlora_exp.orchestration.sweep import sweep_for_hydra

        assert self.config is not None
        return sweep_for_hydra(self.config, arguments, self.launcher)
