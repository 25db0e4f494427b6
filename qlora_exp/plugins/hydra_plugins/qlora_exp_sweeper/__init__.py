"""``hydra/sweeper=qlora_optuna``: asynchronous studies on Optuna. Hydra imports this at every start of every Hydra
application on the machine, so that it is light, touches nothing of theirs, and holds no dataclass."""

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
    """Hands the sweep to :mod:`qlora_exp.orchestration`, and its workers to whatever launcher Hydra was given."""

    def __init__(self, params: dict[str, str] | None = None, **others: Any) -> None:
        """The sweep reads them from the configuration, as they were written, and refuses the ``others``."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from qlora_exp.orchestration.sweep import sweep_for_hydra

        assert self.config is not None
        return sweep_for_hydra(self.config, arguments, self.launcher)
